"""An object as part of a key: equal to itself alone."""

from __future__ import annotations


class Same:
    """Equal for the same object alone, which it keeps alive: an address may be given to another one."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    @property
    def value(self) -> object:
        return self._value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._value is other._value
