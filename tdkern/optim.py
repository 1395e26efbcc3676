"""Optimizers on the fused ops."""
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .ops.adam_ema import adam_ema_, found_inf


class AdamEMA(torch.optim.Adam):
    """AdamW or Adam with averages of the parameters, one pass over memory a step (`tdkern.ops.adam_ema_`).

    A step whose gradients are not all finite changes nothing; it is counted in `skipped` (int64, on the device), and the host
    never waits for the answer. Learning-rate schedulers, parameter groups, GradScaler and hooks work as with torch.optim.Adam, whose
    `state_dict` this is: torch.optim.Adam and AdamW load it and the other way round. The averages are the caller's tensors and are
    saved with the networks they belong to; buffers are not averaged.

    Args:
        params: parameters or parameter groups, as of every optimizer; on one device.
        lr, betas, eps, weight_decay: as torch.optim.Adam's; lr may be a scalar tensor on the device, for CUDA graphs.
        decoupled: AdamW's weight decay, else Adam's.
        averages: K sequences of tensors in the order of the parameters, such as `ema.module.parameters()` of `tdkern.ema.EMA`s.
        decays: K floats in [0, 1], or a float tensor [K]. `self.decays` is a tensor: change its elements before a step.
        backend: as `adam_ema_`'s.

    Raises:
        ValueError: averages that do not match the parameters, or an option out of its range.
    """

    def __init__(self, params: Iterable, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, *,
                 decoupled: bool = True, averages: Sequence[Iterable[Tensor]] = (), decays: Sequence[float] | Tensor = (), backend: str = "auto"):
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=decoupled, fused=True)
        every = [param for group in self.param_groups for param in group["params"]]
        averages = [list(average) for average in averages]
        self.decays = decays if isinstance(decays, Tensor) else torch.tensor(decays, dtype=torch.float64)
        self.skipped = torch.zeros((), dtype=torch.int64, device=every[0].device)
        self.backend = backend
        if len(averages) != len(self.decays):
            raise ValueError(f"AdamEMA: decays must hold one decay for each of the {len(averages)} averages, got {len(self.decays)}")
        for k, average in enumerate(averages):
            if [avg.shape for avg in average] != [param.shape for param in every]:
                raise ValueError(f"AdamEMA: averages[{k}] must hold a tensor of the shape of each of the {len(every)} parameters, in their order")
        self._averages = {param: [average[i] for average in averages] for i, param in enumerate(every)}

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("AdamEMA: a state with amsgrad or maximize cannot be continued")
            group["fused"], group["foreach"] = True, None
            for param in group["params"]:
                if "step" in self.state[param]:
                    self.state[param]["step"] = self.state[param]["step"].to(param.device, torch.float32)

    @torch.no_grad()
    def step(self, closure=None, *, clip: Tensor | None = None):
        """One step; returns the closure's loss. clip: a factor of all gradients, a scalar tensor; `adam_ema_` says more."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # GradScaler's protocol
        if found is None:
            grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
            found = found_inf(grads, backend=self.backend) if grads else None
        skipped = self.skipped
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self._state(param) for param in params]
            averages = list(zip(*(self._averages_of(param) for param in params), strict=True))
            adam_ema_(params, [param.grad for param in params], *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
                      averages, self.decays, lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                      decoupled=group["decoupled_weight_decay"], grad_scale=grad_scale, clip=clip, found_inf=found, skipped=skipped, backend=self.backend)
            skipped = None  # counted once, not once a group
        return loss

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _averages_of(self, param: Tensor) -> list[Tensor]:
        if param not in self._averages:
            if len(self.decays) > 0:
                raise ValueError("AdamEMA: a parameter that was added later has no averages; make a new optimizer and load this one's state_dict")
            return []
        return self._averages[param]
