"""The report of a verification: what checkpoints and token stores say alike after all their bytes were compared."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar


class Verification(abc.ABC):
    """The base of frozen dataclasses with at least these two fields.

    Attributes:
      directory: of what was verified.
      problems: a sentence for each thing that is wrong.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    directory: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.problems

    @abc.abstractmethod
    def whole(self) -> str:
        """What was compared, after the name of the directory, in a sentence that holds where nothing is wrong."""

    def __str__(self) -> str:
        if self.ok:
            return f"{self.directory}: {self.whole()}."
        return "\n  ".join([f"{self.directory} is DAMAGED:", *self.problems])

    def record(self) -> dict[str, Any]:
        """The report, JSON-able."""
        return {**dataclasses.asdict(self), "ok": self.ok}
