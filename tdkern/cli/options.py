"""The flags of `tdkern train`, made from the fields of `Options` and of the families' losses."""

import dataclasses
import typing
from collections import defaultdict
from collections.abc import Callable

import click

from ..families import FAMILIES, families_with
from ..fields import base_type, flags_of
from ..training.options import Options
from .types import Numbers, boolean_option

# published names, which are flags alone: in Python and in files each thing has one name
ALIASES = {
    "family": ("precond",),
    "lambda_base": ("lambda-edm", "lambda-td"),
    "coupling": ("td-coupling",),
    "weight": ("td-weight",),
    "eta": ("td-eta",),
    "T": ("diffusion-steps",),
    "beta_schedule": ("noise-schedule",),
    "base_norm": ("loss-norm",),
    "base_weight": ("weight-schedule",),
}
# a flag of one family that means another option of the families which have that one
SAME_FLAG = {"k": "k_idx"}


def options_flags(command: Callable) -> Callable:
    """Add a flag for every option of a run and of every loss, in the order of their fields."""
    flags = [_run_flag(each) for each in _run_fields()]
    flags += [_loss_flag(name, fields) for name, fields in _loss_fields().items()]
    flags += [
        click.option("--loss-type", type=click.Choice(["edm", "td"]), help="--td 0, or --td 1."),
        boolean_option("--fp16", help="--precision fp16."),
        boolean_option("--bf16", help="--precision bf16."),
    ]
    for each in reversed(flags):
        command = each(command)
    return command


def given_options(values: dict) -> dict:
    """The options that flags gave, by the names of their fields; raises click.UsageError.

    Args:
        values: of the flags of `options_flags`, None where a flag was not given. What a loss and a
            run have stands side by side.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if "loss_type" in given:
        given["td"] = given.pop("loss_type") == "td"
    halves = {name: given.pop(name) for name in ("fp16", "bf16") if name in given}
    if all(halves.values()) and len(halves) == 2:
        raise click.UsageError("--fp16 and --bf16 exclude each other")
    if halves:
        given["precision"] = next((name for name, wanted in halves.items() if wanted), "fp32")
    return given


def of_the_family(given: dict, family: str) -> dict:
    """The given options with SAME_FLAG's under the family's own name."""
    # a file's family may be of any type, also one that no dict looks up
    own = FAMILIES[family].options if family in list(FAMILIES) else {}
    for name, flag in SAME_FLAG.items():
        if name in own and flag not in own and flag in given:
            value = given.pop(flag)
            given[name] = int(value) if value % 1 == 0 else value
    return given


def _run_fields() -> list[dataclasses.Field]:
    return [each for name, each in flags_of(Options).items() if name != "gpus"]


def _loss_fields() -> dict[str, dict[str, dataclasses.Field]]:
    """Each loss option's field by family."""
    fields = defaultdict(dict)
    for family, each in FAMILIES.items():
        for name, option in each.options.items():
            fields[name][family] = option
    return fields


def _run_flag(field: dataclasses.Field) -> Callable:
    rules = field.metadata
    help_text = rules["help"]
    if rules["only"]:
        names = [name for name, family in FAMILIES.items() if rules["only"](family)]
        help_text += _only_with(names)
    default = field.default if rules["filled"] is None else rules["filled"]
    if default is not dataclasses.MISSING:
        help_text += _default(default, rules["default_help"])
    return _flag(field, help_text)


def _loss_flag(name: str, fields: dict[str, dataclasses.Field]) -> Callable:
    by_default = defaultdict(list)
    for family, each in fields.items():
        by_default[each.default].append(family)
    first = next(iter(fields.values()))
    help_text = first.metadata["help"] + _only_with(families_with(name))
    if len(by_default) == 1:
        help_text += _default(first.default, first.metadata["default_help"])
    else:
        defaults = "; ".join(f"{value}: {', '.join(its)}" for value, its in by_default.items())
        help_text += f" [default: {defaults}]"
    return _flag(first, help_text)


def _flag(field: dataclasses.Field, help_text: str) -> Callable:
    names = [f"--{name.replace('_', '-')}" for name in (field.name, *ALIASES.get(field.name, ()))]
    kind, rules = base_type(field.type), field.metadata
    if kind is bool:
        return boolean_option(*names, field.name, help=help_text)
    settings = {"type": _click_type(kind, rules["choices"]), "help": help_text}
    if rules["metavar"]:
        settings["metavar"] = rules["metavar"]
    return click.option(*names, field.name, **settings)


def _click_type(kind, choices):
    if choices:
        return click.Choice(list(choices))
    parts = typing.get_args(kind)
    if not parts:
        return kind
    return Numbers(parts[0], len(parts) if typing.get_origin(kind) is tuple else None)


def _only_with(families: list[str]) -> str:
    if len(families) == len(FAMILIES):
        return ""
    return f" Only with {', '.join(families)}."


def _default(value, described: str | None) -> str:
    if described or value is not None:
        return f" [default: {described or value}]"
    return ""
