"""What a training run is made of: saved with it, and read back when it goes on."""

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

from ..families import DEFAULT, FAMILIES, Family, families_with
from ..fields import (
    AT_LEAST_1,
    AT_LEAST_2,
    BELOW_1,
    EVEN,
    NOT_NEGATIVE,
    POSITIVE,
    UNIT,
    WIDTH,
    check,
    flag,
    flags_of,
)
from ..losses import Loss
from ..losses.curricula import Easy, Exponential, Progressive
from ..networks.presets import PRESETS
from ..networks.saved import PRECISIONS
from ..optim import OPTIMIZERS
from ..samplers import SAMPLERS

CURRICULA: dict[str, Any] = {"progressive": Progressive, "exponential": Exponential, "easy": Easy}
# what may change when a run goes on: these do not touch the weights (duration does under a decay,
# see `resumed`), and have no part in checksums
FREE = (
    "data",
    "duration",
    "tick",
    "snap",
    "dump",
    "keep",
    "keep_every",
    "time_limit",
    "workers",
    "wandb",
    "cache",
    "fid_every",
    "fid_ref",
    "fid_steps",
    "fid_num",
    "fid_detector",
)


# what may change besides, as it changes rounding alone, and dropout's masks
SPLIT = ("gpus", "batch_gpu", "shard", "compile", "cuda_graph", "bench", "ls")


def _consistency(family: Family) -> bool:
    return family.consistency


def _averaged(family: Family) -> bool:
    return not family.consistency


