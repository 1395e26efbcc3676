"""Training loops over diffusers' models: its schedulers as denoisers and losses.

The models are diffusers' own: `UNet2DModel`, `UNet2DConditionModel` (`encoder_hidden_states` goes
to the loss by its name, as every condition does), `DiTTransformer2DModel`. Its `EMAModel` goes on
averaging the model beside the target network. diffusers itself is not imported here.
"""

from ..losses import DDPMLoss, FlowLoss, TDDDPMLoss, TDFlowLoss
from ..losses import Loss as AnyLoss
from ..networks import Denoiser
from ..schedules import FlowMatching, of_scheduler
from .targets import attach_target

__all__ = ["Denoiser", "Loss", "attach_target"]


class Loss:
    """The losses of what diffusers' schedulers describe."""

    @staticmethod
    def from_scheduler(scheduler, td: bool = True, **settings) -> AnyLoss:
        """The loss of a scheduler's path and prediction, that of `Denoiser.from_scheduler`.

        Without TD it is the mean square error of the model's own output at uniform timesteps, the
        loss of diffusers' training examples.

        Args:
            scheduler: as `schedules.of_scheduler` takes it.
            td: whether the loss has a TD term.
            settings: of `losses.TDDDPMLoss` or, for flow matching, `losses.TDFlowLoss`.

        Raises:
            ValueError: the scheduler is none of these.
        """
        prediction, path = of_scheduler(scheduler)
        if isinstance(path, FlowMatching):
            return (TDFlowLoss if td else FlowLoss)(**{"shift": path.shift, **settings})
        loss: type[DDPMLoss] = TDDDPMLoss if td else DDPMLoss
        return loss(T=path.T, prediction=prediction, beta_schedule=path.beta_schedule, **settings)
