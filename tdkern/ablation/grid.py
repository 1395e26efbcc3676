"""What is compared: methods, their settings and the presets, as data."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import Field, asdict, dataclass, field, fields, replace

from ..demo import FAMILIES
from ..families import DEFAULT
from ..families import FAMILIES as TRAINED
from ..fields import POSITIVE, UNIT, check, flag, flags_of
from ..losses import Loss
from ..networks.saved import PRECISIONS

STEPS, COMPUTE = "steps", "compute"
BUDGETS = (STEPS, COMPUTE)
STABLE_TARGET, POWER_AVERAGE = "stable-target", "power-average"  # see `rivals`
RIVALS = (STABLE_TARGET, POWER_AVERAGE)
WINDOW_SHARE = "window"  # as `td_share`: what `Loss.window_share` says of the batch


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Args:
        loss: of the family's loss, by the names of its fields; td_share may be WINDOW_SHARE.
        against: names of the methods that it is compared with; none is the table's first.
    """

    family: str = flag(DEFAULT, "What is trained.", choices=TRAINED)
    td: bool = False
    loss: dict = field(default_factory=dict)
    target_ema_tau: float = flag(0.999, "Decay of the target network.", within=UNIT)
    precision: str = flag("fp32", "Precision inside the networks.", choices=PRECISIONS)
    target_precision: str | None = flag(None, "The target network's.", choices=PRECISIONS)
    rival: str | None = flag(None, "What is done beside.", choices=RIVALS)
    batch_factor: float = flag(1.0, "Batch, as a multiple of the table's.", within=POSITIVE)
    length: float = flag(1.0, "Steps, as a multiple of the table's.", within=POSITIVE)
    against: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long a problem is trained on.

    Args:
        ema_halflife: of the averaged weights, as a share of the run.
    """

    steps: int
    batch: int
    lr: float = 2e-3  # Adam's, with cosine decay
    ema_halflife: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a job's numbers depend on, but its seed; the fields are `Method`'s and `Size`'s."""

    problem: str
    family: str
    td: bool
    loss: dict
    target_ema_tau: float
    precision: str
    target_precision: str | None
    rival: str | None
    steps: int
    batch: int
    lr: float
    ema_halflife: float

    @property
    def key(self) -> str:
        """A name that no other setting has."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def step_key(self) -> str:
        """The same for what one step costs, which does not depend on their number."""
        return replace(self, steps=0).key

    @property
    def has_target(self) -> bool:
        """Whether the loss needs a target network."""
        return self.td or TRAINED[self.family].consistency

    def make_loss(self) -> Loss:
        """The family's loss; of the settings of TD it takes those that it knows.

        Raises:
            ValueError: a setting is out of its range.
        """
        losses = FAMILIES[self.family].losses
        loss = losses["TD"] if self.td else next(iter(losses.values()))
        known = {each.name for each in fields(loss)}
        settings = {name: value for name, value in self.loss.items() if name in known}
        return replace(loss, **settings)


def setting_of(method: Method, problem: str, size: Size, steps: int | None = None) -> Setting:
    """A method's setting on a problem, its loss with all its options.

    Args:
        steps: in place of the size's.

    Raises:
        ValueError: a setting of the loss is out of its range.
    """
    own = {name: value for name, value in vars(method).items() if name in _names(Setting)}
    setting = Setting(
        problem=problem,
        **own,
        steps=max(round(method.length * (steps or size.steps)), 1),
        batch=round(method.batch_factor * size.batch),
        lr=size.lr,
        ema_halflife=size.ema_halflife,
    )
    given = dict(setting.loss)
    if given.get("td_share") == WINDOW_SHARE:
        given["td_share"] = 1.0
        share = replace(setting, loss=given).make_loss().window_share(setting.batch)
        given["td_share"] = round(share, 4)
    loss = replace(setting, loss=given).make_loss()
    options = {name: _as_json(getattr(loss, name)) for name in flags_of(type(loss))}
    return replace(setting, loss=options)


def _as_json(value):
    return list(value) if isinstance(value, tuple) else value


def _names(owner: type) -> set[str]:
    return {each.name for each in fields(owner)}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A table: methods by name, the first of which is the baseline.

    Args:
        help: what it shows.
        budgets: whether methods have the baseline's steps, or what it spends.
        seeds: how many, where none are asked for.
        trains: whether anything is trained; else only steps are measured.
    """

    help: str
    methods: dict[str, Method]
    budgets: tuple[str, ...] = (STEPS,)
    seeds: int = 8
    trains: bool = True

    @property
    def baseline(self) -> str:
        """The name of the first method."""
        return next(iter(self.methods))

    def against(self, name: str) -> tuple[str, ...]:
        """The methods that one is compared with."""
        if name == self.baseline:
            return ()
        return self.methods[name].against or (self.baseline,)

    def of(self, names: Iterable[str]) -> "Preset":
        """The preset of some methods, with those that they are compared with.

        Raises:
            ValueError: one is not in the table.
        """
        wanted = {self.baseline}
        for name in names:
            if name not in self.methods:
                known = ", ".join(self.methods)
                raise ValueError(f"--method must be of {known}; got {name}")
            wanted |= {name, *self.against(name)}
        chosen = {name: each for name, each in self.methods.items() if name in wanted}
        return replace(self, methods=chosen)


OF_METHODS = flags_of(Method)
WITHOUT_TD = ("family", "precision", "rival", "batch_factor", "length")  # what counts there too


def options_of(family: str) -> dict[str, Field]:
    """What may be varied with a family: a method's own settings and its loss's."""
    return OF_METHODS | TRAINED[family].options


def preset_of(vary: dict[str, list]) -> Preset:
    """The table of every combination of values, each with TD against the same without TD.

    Args:
        vary: values by the names of `options_of`.

    Raises:
        ValueError: a name is none of these, or a value is out of its range.
    """
    methods: dict[str, Method] = {}
    for values in itertools.product(*vary.values()):
        given = dict(zip(vary, values, strict=True))
        family = given.get("family", DEFAULT)
        for name in given:
            if name not in options_of(family):
                known = ", ".join(options_of(family))
                raise ValueError(f"--vary {name}: {family} has no such option, but {known}")
        own = {name: value for name, value in given.items() if name in OF_METHODS}
        loss = {name: value for name, value in given.items() if name not in OF_METHODS}
        plain = {name: value for name, value in own.items() if name in WITHOUT_TD}
        baseline, with_td = _named(family, plain), _named(f"{family} with TD", given)
        methods[baseline] = Method(**plain)
        methods[with_td] = Method(td=True, loss=loss, **own, against=(baseline,))
    for method in methods.values():
        check(OF_METHODS.values(), vars(method))
    first = next(iter(methods))
    # a baseline of another family or batch is compared with the first one
    return Preset(help="", methods={first: methods.pop(first)} | methods)


def _named(head: str, given: dict) -> str:
    """A method's name: what it is, and its settings."""
    settings = [f"{name} {value}" for name, value in given.items() if name != "family"]
    return ", ".join([head, *settings])