@dataclass(kw_only=True)
class Options:
    """The options of a run; `tdkern train` makes its flags from them and from the losses' fields.

    Raises:
        ValueError: one is of the wrong type, out of its range, or not for the family.
    """

    data: str = flag(help="Images, in EDM's layout.", metavar="ZIP|DIR")
    cond: bool = flag(False, "Train a class-conditional network.")
    arch: str = flag("ddpmpp", "Network.", choices=PRESETS)
    family: str = flag(DEFAULT, "Loss and preconditioning.", choices=FAMILIES)
    td: bool = flag(True, "Whether the loss has the temporal-difference term.")
    uncertainty: bool = flag(
        False,
        "Learn EDM2's uncertainty u of a noise level beside the network: a sample's loss L becomes "
        "exp(-u) L + u, so that all levels weigh alike in the gradient.",
    )
    duration: float = flag(
        200.0, "Training duration, million images.", within=POSITIVE, metavar="MIMG"
    )
    batch: int = flag(512, "Images in one step, over all processes.", within=POSITIVE)
    batch_gpu: int | None = flag(
        None,
        "Images of one forward pass; fewer need less memory.",
        within=POSITIVE,
        default_help="the process's share",
    )
    cbase: int | None = flag(
        None, "Base width of the network.", within=EVEN, default_help="by --arch"
    )
    cres: list[int] | None = flag(  # noqa: RUF009  (its default is None)
        None,
        "Width of each resolution, times the base.",
        within=POSITIVE,
        default_help="by --arch",
    )
    lr: float = flag(1e-3, "Learning rate.", within=POSITIVE)
    lr_rampup_kimg: float | None = flag(
        None,
        "Length of the learning-rate warm-up.",
        within=NOT_NEGATIVE,
        metavar="KIMG",
        default_help="5% of the duration, at most 10000",
    )
    lr_decay: str = flag(
        "none", "How the learning rate falls over the duration.", choices=("none", "cosine")
    )
    optim: str = flag("adam", "Optimizer.", choices=OPTIMIZERS)
    weight_decay: float = flag(
        0.0, "Weight decay, apart from the gradient, as in AdamW.", within=NOT_NEGATIVE
    )
    clip: float | None = flag(
        None,
        "Largest norm of the gradient, a sum over elements and a mean over the batch; a larger one "
        "is scaled to it.",
        within=POSITIVE,
        metavar="NORM",
        default_help="none",
    )
    ema: float = flag(
        0.5, "Half-life of the averaged weights.", within=NOT_NEGATIVE, metavar="MIMG"
    )
    power_ema: list[float] | None = flag(  # noqa: RUF009  (its default is None)
        None,
        "Relative widths of averages by EDM2's power function, such as 0.05,0.10. They are saved "
        "beside each snapshot, and tdkern ema makes averages of other widths of them.",
        within=WIDTH,
        default_help="none",
    )
    dropout: float | None = flag(
        None, "Dropout probability.", within=BELOW_1, default_help="by --family"
    )
    augment: float = flag(
        0.12, "Probability of each augmentation, as in EDM; 0 for none.", within=UNIT, metavar="P"
    )
    xflip: bool = flag(False, "Add every image's mirror image.")
    precision: str = flag("fp32", "Precision inside the network.", choices=PRECISIONS)
    ls: float = flag(
        1.0,
        "Loss scaling, for fp16: a factor of the gradients until the optimizer takes it out. A "
        "power of two changes no result.",
        within=POSITIVE,
    )
    compile: bool = flag(False, "Compile the networks by torch.compile.")
    cuda_graph: bool = flag(
        False, "On a GPU capture the whole step once as a CUDA graph, and replay it."
    )
    bench: bool = flag(
        False,
        "On a GPU choose kernels by measuring, and use TF32: faster, but not the same bits again.",
    )
    target_precision: str | None = flag(
        None,
        "Precision inside the target network.",
        choices=PRECISIONS,
        default_help="the network's",
    )
    target_ema_tau: float | None = flag(
        None,
        "Decay of the target network, reached by a ramp.",
        within=BELOW_1,
        only=_averaged,
        filled=0.999,
    )
    target_copy: int | None = flag(
        None,
        "Copy the network into the target every so many updates.",
        within=AT_LEAST_1,
        metavar="STEPS",
        only=_averaged,
        default_help="the target is an average",
    )
    scale_mode: str | None = flag(
        None,
        "How the number of noise levels grows; easy is easy consistency tuning's, whose t' comes "
        "nearer to t.",
        choices=("fixed", *CURRICULA),
        only=_consistency,
        filled="progressive",
    )
    start_scales: int | None = flag(
        None,
        "Steps between noise levels at the start of training; with fixed their number, with easy "
        "its q.",
        only=_consistency,
        default_help="by --scale-mode",
    )
    end_scales: int | None = flag(
        None,
        "Steps between noise levels at the end of their growth.",
        only=_consistency,
        default_help="by --scale-mode",
    )
    total_training_steps: int | None = flag(
        None,
        "Training steps until that growth ends; with easy those of a stage.",
        only=_consistency,
        default_help="those of the duration",
    )
    target_ema_mode: str | None = flag(
        None,
        "Whether the decay of the target network grows with the noise levels.",
        choices=("fixed", "adaptive"),
        only=_consistency,
        filled="adaptive",
    )
    start_ema: float | None = flag(
        None,
        "Decay of the target network at the start; 0, with fixed, copies the network.",
        within=BELOW_1,
        only=_consistency,
        filled=0.9,
    )
    # the options of the family's own losses, by the names of their fields; made complete here
    loss: dict = field(default_factory=dict)
    tick: float | None = flag(
        None,
        "How often to print progress.",
        within=POSITIVE,
        metavar="KIMG",
        default_help="1% of the duration, at most 50",
    )
    snap: int = flag(
        50,
        "How often to save the averaged network and a grid of images; 0: at the end.",
        within=NOT_NEGATIVE,
        metavar="TICKS",
    )
    dump: int = flag(
        50,
        "How often to save the training state; 0: at the end.",
        within=NOT_NEGATIVE,
        metavar="TICKS",
    )
    keep: int = flag(
        1, "How many of the newest training states stay.", within=POSITIVE, metavar="K"
    )
    keep_every: int = flag(
        0,
        "Keep the state of every N-th dump for good; 0: of none.",
        within=NOT_NEGATIVE,
        metavar="N",
    )
    fid_every: int = flag(
        0,
        "How often to measure the FID of the averaged network, and to save the training state with "
        "it; 0: never.",
        within=NOT_NEGATIVE,
        metavar="TICKS",
    )
    fid_ref: str | None = flag(
        None,
        "Reference statistics for --fid-every: of tdkern fid ref, or EDM's.",
        metavar="NPZ|URL",
        default_help="none",
    )
    fid_steps: list[int] | None = flag(  # noqa: RUF009  (its default is None)
        None,
        "Numbers of sampling steps with each of which a FID is measured, by the family's sampler.",
        within=AT_LEAST_1,
        default_help="5,9,18; of consistency models 1,2",
    )
    fid_num: int = flag(50000, "Images of each FID, of the seeds from 0.", within=AT_LEAST_2)
    fid_detector: str | None = flag(
        None,
        "What gives the features, as --detector of tdkern fid.",
        metavar="NAME|FILE",
        default_help="Inception-v3",
    )
    time_limit: float | None = flag(
        None,
        "After so many minutes save the state and end, as at SIGTERM.",
        within=POSITIVE,
        metavar="MIN",
        default_help="none",
    )
    seed: int = flag(0, "Random seed.", within=NOT_NEGATIVE)
    workers: int = flag(1, "Processes that read images.", within=NOT_NEGATIVE)
    wandb: str | None = flag(
        None,
        "Send the numbers of every tick to this project at Weights & Biases too.",
        metavar="PROJECT",
        default_help="none",
    )
    cache: bool = flag(False, "Keep the decoded images in memory.")
    transfer: str | None = flag(
        None, "Start from the weights of a network snapshot, or of a run's newest.", metavar="DIR"
    )
    shard: bool = flag(
        False,
        "Each process keeps a share of weights, averages and optimizer (FSDP2); else all.",
    )
    gpus: int = flag(1, "Processes, which torchrun starts.", within=AT_LEAST_1)

    def __post_init__(self):
        check(flags_of(Options).values(), vars(self))
        self._fill_in()
        self._check_batch()
        if _consistency(FAMILIES[self.family]):
            self._complete_scales()
        self._complete_fid()
        self._complete_loss()
        self.make_loss()  # which checks its own arguments
        if self.cuda_graph and self.gpus > 1:
            raise ValueError(f"cuda_graph must be False with {self.gpus} processes, got True")

    def _fill_in(self) -> None:
        """Refuse the options of other families, and replace what is None by its value."""
        family = FAMILIES[self.family]
        for name, each in flags_of(Options).items():
            only, filled = each.metadata["only"], each.metadata["filled"]
            if only and not only(family) and getattr(self, name) is not None:
                self._refuse(name, [other for other in FAMILIES if only(FAMILIES[other])])
            if only and only(family) and getattr(self, name) is None:
                setattr(self, name, filled)
        if self.dropout is None:
            self.dropout = family.dropout
        if self.lr_rampup_kimg is None:
            self.lr_rampup_kimg = min(50 * self.duration, 10_000)
        if self.tick is None:
            self.tick = min(10 * self.duration, 50)

    def _refuse(self, name: str, families: list[str]) -> None:
        known = ", ".join(families)
        raise ValueError(f"{name} is for family {known}, got family {self.family}")

    def _check_batch(self) -> None:
        share = self.batch // self.gpus
        if self.batch_gpu is None:
            self.batch_gpu = max(share, 1)
        if self.batch % self.gpus or share % self.batch_gpu:
            raise ValueError(
                f"batch must be a multiple of batch_gpu x processes, got batch {self.batch}, "
                f"batch_gpu {self.batch_gpu}, {self.gpus} processes"
            )

    def _complete_scales(self) -> None:
        """Fill in how the number of noise levels grows, which a longer duration then keeps."""
        if self.target_ema_mode == "adaptive" and self.start_ema == 0:
            raise ValueError("start_ema must be above 0 with target_ema_mode adaptive, got 0")
        if self.target_ema_mode == "adaptive" and self.scale_mode == "easy":
            raise ValueError(
                "target_ema_mode must be fixed with scale_mode easy, which counts no noise levels, "
                "got adaptive"
            )
        scales = {"start_scales": 40, "end_scales": None, "total_training_steps": None}
        if self.scale_mode != "fixed":
            curriculum = CURRICULA[self.scale_mode]
            scales = {
                "start_scales": curriculum.start_scales,
                "end_scales": curriculum.end_scales,
                "total_training_steps": self.total_steps,
            }
        for name, default in scales.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
            elif default is None:
                known = ", ".join(mode for mode in CURRICULA if getattr(CURRICULA[mode], name, 1))
                raise ValueError(
                    f"{name} is for scale_mode {known}, got scale_mode {self.scale_mode}"
                )

    def _complete_fid(self) -> None:
        """Fill in at which numbers of steps FIDs are measured."""
        family = FAMILIES[self.family]
        if self.fid_every and not self.fid_ref:
            raise ValueError("fid_ref must be given with fid_every; tdkern fid ref makes one")
        if self.fid_steps is None:
            self.fid_steps = [1, 2] if family.consistency else [5, 9, 18]
        least = SAMPLERS[family.sampler_with_steps].least_steps
        if min(self.fid_steps) < least:
            raise ValueError(
                f"fid_steps must be at least {least} each with {family.sampler_with_steps}, got "
                f"{self.fid_steps}"
            )
        self.fid_steps = sorted(set(self.fid_steps))

    def _complete_loss(self) -> None:
        """Check the losses' options and give those that are not there their defaults."""
        known = FAMILIES[self.family].options
        if not isinstance(self.loss, dict):
            raise ValueError(f"loss must be the family's own options by name, got {self.loss!r}")
        for name in self.loss:
            if name not in known and families_with(name):
                self._refuse(name, families_with(name))
            if name not in known:
                raise ValueError(f"loss must hold {', '.join(known)}, got {name!r}")
        given = {
            name: list(value) if isinstance(value, tuple) else value  # as JSON holds it
            for name, value in self.loss.items()
            if value is not None
        }
        self.loss = {name: given.get(name, each.default) for name, each in known.items()}
        check(known.values(), self.loss, whole=False)
        if "td_share" in known and "td_share" not in given:
            # what the samples at `td_sigma` need; one sample, where those are next to none
            window = self._make(td=True).window_share(self.batch_gpu)
            self.loss["td_share"] = max(round(window, 4), 1e-4)

    def make_loss(self) -> Loss:
        """The loss that these options describe."""
        return self._make(self.td)

    def _make(self, td: bool) -> Loss:
        settings = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.loss.items()
        }
        if _consistency(FAMILIES[self.family]):
            settings["num_scales"] = self._num_scales()
        return FAMILIES[self.family].make_loss(td, settings)

    def _num_scales(self):
        if self.scale_mode == "fixed":
            return self.start_scales
        curriculum = CURRICULA[self.scale_mode]
        return curriculum(self.start_scales, self.end_scales, self.total_training_steps)

    @property
    def has_target(self) -> bool:
        """Whether the loss needs a target network."""
        return self.td or _consistency(FAMILIES[self.family])

    @property
    def total_steps(self) -> int:
        """Training steps in the duration; the last may go past it."""
        return -(-round(self.duration * 1e6) // self.batch)

    def resumed(self, **given) -> "Options":
        """These options with those `given`, the losses' own among them by their names.

        Raises:
            ValueError: one that would make it another run.
        """
        free = set(FREE) | set(SPLIT)
        if self.lr_decay != "none":
            free -= {"duration"}
        for name, value in given.items():
            own = vars(self).get(name, self.loss.get(name))
            if name not in free and value != own:
                raise ValueError(
                    f"{name} is {own!r} in the run to resume, got {value!r}; leave it out, or "
                    "start a new run"
                )
        changes = {name: value for name, value in given.items() if name in vars(self)}
        if "gpus" in changes and "batch_gpu" not in changes:
            changes["batch_gpu"] = math.gcd(self.batch_gpu, max(self.batch // changes["gpus"], 1))
        return dataclasses.replace(self, **changes)


def nested(base: dict, given: dict) -> dict:
    """The arguments of `Options`: `base`, as a file holds them, and on top values by their names.

    Args:
        base: of `Options`, the losses' own options under "loss".
        given: options of a run and of a loss side by side, as the command line has them.
    """
    run = inspect.signature(Options).parameters
    own = {name: value for name, value in given.items() if name not in run}
    options = base | {name: value for name, value in given.items() if name in run}
    loss = base.get("loss", {})
    return options | {"loss": loss | own if isinstance(loss, dict) else loss}
