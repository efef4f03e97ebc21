"""The key of an endpoint: read from the environment, shown nowhere."""

from __future__ import annotations

import os

HIDDEN, SHORTEST = "[key]", 8


class ApiKey:
    """A key that no text of this object holds.

    Attributes:
      name: of the environment variable that it comes from.
    """

    __slots__ = ("_value", "name")

    def __init__(self, name: str, value: str) -> None:
        """Checks that a key can be sent.

        Raises:
          ValueError: it has characters that no header can hold; the message does not show it.
        """
        if not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError(f"the key in {name} has a space, a line end or another character that no key has")
        self.name, self._value = name, value

    @classmethod
    def from_environment(cls, name: str, needed: bool) -> ApiKey | None:
        """The key in an environment variable; None if the variable is not set, or `name` is ''.

        Raises:
          ValueError: it is not set and `needed`, or holds no key.
        """
        value = os.environ.get(name, "") if name else ""
        if not value and needed and name:
            raise ValueError(f"--key_env={name}: there is no environment variable {name}, or it is empty")
        return cls(name, value) if value else None

    def reveal(self) -> str:
        """The key itself."""
        return self._value

    def removed_from(self, text: str) -> str:
        """A text with HIDDEN in place of the key, as a server's complaint may repeat it.

        Shorter words than SHORTEST, as local servers take for a key, are no secrets, and any text may hold them.
        """
        return text.replace(self._value, HIDDEN) if len(self._value) >= SHORTEST else text

    def __repr__(self) -> str:
        return f"ApiKey({self.name})"

    def __reduce__(self) -> str:
        raise TypeError("a key is not written")
