"""Options as dataclass fields: each has its type, default, help and values in one place.

`tdkern train` makes its flags from them, and `check` judges values wherever they come from: the
command line, Python or a file.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

LARGEST = 2**53  # up to which a float is exact: no count of images or steps is more
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    types.NoneType: "nothing",
}


class Range(NamedTuple):
    """The numbers that an option may have."""

    text: str  # what stands behind the option's name
    holds: Callable[[float], bool]


FINITE = Range("must be a finite number", math.isfinite)
POSITIVE = Range("must be positive", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("must be at least 0", lambda value: 0 <= value < math.inf)
AT_LEAST_1 = Range("must be at least 1", lambda value: 1 <= value < math.inf)
AT_LEAST_2 = Range("must be at least 2", lambda value: 2 <= value < math.inf)
UNIT = Range("must be in [0, 1]", lambda value: 0 <= value <= 1)
EVEN = Range("must be positive and even", lambda value: value > 0 and value % 2 == 0)
WIDTH = Range("must be above 0 and at most 12^-0.5", lambda value: 0 < value <= 12**-0.5)
BELOW_1 = Range("must be in [0, 1)", lambda value: 0 <= value < 1)


def flag(
    default=dataclasses.MISSING,
    help: str = "",
    *,
    choices: Collection[str] | None = None,
    within: Range | None = None,
    metavar: str | None = None,
    default_help: str | None = None,
    only: Callable | None = None,
    filled=None,
    kw_only: Any = dataclasses.MISSING,
):
    """A dataclass field that is a flag of `tdkern train` too.

    Args:
        default: of the field and of the flag; none makes it required.
        help: one sentence, which documents both.
        choices: the words that the value may be.
        within: the numbers that it may be.
        metavar: what stands for the value in the help, such as its unit.
        default_help: what the help says of the default in place of its value.
        only: of a family, whether the option is for it; None is for all.
        filled: the value that None is replaced by, where the option is for the family.
        kw_only: as in `dataclasses.field`.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "within": within,
        "metavar": metavar,
        "default_help": default_help,
        "only": only,
        "filled": filled,
    }
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


def flags_of(owner: type) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass that are flags, by name."""
    return {each.name: each for each in dataclasses.fields(owner) if "help" in each.metadata}


def check(fields: Iterable[dataclasses.Field], values: dict, *, whole: bool = True) -> None:
    """Raise ValueError, in one line, for a value that is not of its field's type, choices or range.

    Args:
        fields: of a dataclass.
        values: by the fields' names.
        whole: whether a whole number is required where the type says so. Losses judge it
            themselves, together with the range.
    """
    for field in fields:
        name = field.name
        value = values[field.name]
        rules = field.metadata
        if not _is_of(value, field.type, whole):
            raise ValueError(f"{name} must be {_described(field.type)}, got {short(value)}")
        if value is None:
            continue
        if rules.get("choices") and isinstance(value, str) and value not in rules["choices"]:
            raise ValueError(f"{name} must be {_listed(rules['choices'])}, got {short(value)}")
        _check_range(name, value, rules.get("within") or FINITE)


def _check_range(name: str, value, within: Range) -> None:
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, int | float) and not within.holds(number):
            raise ValueError(f"{name} {within.text}, got {short(value)}")


def short(value) -> str:
    """A value in an error message, in part of a line: the beginning of what is long, and what a
    tensor or an array is rather than its numbers.
    """
    if hasattr(value, "shape"):
        return f"{type(value).__name__} {list(value.shape)}"
    text = ascii(value)
    return text if len(text) < 80 else f"{text[:80]}..."


def _listed(words: Collection[str]) -> str:
    if len(words) == 2:
        return " or ".join(words)
    return f"one of {', '.join(words)}"


def base_type(hint):
    """The type of an option's value, without the None that it may be."""
    kinds = [kind for kind in _alternatives(hint) if kind is not types.NoneType]
    return kinds[0]


def _alternatives(hint) -> tuple:
    """The types that a value may have; a callable is for Python alone, no option is one."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(kind for kind in kinds if kind is not Callable)


def _is_of(value, hint, whole: bool) -> bool:
    return any(_is_one_of(value, kind, whole) for kind in _alternatives(hint))


def _is_one_of(value, kind, whole: bool) -> bool:
    parts = typing.get_args(kind)
    if parts:
        if not isinstance(value, list | tuple) or len(value) == 0:
            return False
        if typing.get_origin(kind) is tuple and Ellipsis not in parts and len(value) != len(parts):
            return False
        return all(_is_one_of(item, parts[0], whole) for item in value)
    if kind in (int, float):
        numbers = int if kind is int and whole else (int, float)
        if not isinstance(value, numbers) or isinstance(value, bool):
            return False
        return isinstance(value, float) or abs(value) <= LARGEST
    return isinstance(value, kind)


def _described(hint) -> str:
    """A type in words."""
    words = []
    for kind in _alternatives(hint):
        parts = typing.get_args(kind)
        if not parts:
            words.append(KINDS.get(kind, kind.__name__))
        elif typing.get_origin(kind) is tuple and Ellipsis not in parts:
            words.append(f"{len(parts)} numbers")
        else:
            words.append("a list of numbers")
    return " or ".join(words)
