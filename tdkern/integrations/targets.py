"""A target network that goes where an optimizer goes, for the loops that people already have."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ema import EMA, target_decay, update
from ..optim import AdamEMA
from ..preconditioning import unwrapped

RATE = 0.999  # of the target network, the paper's


def paper_decay(step: int) -> float:
    """The paper's target network: `target_decay` to 0.999."""
    return target_decay(RATE, step)


def attach_target(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    decay: float | Callable[[int], float] = paper_decay,
    target: EMA | None = None,
    name: str = "target",
) -> EMA:
    """A target network that follows `net` at each step of an optimizer and is saved with it.

    A loop needs no line for its update, and none for saving it: behind every `optimizer.step()`
    that is made (GradScaler and accumulation leave some out) the target takes `net` in. Where the
    optimizer itself leaves a step out, as `AdamEMA` does, and torch's fused ones under GradScaler,
    the target stays, and nothing waits for the device. `optimizer.state_dict()` holds it, with its
    count of steps, for `load_state_dict`. A state without it, of a run that had no target, warns,
    and the target begins as a copy of `net`. torch.distributed.checkpoint's
    `get_optimizer_state_dict` leaves such entries out: save the target's own `state_dict()` there.
    An optimizer's copies and pickles leave the target behind.

    Args:
        net: the network, as it is or inside DistributedDataParallel, `torch.compile` or what
            Accelerate prepared, on its device.
        optimizer: of `net`'s parameters, torch's or what Accelerate or Lightning made of it.
        decay: of an update, in [0, 1], a number or by the count of updates so far.
        target: the EMA to use. None: a copy of `net` is made. Under `fully_shard` it must be made
            before `net` is sharded, then both alike.
        name: it is "tdkern_" and this in the optimizer's state; another for each average.

    Returns:
        The target: `loss_fn(net, target, images)`.

    Raises:
        ValueError: the optimizer has a target of this name: its state would hold one of the two.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's and Lightning's own
    if name in attached_to(optimizer):
        raise ValueError(
            "attach_target: name must be another for each average of an optimizer, which has a "
            f"target {name!r} already"
        )
    target = EMA(unwrapped(net)) if target is None else target
    attached_to(optimizer)[name] = target
    Follower(net, target, decay, f"tdkern_{name}").follow(optimizer)
    return target


def attached_to(optimizer: torch.optim.Optimizer) -> dict[str, EMA]:
    """The targets that follow an optimizer, by their names; its copies and pickles have none."""
    return vars(optimizer).setdefault("tdkern_targets", {})


class Follower:
    """What moves a target, and what its state is under `key`. `step`: the updates so far."""

    def __init__(
        self, net: nn.Module, target: EMA, decay: float | Callable[[int], float], key: str
    ):
        self.net = net
        self.target = target
        self.decay = decay
        self.key = key
        self.step = 0
        self._loaded: dict | None = None  # of a state that the optimizer has not taken yet
        self._skipped: Tensor | None = None  # AdamEMA's count, as it was before the step

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Be called with each step of an optimizer, and be part of its state."""
        optimizer.register_step_pre_hook(lambda *_: self._before(optimizer))
        optimizer.register_step_post_hook(lambda *_: self.update(self._left_out(optimizer)))
        optimizer.register_state_dict_post_hook(self._into_optimizer)
        optimizer.register_load_state_dict_pre_hook(self._taken_out)
        optimizer.register_load_state_dict_post_hook(lambda _: self._put_in())

    def update(self, left_out: Tensor | None = None) -> None:
        """Take the network in, by the decay of this update.

        Args:
            left_out: whether the target stays as it is, a bool scalar, which nothing waits for.
        """
        decay = self.decay(self.step) if callable(self.decay) else self.decay
        if left_out is None:
            self.target.update(self.net, decay)
        else:
            decays = left_out.double().clamp(min=decay)  # 1 keeps what is there
            update([self.target], self.net, decays.reshape(1))
        self.step += 1

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, AdamEMA):
            self._skipped = optimizer.skipped.clone()

    def _left_out(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Whether the step that was just called left the weights alone; None where it never
        does.
        """
        if isinstance(optimizer, AdamEMA):
            assert self._skipped is not None
            return optimizer.skipped != self._skipped.to(optimizer.skipped.device)
        found = getattr(optimizer, "found_inf", None)  # GradScaler's, for a fused optimizer
        return None if found is None else found != 0

    def state_dict(self) -> dict:
        """The target's tensors, and its count of updates."""
        return {"step": self.step, "module": self.target.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state; raises what `Module.load_state_dict` does."""
        self.target.module.load_state_dict(state["module"])
        self.step = int(state["step"])

    def _into_optimizer(self, _: torch.optim.Optimizer, state: dict) -> dict:
        return {**state, self.key: self.state_dict()}

    def _taken_out(self, _: torch.optim.Optimizer, state: dict) -> dict:
        state = dict(state)
        self._loaded = state.pop(self.key, None)
        if self._loaded is not None:  # raises here, before anything has been replaced
            copy.deepcopy(self.target.module).load_state_dict(self._loaded["module"])
        return state

    def _put_in(self) -> None:
        """After the optimizer has taken its part: one that refuses it leaves the target alone."""
        own, self._loaded = self._loaded, None
        if own is None:
            warnings.warn(
                f"attach_target: the optimizer's state has no {self.key}, so it begins as a copy "
                "of the network as it is now",
                stacklevel=2,
            )
            self.target.update(self.net, 0.0)
            self.step = 0
        else:
            self.load_state_dict(own)
