"""What a training run is made of: saved with it, and read back when it goes on."""
import dataclasses
from dataclasses import dataclass

from ..losses import TDEDMLoss
from .checkpoint import PRECISIONS, PRECONDS

# what may change when a run goes on: these do not touch the weights (duration does under a decay, see `resumed`)
FREE = ("data", "duration", "tick", "snap", "dump", "workers")


@dataclass
class Options:
    """The options of a run, under the names of `tdkern train`'s flags; raises ValueError where one is out of range."""

    data: str
    cond: bool = False
    arch: str = "ddpmpp"
    precond: str = "edm"
    duration: float = 200.0  # million images
    batch: int = 512
    batch_gpu: int | None = None  # images of one forward pass; None: the process's whole share
    cbase: int | None = None
    cres: list[int] | None = None
    lr: float = 1e-3
    lr_rampup_kimg: float | None = None  # None: 5 % of the duration, at most 10,000
    lr_decay: str = "none"
    ema: float = 0.5  # half-life, million images
    dropout: float = 0.13
    augment: float = 0.0  # the command line's default is EDM's
    xflip: bool = False
    precision: str = "fp32"
    loss_type: str = "td"
    lambda_edm: float = 0.5
    k_idx: float = 1.0
    one_idx: float | None = None  # None: 0.25 with precond edm, else 1
    td_coupling: str = "markov"
    td_weight: str = "pairwise"
    td_sigma: list[float] | None = None
    td_share: float | None = 1.0  # None: with td_sigma what its samples need, else 1
    target_ema_tau: float = 0.999
    target_copy: int | None = None  # updates; None: the target is an average
    target_precision: str | None = None  # None: as precision
    steps: int = 18
    tick: float | None = None  # thousand images; None: 1 % of the duration, at most 50
    snap: int = 50  # ticks; 0: only at the end
    dump: int = 50
    seed: int = 0
    workers: int = 1
    transfer: str | None = None
    gpus: int = 1  # processes

    def __post_init__(self):
        if self.lr_rampup_kimg is None:
            self.lr_rampup_kimg = min(50 * self.duration, 10_000)
        if self.tick is None:
            self.tick = min(10 * self.duration, 50)
        if self.precond not in PRECONDS:
            raise ValueError(f"precond must be one of {', '.join(PRECONDS)}, got {self.precond!r}")
        if self.one_idx is None:
            self.one_idx = 0.25 if self.precond == "edm" else 1.0
        if self.td_sigma is not None and self.precond != "edm":
            raise ValueError(f"td_sigma is for precond edm, got precond {self.precond}")
        if self.target_precision not in (None, *PRECISIONS):
            raise ValueError(f"target_precision must be one of {', '.join(PRECISIONS)}, got {self.target_precision!r}")
        share = self.batch // self.gpus
        if self.batch_gpu is None:
            self.batch_gpu = share
        for name in ("duration", "batch", "batch_gpu", "lr", "tick"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("lr_rampup_kimg", "ema", "snap", "dump", "seed", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.batch % self.gpus or share % self.batch_gpu:
            raise ValueError(f"batch must be a multiple of batch_gpu x processes, got batch {self.batch}, batch_gpu {self.batch_gpu}, {self.gpus} processes")
        if self.td_share is None:
            self.td_share = round(TDEDMLoss(td_sigma=tuple(self.td_sigma)).window_share(self.batch_gpu), 4) if self.td_sigma else 1.0
        if not 0 <= self.augment <= 1:
            raise ValueError(f"augment must be in [0, 1], got {self.augment}")
        if not 0 <= self.target_ema_tau < 1:
            raise ValueError(f"target_ema_tau must be in [0, 1), got {self.target_ema_tau}")
        if self.target_copy is not None and not self.target_copy >= 1:
            raise ValueError(f"target_copy must be at least 1, got {self.target_copy}")

    @property
    def total_steps(self) -> int:
        """Training steps in the duration; the last may go past it."""
        return -(-round(self.duration * 1e6) // self.batch)

    def resumed(self, **given) -> "Options":
        """These options with those `given` on the command line; raises ValueError for one that would make it another run."""
        free = FREE if self.lr_decay == "none" else tuple(name for name in FREE if name != "duration")
        for name, value in given.items():
            if name not in free and value != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r} in the run to resume, got {value!r}; leave it out, or start a new run")
        return dataclasses.replace(self, **given)
