"""What orbax sees of tensorstore: all of it, except for two calls that keep memory until the process ends.

Where tensorstore makes a dictionary from JSON, it holds one reference too many to each key and each value
(`JsonToPyObject` in its json_type_caster.cc passes new references to PyDict_SetItem, which takes its own), so they are
never freed; versions 0.1.78 to 0.1.86 do it. During a save orbax asks for such dictionaries twice for the metrics of
the drivers, and once per leaf for the specification of a folder, which it has just put together itself. Nobody here
reads the metrics, and the specification is known, so both are answered without tensorstore.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import tensorstore as ts


class _Folder(dict[str, Any]):
    """The specification of a folder of plain files; tensorstore takes dictionaries wherever it takes its own class."""

    def to_json(self) -> dict[str, Any]:
        """The dictionary, as tensorstore's own class would give it."""
        return dict(self)


class _LikeTensorstore(type):
    """The class of a stand-in that has every other attribute of `ts.KvStore`, and its instances."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(ts.KvStore, name)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, ts.KvStore)


class _KvStore(metaclass=_LikeTensorstore):
    """`ts.KvStore`, but the specification of a folder is its dictionary."""

    @staticmethod
    def Spec(given: Any) -> Any:
        """A specification of any key-value store."""
        plain = isinstance(given, Mapping) and given.keys() == {"driver", "path"} and given["driver"] == "file"
        return _Folder(given) if plain else ts.KvStore.Spec(given)


class _Tensorstore:
    """The module `tensorstore`, except for what keeps memory."""

    KvStore = _KvStore

    @staticmethod
    def experimental_collect_matching_metrics(*_: Any, **__: Any) -> list[Any]:
        """No metrics."""
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(ts, name)


def avoid() -> None:
    """Shows orbax, in the whole process, tensorstore without the two calls; changes nothing if orbax has moved them."""
    with contextlib.suppress(ImportError):
        # Orbax has no setting for either. Checked with orbax 0.12.8, and by tests/test_checkpoint_orbax_leaks.py.
        from orbax.checkpoint._src.serialization import tensorstore_utils

        tensorstore_utils.ts = _Tensorstore()
