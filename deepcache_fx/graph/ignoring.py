"""Arguments that a caller says never matter (`optimize(..., ignore=...)`): what of them is not part of the key."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch

from deepcache_fx.errors import OptionError
from deepcache_fx.graph.containers import members

Describe = Callable[[Any, list[torch.Tensor]], Hashable]


class Ignored:
    """Names of arguments, and dotted paths into those that are dictionaries.

    Args:
        paths: As the user gave them.
        names: Of the arguments that forward has.
        rest: The name of what takes all other keywords (`**kwargs`), whose keys count as names; None without one.
        owner: What has this forward, for messages.

    Raises:
        OptionError: forward has no such argument.
    """

    def __init__(self, paths: Sequence[str], names: Collection[str], rest: str | None, owner: str) -> None:
        self._paths = frozenset(paths)
        self._rest = rest
        self._above = frozenset(path[:end] for path in paths for end, letter in enumerate(path) if letter == ".")
        for path in paths:
            name = path.split(".")[0]
            if rest is None and name not in names:
                raise OptionError(
                    f"ignore names {path!r}, but {owner} has no argument {name}: it has {', '.join(names)}"
                )

    def __bool__(self) -> bool:
        return bool(self._paths)

    def describe(self, name: str, value: Any, tensors: list[torch.Tensor], describe: Describe) -> Hashable:
        """The argument's key, as `describe` makes it but for what is ignored.

        Raises:
            OptionError: a path leads into something that is no dictionary.
        """
        if name == self._rest:
            return self._items("", value, tensors, describe)
        return self._at(name, value, tensors, describe)

    def _at(self, path: str, value: Any, tensors: list[torch.Tensor], describe: Describe) -> Hashable:
        if path in self._paths:
            return _tensors_alone(value, tensors, describe)
        if path not in self._above or value is None:
            return describe(value, tensors)
        if not isinstance(value, dict):
            inner = sorted(item for item in self._paths if item.startswith(f"{path}."))
            raise OptionError(
                f"ignore names {', '.join(map(repr, inner))}, but {path} is no dictionary in this call: it is a "
                f"{type(value).__name__}"
            )
        return (type(value), self._items(f"{path}.", value, tensors, describe))

    def _items(self, above: str, value: dict[Any, Any], tensors: list[torch.Tensor], describe: Describe) -> Hashable:
        items = [
            (name if type(name) is str else describe(name, []), self._at(f"{above}{name}", item, tensors, describe))
            for name, item in members(value) or ()
        ]
        return tuple([item for item in items if item[1] is not _NOTHING])


_NOTHING = ("ignored",)


def _tensors_alone(value: Any, tensors: list[torch.Tensor], describe: Describe) -> Hashable:
    """Tensors stay inputs of the graph, so where they are and what they look like does matter."""
    if isinstance(value, torch.Tensor):
        return describe(value, tensors)
    found = [(str(name), _tensors_alone(item, tensors, describe)) for name, item in members(value) or ()]
    return tuple([(name, item) for name, item in found if item is not _NOTHING]) or _NOTHING
