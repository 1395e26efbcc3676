"""Kinds of command-line values."""

import math

import click
from click.core import ParameterSource

MOST = 10_000_000  # numbers in a list


class Real(click.ParamType):
    """A number, which is not NaN and, unless allowed, not infinite."""

    name = "float"

    def __init__(self, infinite: bool = False):
        self.infinite = infinite

    def convert(self, value, param, ctx):
        number = click.FLOAT.convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value!r} is not {'a' if self.infinite else 'a finite'} number", param, ctx)
        return number


class Numbers(click.ParamType):
    """Comma-separated numbers; integers may be given as ranges, 0-63."""

    def __init__(self, number: type, count: int | None = None):
        self.number = number
        self.count = count
        self.name = "list"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        numbers = []
        try:
            for part in value.split(","):
                first, dash, last = part.partition("-")
                many = (
                    range(int(first), int(last) + 1)
                    if dash and self.number is int
                    else [self.number(part)]
                )
                if not many:
                    self.fail(f"{value!r} has a range that counts down, {part}", param, ctx)
                if len(numbers) + len(many) > MOST:
                    self.fail(f"{value!r} has more than {MOST:,} numbers", param, ctx)
                numbers += many
            if not all(map(math.isfinite, numbers)):
                self.fail(f"{value!r} must be finite numbers", param, ctx)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a comma-separated list of numbers", param, ctx)
        if not numbers or self.count not in (None, len(numbers)):
            self.fail(f"{value!r} must have {self.count or 'some'} numbers", param, ctx)
        return numbers


def boolean_option(*names: str, help: str):
    """A switch as EDM's, `--xflip`, `--xflip=1` or `--xflip False`; None where it is not given."""
    return click.option(
        *names, type=bool, is_flag=False, flag_value=True, metavar="[BOOL]", help=help
    )


def boolean(name: str, help: str):
    """A switch as EDM's: `--xflip`, `--xflip=1` or `--xflip False`."""
    return click.option(
        name,
        type=bool,
        is_flag=False,
        flag_value=True,
        default=False,
        show_default=True,
        metavar="[BOOL]",
        help=help,
    )


def on_command_line(name: str) -> bool:
    """Whether the running command was given this option, and did not take its default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
