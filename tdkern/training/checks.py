"""Whether the fields of a dataclass hold what their annotations say, as those of a file may not."""

import dataclasses
import math
import types
import typing

LARGEST = 2**53  # up to which a float is exact: no count of images or steps is more


def check_fields(values: object) -> None:
    """Raises ValueError for the first field of a dataclass of another type, or infinite.

    An integer stands for a float too; a tuple stands for a list.
    """
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        kinds = typing.get_args(field.type) if _is_union(field.type) else (field.type,)
        if not any(_fits(value, kind) for kind in kinds):
            names = " or ".join(_name(kind) for kind in kinds)
            raise ValueError(f"{field.name} must be {names}, got {_short(value)}")


def check_numbers(values: object) -> None:
    """Raises ValueError for the first field of a dataclass that is, or has in it, not a number."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        for number in value if type(value) in (list, tuple) else (value,):
            if number != number:
                raise ValueError(f"{field.name} must be a finite number, got {_short(value)}")


def _is_union(kind: object) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _fits(value: object, kind: object) -> bool:
    if kind in (None, type(None)):
        return value is None
    if typing.get_origin(kind) in (list, tuple):
        inner = typing.get_args(kind)[0]
        return (
            type(value) in (list, tuple)
            and len(value) > 0
            and all(_fits(one, inner) for one in value)
        )
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    if kind is float:
        return type(value) in (int, float) and not math.isinf(value)
    return type(value) is kind


def _name(kind: object) -> str:
    if kind in (None, type(None)):
        return "nothing"
    if kind is float:
        return "a finite number"
    if kind is int:
        return "an integer"
    if typing.get_origin(kind) in (list, tuple):
        return f"a list, each {_name(typing.get_args(kind)[0])}"
    return {"str": "text", "bool": "true or false"}.get(getattr(kind, "__name__", ""), str(kind))


def _short(value: object) -> str:
    return ascii(value) if len(ascii(value)) < 80 else ascii(value)[:80] + "..."
