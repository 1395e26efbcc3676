"""Consistency training, alone and with a temporal-difference term."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.special import ndtr, ndtri

from .._cache import tensor_cache
from ..columns import SCALE, SCALE_P, SIGMA, SIGMA_P, SKIP, SKIP_P, W_BASE
from ..fields import NOT_NEGATIVE, flag, short
from ..ops import td_coef, td_loss
from ..ops._modes import can_check_values
from ..ops.td_coef import WEIGHTS
from ..preconditioning import CT, Preconditioning
from ..preconditioning import EDM as EDMPreconditioning
from ..schedules import EDM, ETA, eta_of
from .base import (
    ALL_BASE_WEIGHTS,
    NO_TD,
    OWN,
    Loss,
    TDBatch,
    base_weight_flag,
    lambda_base_flag,
    per_sample,
)
from .conditions import Conditions
from .curricula import Easy, Mapping
from .masks import drawing_from, in_mode_of, random_state

BASE_NORMS = ("l2", "l1", "huber", "lpips")
LEAST_C = 1e-12  # of "huber" with c = 0: the norm has no slope at 0
LEAST_LEVEL = 1e-12  # that a network is asked about where t' = 0


@dataclass(frozen=True)
class CTLoss(Loss):
    """Consistency training (arXiv 2303.01469, algorithm 3), per sample.

    With i an integer index of EDM's schedule of `num_scales` levels, t = sigma(i), t' = sigma(i+1),
    and one noise n for both states,

    loss = w(t) ||D(x0 + t n, t) - D'(x0 + t' n, t')||,  0 <= i <= num_scales - 2,

    D' the target network without gradient. The norm is a mean over elements, as in that paper:
    "l2" mean(d^2), "l1" mean(|d|), "lpips" LPIPS. "huber" is improved consistency training's
    (arXiv 2310.14189, table 1) divided by the number of elements n, (sqrt(||d||_2^2 + c^2) - c)/n.
    The driver multiplies every loss by n for EDM's gradient scale: "huber" then has iCT's numbers,
    the others n times those of consistency training.

    w(t) is, by name: "uniform" 1, "snr" t^-2, "snr+1", "karras" t^-2 + sigma_data^-2,
    "truncated-snr" max(t^-2, 1), iCT's "inverse-step" 1/(t - t'), or one of
    `weighting.NAMED_WEIGHTS`; or what a callable of t [B] gives.

    iCT is `CTLoss(Exponential(total_steps=K), base_norm="huber", base_weight="inverse-step",
    lognormal=(-1.1, 2.0))` with `net` itself as the target network.

    Easy consistency tuning (arXiv 2406.14548) is `CTLoss(Easy(total_steps=K'), base_norm="huber",
    huber_c=0.0, base_weight="inverse-step", lognormal=(-1.1, 2.0))` on a network with EDM's
    preconditioning and weights, `net` itself being the target network. t is any level, log-normal,
    t' = `Mapping`(t), and D(x, 0) = x, which EDM's preconditioning has, is the boundary.

    Where the networks have dropout, both calls have the same masks, as in the published codes: the
    target network runs in the mode that `net` is in, training or not, and draws from the same state
    of torch's global generators, of the CPU and of x's device. This holds under activation
    checkpointing and for networks that are compiled alike. `torch.compile` of the loss itself
    breaks its graph there, so that `fullgraph=True` needs a dropout of 0; a CUDA graph's capture
    needs it too, and says so, but for that of `tdkern train --cuda-graph`.

    `loss(net, target_net, images, labels=None, augment_pipe=None) -> [B]`; `pair` and `evaluate`
    are its two halves. The fused path needs `networks.CTPrecond` with the same sigma_data and
    sigma_min, or with a `Mapping` `networks.EDMPrecond`; the target network runs once in each step,
    on every sample.

    Args:
        num_scales: number of noise levels, >= 2, or a `Mapping`, or a curriculum: a callable step
            -> one of these, such as those of `losses.curricula`. This object never changes:
            `loss.at(step)` is the loss of a step.
        sigma_data, sigma_min, sigma_max, rho: of the data and of the schedule. A `Mapping` has
            sigma_data alone.
        backend: which backend the ops use, as in `td_loss`.

    The other arguments are described where they are declared.

    Raises:
        ValueError: an argument is out of its range.

    Gradient to `net`'s parameters. The draws come from torch's global generator: the index, then
    the seed of the noise.
    """

    num_scales: int | Mapping | Callable[[int], int | Mapping] = 40
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    base_norm: str = flag(
        "l2",
        "Distance of the two denoised images; huber is improved consistency training's, lpips "
        "needs `pip install tdkern[lpips]` and images [B, 3, H, W] in [-1, 1].",
        choices=BASE_NORMS,
    )
    base_weight: str | Callable = base_weight_flag(  # noqa: RUF009  (its default is a name)
        "uniform", kw_only=False
    )
    huber_c: float | None = flag(
        None,
        "c of huber, >= 0; 0 is easy consistency tuning's, the norm itself.",
        within=NOT_NEGATIVE,
        default_help="0.00054 times the root of an image's elements",
        kw_only=True,
    )
    lognormal: tuple[float, float] | None = flag(
        None,
        "(P_mean, P_std): noise levels as a log-normal t falls between them; -1.1,2 is improved "
        "consistency training's.",
        metavar="MEAN,STD",
        default_help="drawn evenly",
        kw_only=True,
    )

    target_for_td_alone = False
    base_weights = tuple(name for name in ALL_BASE_WEIGHTS if name != OWN)

    def __post_init__(self):
        name = type(self).__name__
        self._check_base_weight()
        if self.base_norm not in BASE_NORMS:
            known = ", ".join(BASE_NORMS)
            raise ValueError(
                f"{name}: base_norm must be one of {known}, got {short(self.base_norm)}"
            )
        if self.lognormal is not None and not self.lognormal[1] > 0:
            raise ValueError(
                f"{name}: lognormal must be (P_mean, P_std) with P_std > 0, got "
                f"{short(self.lognormal)}"
            )
        number: object = self.num_scales
        if isinstance(number, float):
            if number % 1:
                raise ValueError(f"{name}: num_scales must be a whole number, got {number}")
            object.__setattr__(self, "num_scales", int(number))
        # these two ops check the others
        steps = {"steps": 2} if callable(self.num_scales) else {}
        empty = torch.zeros(0, 8, dtype=torch.float32, device="cpu")
        td_coef(empty[:, 0], **self._coef_args() | steps, backend="reference")
        td_loss(empty, empty, empty, empty, **self._norm, backend="reference")
        if self.continuous and self.lognormal is None:
            raise ValueError(
                f"{name}: lognormal must be given with a Mapping, which has no levels to draw "
                "evenly, got None"
            )
        if self.lognormal is not None:
            low, high = self._lognormal_range
            if not low < high:
                raise ValueError(
                    f"{name}: lognormal must have levels between sigma_min and sigma_max, "
                    f"got {self.lognormal}"
                )

    @property
    def continuous(self) -> bool:
        """Whether t is any level, and t' its `Mapping`'s, at every step."""
        return isinstance(self.num_scales, Mapping | Easy)

    @property
    def preconditioning(self) -> Preconditioning:
        if self.continuous:
            return EDMPreconditioning(self.sigma_data)
        return CT(self.sigma_data, self.sigma_min)

    @property
    def scales(self) -> float:
        """How fine the noise levels are: their number, or a `Mapping`'s ratio."""
        return self.num_scales.ratio if isinstance(self.num_scales, Mapping) else self._count

    @property
    def _count(self) -> int:
        """`num_scales` where it is a number."""
        return cast("int", self.num_scales)

    def _coef_args(self) -> dict:
        return {
            "steps": self.num_scales,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "rho": self.rho,
            "sigma_data": self.sigma_data,
            "from_index": True,
            "precond": "ct",
            "base_weight": "uniform",  # `_weigh` multiplies by it
            "lambda_base": 0.0,
            "td_sigma": NO_TD,
        }

    @property
    def _norm(self) -> dict:
        base_norm = "l2" if self.base_norm == "lpips" else self.base_norm
        huber_c = self.huber_c
        if huber_c is not None and base_norm == "huber" and huber_c >= 0:
            huber_c = max(huber_c, LEAST_C)
        return {"base_norm": base_norm, "huber_c": huber_c}

    def prepare(self, image_shape: tuple[int, ...]) -> None:
        if self.base_norm == "lpips":
            if image_shape[0] != 3:
                raise ValueError(
                    f"base_norm lpips needs images of 3 channels, got {image_shape[0]}"
                )
            lpips()

    def at(self, step: int) -> "CTLoss":
        """The loss of a training step, from 0: this one with the curriculum's number of scales."""
        if not callable(self.num_scales) or isinstance(self.num_scales, Mapping):
            return self
        return self._with(num_scales=self.num_scales(step))

    def pair(
        self,
        images: Tensor,
        *,
        index: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> TDBatch:
        """x_t = x0 + t noise and x_t' = x0 + t' noise.

        Args:
            images: [B, ...] float32 or float64, clean data.
            index: [B] int64, in 0 .. num_scales - 2, checked on the CPU alone; drawn if None.
            t: [B] > 0, in place of an index where `num_scales` is a `Mapping`; drawn if None.
            noise: as `images`, unit noise; drawn if None.

        Raises:
            ValueError: a wrong shape, dtype or index, or `num_scales` is a curriculum: take the
                pair of `loss.at(step)`.
        """
        self._check_images(images)
        name = type(self).__name__
        mapped = isinstance(self.num_scales, Mapping)
        if callable(self.num_scales) and not mapped:
            raise ValueError(
                f"{name}: num_scales must be a number, got a curriculum: use loss.at(step)"
            )
        if (index if mapped else t) is not None:
            argument, other = ("index", "t") if mapped else ("t", "index")
            raise ValueError(f"{name}: {argument} must be None here, where there is {other}")
        coef, levels = self._mapped(t, images) if mapped else self._indexed(index, images)
        x_t, x_tp = self._noisy_pair(
            images, levels[:, SIGMA], levels[:, SIGMA_P], "shared", noise, None
        )
        if mapped:
            levels = levels.clamp(min=LEAST_LEVEL)
        return TDBatch(images, x_t, x_tp, coef, levels)

    def _indexed(self, index: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """coef and levels at neighbours of the schedule."""
        name = type(self).__name__
        if index is None:
            index = self._draw_index(images)
        self._check_shape("index", index, images.shape[:1])
        last = self._count - 2
        if can_check_values(index) and not ((index >= 0) & (index <= last)).all():
            found = f"{index.min().item()} to {index.max().item()}"
            raise ValueError(f"{name}: index must be from 0 to {last}, got values from {found}")
        coef, levels = td_coef(index, **self._coef_args(), backend=self.backend)
        return self._weigh(coef, levels), levels

    def _mapped(self, t: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """coef and levels at t and the t' that the mapping has for it."""
        mapping = cast("Mapping", self.num_scales)
        if t is None:
            mean, std = cast("tuple", self.lognormal)
            normal = self._draw(
                images, lambda n: torch.randn(n, dtype=torch.float64, device=images.device)
            )
            t = (mean + std * normal).exp()
        self._check_shape("t", t, images.shape[:1])
        t = t.double()
        t_p = mapping(t)
        skip, scale = self.preconditioning.skip_scale(torch.stack([t, t_p]))
        zero = torch.zeros_like(t)
        columns = [skip[0], scale[0], skip[1], scale[1], zero, zero, zero, torch.ones_like(t)]
        levels = torch.stack([t, t, t_p, t_p], 1)
        return self._weigh(torch.stack(columns, 1), levels), levels

    def _weigh(self, coef: Tensor, levels: Tensor) -> Tensor:
        """`coef` with w(t) in its last column."""
        sigma = levels[:, SIGMA]
        if self.base_weight == "inverse-step":
            coef[:, W_BASE] /= sigma - levels[:, SIGMA_P]
        elif self.base_weight != "uniform":
            coef[:, W_BASE] *= self._base_weight(sigma, coef[:, SCALE])
        return coef

    def _draw_index(self, images: Tensor) -> Tensor:
        count = self._count
        if self.lognormal is None:
            return self._draw(
                images, lambda n: torch.randint(count - 1, (n,), device=images.device)
            )
        mean, std = self.lognormal
        low, high = self._lognormal_range
        uniform = self._draw(
            images, lambda n: torch.rand(n, dtype=torch.float64, device=images.device)
        )
        sigma = (mean + std * ndtri(low + (high - low) * uniform)).exp()
        index = EDM(count, self.sigma_min, self.sigma_max, self.rho).index(sigma)
        return index.long().clamp(max=count - 2)

    @cached_property  # its numbers are read by the host, which a step is not to do
    def _lognormal_range(self) -> list[float]:
        """The distribution function of `lognormal` at sigma_min and sigma_max."""
        mean, std = cast("tuple", self.lognormal)
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64, device="cpu")
        return ndtr((ends.log() - mean) / std).tolist()

    def _outputs(
        self, net, target_net, batch: TDBatch, conditions: Conditions, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        device = batch.x_t.device
        states = random_state(net, device)
        online = self._predict("net", net, batch.x_t, batch.levels[:, SIGMA], conditions)
        with in_mode_of(net, target_net), drawing_from(states, device):
            target = self._predict_target(target_net, batch, conditions, chosen)
        return *online, *target

    def _terms(
        self,
        out: Tensor,
        out_target: Tensor,
        x0: Tensor,
        coef: Tensor,
        x_t: Tensor | None,
        x_tp: Tensor | None,
    ) -> Tensor:
        weight = coef[:, W_BASE].clone()
        if self.base_norm == "lpips":
            coef[:, W_BASE] = 0  # the op gives the TD term alone
        terms = td_loss(
            out,
            out_target,
            x0,
            coef,
            x_t,
            x_tp,
            base="consistency",
            **self._norm,
            backend=self.backend,
        )
        if self.base_norm != "lpips":
            return terms
        D = _denoised(out, x_t, coef[:, SKIP], coef[:, SCALE])
        D_p = _denoised(out_target, x_tp, coef[:, SKIP_P], coef[:, SCALE_P])
        return torch.stack([terms[:, 0], weight.to(terms.dtype) * lpips()(D, D_p)], 1)


def _denoised(F: Tensor, x: Tensor | None, skip: Tensor, scale: Tensor) -> Tensor:
    """D = skip x + scale F, where x is None for skip = 0."""
    D = per_sample(scale, F) * F
    return D if x is None else D + per_sample(skip, F) * x


@dataclass(frozen=True)
class TDCTLoss(CTLoss):
    """Consistency training with a temporal-difference term (arXiv 2606.15048).

    With tau = sigma(i + one_idx) and tau' = sigma(i + 1 + one_idx),
    delta = A (x0 - D(x_t, t)) - A' (x0 - D'(x_t', t')),  A = 1 - kappa from `two_moment`,
    loss = w_td mean(delta^2) + lambda_base CT's loss, or (1 + lambda_base) CT's loss where the pair
    leaves the schedule, i + 1 + one_idx > num_scales - 1.

    As CT needs, the states share their noise, so that TD's target of D, x0 - r (x0 - D') with
    r = A'/A, is biased off the exact denoiser: for Gaussian data of standard deviation sigma_data
    its slope in x_t is off by +13, +22, +26 and +25 % at t = .5, 1, 2 and 4 with the other
    defaults, the share r t' (t - t') / (sigma_data^2 + t'^2). But CT's optimum is not the denoiser:
    it is where the ODE from x_t ends, and from that function's slope,
    sigma_data / sqrt(sigma_data^2 + t^2), the target of TD is off by 0, +1, +2 and +3 %; less with
    more scales.

    The coupling is of the means: "markov" is kappa = (tau/t)^2, as the published code has it,
    "shared" tau/t. The other arguments are `CTLoss`'s, or described where they are declared. TD
    costs no further forward: D' at (x_t', t') is CT's.
    """

    lambda_base: float = lambda_base_flag()
    one_idx: float = flag(0.25, "Distance from t to tau, in steps, > 0.")
    weight: str = flag("pairwise_x0", "Weight of the TD term.", choices=WEIGHTS)
    coupling: str = flag("markov", "Noise of the pair; shared noise is biased.", choices=ETA)

    def __post_init__(self):
        self._check_lambda_base()
        eta_of(self.coupling)
        super().__post_init__()
        if self.continuous:
            raise ValueError(
                "TDCTLoss: num_scales must be a number of noise levels, or a curriculum of them; "
                f"a TD term has no index on a {type(self.num_scales).__name__}"
            )
        if not callable(self.num_scales) and not 1 + self.one_idx <= self.num_scales - 1:
            raise ValueError(
                "TDCTLoss: some sample must have a TD term, and with these settings none can: "
                f"1 + one_idx = {1 + self.one_idx:g} of num_scales - 1 = {self.num_scales - 1:g}"
            )

    def _coef_args(self) -> dict:
        return super()._coef_args() | {
            "lambda_base": self.lambda_base,
            "td_sigma": None,
            "one_idx": self.one_idx,
            "weight": self.weight,
            "coupling": self.coupling,
        }


@tensor_cache()
def lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS of images in [-1, 1], [B, 3, H, W], as consistency models were trained.

    (arXiv 2303.01469.) Images below 256 pixels are first scaled up to 224.
    """
    try:
        from piq import LPIPS
    except ImportError as error:
        raise ImportError(
            "CTLoss: base_norm 'lpips' needs piq and torchvision: `pip install tdkern[lpips]`"
        ) from error
    distance = LPIPS(replace_pooling=True, reduction="none")  # fetches VGG16's weights, once

    def prepared(image: Tensor) -> Tensor:
        if image.shape[-1] < 256:
            image = interpolate(image, size=224, mode="bilinear")
        return image / 2 + 0.5

    def measured(D: Tensor, D_p: Tensor) -> Tensor:
        # moved once: piq copies them from where they are in every call
        distance.mean, distance.std = distance.mean.to(D.device), distance.std.to(D.device)
        distance.weights = [each.to(D.device) for each in distance.weights]
        return distance(prepared(D), prepared(D_p))

    return measured
