"""What a training run is made of: saved with it, and read back when it goes on."""
import dataclasses
from dataclasses import dataclass

from ..losses import TDEDMLoss
from ..losses.curricula import Exponential, Progressive
from .checkpoint import FREE, PRECISIONS, PRECONDS
from .checks import check_fields, check_numbers

PATHS = ("ddpm", "iddpm", "vp", "ve", "flow")  # the preconds whose losses have a time and DDIM's eta
# Options that some preconds alone have, or whose default depends on the precond: its value for each where none is given. With all others it is None.
DEFAULTS = {
    "dropout": dict.fromkeys(PRECONDS, 0.13) | {"ct": 0.0},  # the target network, which ct compares the network with, has none
    "td_weight": dict.fromkeys(PRECONDS, "pairwise") | {"ct": "pairwise_x0"},
    "td_sigma": {"edm": None},
    "td_eta": dict.fromkeys(PATHS),
    "k_idx": dict.fromkeys(("edm", *PATHS), 1.0),
    "one_idx": {"edm": 0.25, "ct": 0.25, "vp": 1.0, "ve": 1.0, "flow": 1.0},
    "steps": dict.fromkeys(("edm", "vp", "ve", "flow"), 18),
    "target_ema_tau": dict.fromkeys(("edm", *PATHS), 0.999),
    "target_copy": dict.fromkeys(("edm", *PATHS)),
    "diffusion_steps": {"ddpm": 1000},
    "noise_schedule": {"ddpm": "linear"},
    "prediction": {"ddpm": "eps"},
    "loss_norm": {"ct": "l2"},
    "weight_schedule": {"ct": "uniform"},
    "lognormal": {"ct": None},
    "scale_mode": {"ct": "progressive"},
    "start_scales": {"ct": None},
    "end_scales": {"ct": None},
    "total_training_steps": {"ct": None},
    "target_ema_mode": {"ct": "adaptive"},
    "start_ema": {"ct": 0.9},
}
CHOICES = {
    "arch": ("ddpmpp", "ncsnpp", "adm"),
    "precision": PRECISIONS,
    "loss_type": ("edm", "td"),
    "lr_decay": ("none", "cosine"),
    "td_coupling": ("markov", "shared"),
}
CURRICULA = {"progressive": Progressive, "exponential": Exponential}


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
    dropout: float | None = None
    augment: float = 0.0  # the command line's default is EDM's
    xflip: bool = False
    precision: str = "fp32"
    loss_type: str = "td"
    lambda_edm: float = 0.5
    k_idx: float | None = None
    one_idx: float | None = None
    td_coupling: str = "markov"
    td_weight: str | None = None
    td_sigma: list[float] | None = None
    td_eta: float | None = None  # of the means; None: the coupling's
    td_share: float | None = 1.0  # None: with td_sigma what its samples need, else 1
    target_ema_tau: float | None = None
    target_copy: int | None = None  # updates; None: the target is an average
    target_precision: str | None = None  # None: as precision
    steps: int | None = None
    diffusion_steps: int | None = None
    noise_schedule: str | None = None
    prediction: str | None = None
    loss_norm: str | None = None
    weight_schedule: str | None = None
    lognormal: list[float] | None = None  # None: levels are drawn evenly
    scale_mode: str | None = None
    start_scales: int | None = None  # None, with ct: the curriculum's own, or 40
    end_scales: int | None = None
    total_training_steps: int | None = None  # None, with ct: the duration's at the start
    target_ema_mode: str | None = None
    start_ema: float | None = None
    tick: float | None = None  # thousand images; None: 1 % of the duration, at most 50
    snap: int = 50  # ticks; 0: only at the end
    dump: int = 50
    keep: int = 1  # newest training states that stay
    keep_every: int = 0  # dumps; of every so many the state stays for good; 0: of none
    time_limit: float | None = None  # minutes, after which the run saves its state and ends
    seed: int = 0
    workers: int = 1
    transfer: str | None = None
    gpus: int = 1  # processes

    def __post_init__(self):
        check_fields(self)
        self._check_network()
        if self.lr_rampup_kimg is None:
            self.lr_rampup_kimg = min(50 * self.duration, 10_000)
        if self.tick is None:
            self.tick = min(10 * self.duration, 50)
        if self.precond not in PRECONDS:
            raise ValueError(f"precond must be one of {', '.join(PRECONDS)}, got {self.precond!r}")
        for name, defaults in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults.get(self.precond))
            elif self.precond not in defaults:
                raise ValueError(f"{name} is for precond {', '.join(defaults)}, got precond {self.precond}")
        if self.target_precision not in (None, *PRECISIONS):
            raise ValueError(f"target_precision must be one of {', '.join(PRECISIONS)}, got {self.target_precision!r}")
        share = self.batch // self.gpus
        if self.batch_gpu is None:
            self.batch_gpu = share
        for name in ("duration", "batch", "batch_gpu", "lr", "tick", "keep"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("lr_rampup_kimg", "ema", "snap", "dump", "keep_every", "seed", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.batch % self.gpus or share % self.batch_gpu:
            raise ValueError(f"batch must be a multiple of batch_gpu x processes, got batch {self.batch}, batch_gpu {self.batch_gpu}, {self.gpus} processes")
        if self.td_share is None:
            window = TDEDMLoss(td_sigma=tuple(self.td_sigma)).window_share(self.batch_gpu) if self.td_sigma else 1.0
            self.td_share = max(round(window, 4), 1e-4)  # one sample, where the window holds next to none
        if self.td_share != 1 and self.precond == "ct":  # whose target network is needed without TD too
            raise ValueError(f"td_share is for precond edm, {', '.join(PATHS)}, got precond ct")
        if not 0 <= self.augment <= 1:
            raise ValueError(f"augment must be in [0, 1], got {self.augment}")
        for name in ("target_ema_tau", "start_ema"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.target_copy is not None and not self.target_copy >= 1:
            raise ValueError(f"target_copy must be at least 1, got {self.target_copy}")
        check_numbers(self)
        if self.precond == "ct":
            self._complete_ct()

    def _check_network(self) -> None:
        """Raises ValueError for a network that cannot be, or for no processes."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.cbase is not None and (self.cbase < 2 or self.cbase % 2):
            raise ValueError(f"cbase must be positive and even, got {self.cbase}")
        if self.cres is not None and min(self.cres) < 1:
            raise ValueError(f"cres must be positive numbers, got {self.cres}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.diffusion_steps is not None and not 1 <= self.diffusion_steps <= 1_000_000:
            raise ValueError(f"diffusion_steps must be from 1 to 1000000, got {self.diffusion_steps}")
        if self.gpus < 1:
            raise ValueError(f"gpus must be positive, got {self.gpus}")

    def _complete_ct(self) -> None:
        """Check consistency training's options and fill in how its number of noise levels grows, which a longer duration then does not change."""
        if self.scale_mode not in ("fixed", *CURRICULA):
            raise ValueError(f"scale_mode must be one of fixed, {', '.join(CURRICULA)}, got {self.scale_mode!r}")
        if self.target_ema_mode not in ("fixed", "adaptive"):
            raise ValueError(f"target_ema_mode must be fixed or adaptive, got {self.target_ema_mode!r}")
        if self.target_ema_mode == "adaptive" and self.start_ema == 0:
            raise ValueError("start_ema must be above 0 with target_ema_mode adaptive, got 0")
        scales = {"start_scales": 40, "end_scales": None, "total_training_steps": None}
        if self.scale_mode != "fixed":
            curriculum = CURRICULA[self.scale_mode]
            scales = {"start_scales": curriculum.start_scales, "end_scales": curriculum.end_scales, "total_training_steps": self.total_steps}
        for name, default in scales.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
            elif default is None:
                raise ValueError(f"{name} is for scale_mode {', '.join(CURRICULA)}, got scale_mode fixed")

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
