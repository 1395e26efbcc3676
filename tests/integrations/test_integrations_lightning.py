"""Lightning's Trainer: the callback, resuming, mixed precision, accumulation, clipping."""

import pytest
import torch

from helpers.examples import example, lines_changed, same_tensors
from tdkern.ema import EMA, target_decay

pytestmark = [
    pytest.mark.usefixtures("torchvision_operators"),
    pytest.mark.filterwarnings("ignore"),  # of Lightning about its own
]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("ERROR", logger="lightning.pytorch")


def test_a_resumed_fit_goes_on_with_the_same_target(tmp_path):
    loop = example("lightning_loop")
    torch.manual_seed(0)
    system, trainer = loop.train(tmp_path)
    assert trainer.global_step == 4
    assert not any(name.startswith(("target", "averages")) for name in system.state_dict())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["optimizer_states"][0]
    assert state["tdkern_target"]["step"] == state["tdkern_ema"]["step"] == 4

    resumed, _ = loop.train(tmp_path, resume=checkpoint)  # trains no step more
    assert same_tensors(resumed.target, system.target)
    assert same_tensors(resumed.averages["ema"], system.averages["ema"])
    assert not same_tensors(resumed.target.module, resumed.net)
    assert not same_tensors(resumed.averages["ema"].module, resumed.target.module)


def test_lines_changed():
    assert lines_changed("lightning_loop") == 4


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_the_target_moves_with_each_step_of_the_optimizer(tmp_path, precision):
    """Not with each batch, where gradients are accumulated; with clipping by norm."""
    from tdkern.integrations.lightning import TDCallback

    loop = example("lightning_loop")
    by_hand, made = [], []

    class Watch(TDCallback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if not by_hand:
                by_hand.append(EMA(pl_module.net))

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step > len(made):
                by_hand[0].update(pl_module.net, target_decay(0.999, len(made)))
                made.append(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "TDCallback", Watch)
        system, trainer = loop.train(
            tmp_path,
            precision=precision,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            enable_checkpointing=False,
        )
    assert trainer.global_step == len(made) == 2
    assert same_tensors(system.target, by_hand[0])


def test_a_second_fit_with_the_same_optimizer_goes_on_with_what_follows_it(tmp_path):
    import lightning

    from tdkern.integrations.lightning import TDCallback

    loop = example("lightning_loop")

    class System(loop.System):
        def __init__(self):
            super().__init__()
            self.optimizer = super().configure_optimizers()

        def configure_optimizers(self):
            return self.optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "System", System)
        system, trainer = loop.train(tmp_path, enable_checkpointing=False)
    target, loader = system.target, trainer.train_dataloader
    again = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[TDCallback(averages={"ema": 0.999})],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    again.fit(system, loader)
    state = system.optimizer.state_dict()
    assert system.target is target and state["tdkern_target"]["step"] == 6
    with pytest.raises(ValueError, match="averages must have other names than"):
        TDCallback(averages={"target": 0.9})
