"""What is minimised: the loss that a run's options describe, and how its target network follows."""
from torch import Tensor

from .. import ema
from ..losses import CTLoss, DDPMLoss, EDMLoss, FlowLoss, Loss, TDCTLoss, TDDDPMLoss, TDEDMLoss, TDFlowLoss, TDVELoss, TDVPLoss, VELoss, VPLoss
from ..losses.ct import lpips
from .options import CURRICULA, Options

SIGMA_DATA = 0.5


def make_loss(options: Options) -> Loss:
    """The loss that the options describe."""
    td = {"weight": options.td_weight, "td_share": options.td_share}
    index = {"steps": options.steps, "k_idx": options.k_idx, "one_idx": options.one_idx}
    if options.precond == "edm":
        if options.loss_type == "edm":
            return EDMLoss(sigma_data=SIGMA_DATA)
        return TDEDMLoss(sigma_data=SIGMA_DATA, lambda_base=options.lambda_edm, coupling=options.td_coupling,
                         td_sigma=options.td_sigma and tuple(options.td_sigma), **index, **td)
    if options.precond == "ct":
        return _ct_loss(options)
    td |= {"lambda_base": options.lambda_edm, "coupling": options.td_coupling, "eta": options.td_eta}
    if options.precond in ("ddpm", "iddpm"):  # iDDPMPrecond knows the levels of 1000 cosine times
        times = {"beta_schedule": "cosine"}
        if options.precond == "ddpm":
            times = {"T": options.diffusion_steps, "beta_schedule": options.noise_schedule, "prediction": options.prediction}
        if options.loss_type == "edm":
            return DDPMLoss(**times)
        return TDDDPMLoss(k=int(options.k_idx) if options.k_idx % 1 == 0 else options.k_idx, **times, **td)
    alone, with_td = {"vp": (VPLoss, TDVPLoss), "ve": (VELoss, TDVELoss), "flow": (FlowLoss, TDFlowLoss)}[options.precond]
    return alone() if options.loss_type == "edm" else with_td(**index, **td)


def _ct_loss(options: Options) -> CTLoss:
    scales = options.start_scales
    if options.scale_mode != "fixed":
        scales = CURRICULA[options.scale_mode](options.start_scales, options.end_scales, options.total_training_steps)
    ct = {"num_scales": scales, "sigma_data": SIGMA_DATA, "base_norm": options.loss_norm, "base_weight": options.weight_schedule,
          "lognormal": options.lognormal and tuple(options.lognormal)}
    if options.loss_norm == "lpips":
        lpips()  # it is missing, or fetched, before the first step
    if options.loss_type == "edm":
        return CTLoss(**ct)
    return TDCTLoss(**ct, lambda_base=options.lambda_edm, one_idx=options.one_idx, weight=options.td_weight, coupling=options.td_coupling)


def target_decay(options: Options, loss: Loss, step: int, updates: int | Tensor) -> float | Tensor:
    """Decay of the target network in a step, from 0, whose loss this is, after so many updates: steps less those that were skipped."""
    if options.precond == "ct":
        adaptive = options.target_ema_mode == "adaptive"
        return ema.consistency_decay(options.start_ema, options.start_scales, loss.num_scales) if adaptive else options.start_ema
    return ema.copy_decay(options.target_copy, updates) if options.target_copy else ema.target_decay(options.target_ema_tau, step)
