"""`--vary NAME=VALUE,…` of `tdkern ablate`."""

import typing

import click

from ..ablation.grid import options_of
from ..families import FAMILIES
from ..fields import base_type

FALSE, TRUE, NOTHING = ("0", "false"), ("1", "true"), "none"


class Values(click.ParamType):
    """An option of a method or of a loss, and some values: (name, values)."""

    name = "values"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        name, equals, texts = value.partition("=")
        name = name.strip().replace("-", "_")
        kinds = [options_of(family).get(name) for family in FAMILIES]
        field = next((each for each in kinds if each is not None), None)
        if not equals or field is None:
            known = {name for family in FAMILIES for name in options_of(family)}
            self.fail(f"{value!r} must be NAME=VALUE,… with a NAME of {', '.join(known)}")
        try:
            return name, [_value(text.strip(), base_type(field.type)) for text in texts.split(",")]
        except ValueError:
            self.fail(f"{value!r}: {name} takes {_kind(base_type(field.type))}, or {NOTHING}")


def _value(text: str, kind):
    """A value of a type; numbers of a list are parted by colons."""
    if text == NOTHING:
        return None
    parts = typing.get_args(kind)
    if parts:
        return [parts[0](part) for part in text.split(":")]
    if kind is bool:
        if text not in FALSE + TRUE:
            raise ValueError(text)
        return text in TRUE
    return kind(text)


def _kind(kind) -> str:
    if typing.get_args(kind):
        return "numbers parted by colons"
    return {bool: "0 or 1", str: "words", int: "whole numbers"}.get(kind, "numbers")
