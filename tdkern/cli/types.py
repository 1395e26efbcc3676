"""Kinds of command-line values."""
import click
from click.core import ParameterSource


class Numbers(click.ParamType):
    """Comma-separated numbers; integers may be given as ranges, 0-63."""

    def __init__(self, number: type, count: int | None = None):
        self.number, self.count, self.name = number, count, "list"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        numbers = []
        try:
            for part in value.split(","):
                first, dash, last = part.partition("-")
                numbers += range(int(first), int(last) + 1) if dash and self.number is int else [self.number(part)]
        except ValueError:
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
    return click.option(name, type=bool, is_flag=False, flag_value=True, default=False, show_default=True, metavar="[BOOL]", help=help)


def on_command_line(name: str) -> bool:
    """Whether the running command was given this option, and did not take its default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
