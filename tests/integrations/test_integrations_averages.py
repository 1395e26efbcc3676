"""Averages and optimizers in the loops of Lightning and Accelerate, with the real libraries."""

import copy
import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tdkern.ema import EMA, PowerFunctionEMA
from tdkern.losses import TDEDMLoss
from tdkern.networks import EDMPrecond, unet
from tdkern.optim import AdamEMA, RAdamEMA

KINDS = [torch.optim.Adam, AdamEMA, RAdamEMA]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def lightning(torchvision_operators):
    import lightning

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lightning


@pytest.fixture(scope="module")
def accelerate(torchvision_operators):
    import accelerate

    return accelerate


def network(seed=0):
    torch.manual_seed(seed)
    return EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1], dropout=0.0))


def images(count=8):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def equal(module, state):
    ours = module.state_dict()
    return ours.keys() == state.keys() and all(
        torch.equal(ours[name], state[name]) for name in ours
    )


# --- Lightning


@pytest.fixture(scope="module")
def system_class(lightning):
    class System(lightning.LightningModule):
        """The README's loop: the target and an average are the module's own."""

        def __init__(self, kind, seed=0):
            super().__init__()
            self.net, self.kind, self.loss = network(seed), kind, TDEDMLoss()
            self.target, self.power = EMA(self.net), PowerFunctionEMA(self.net)
            self.at_start = None

        def on_train_start(self):
            self.at_start = copy.deepcopy(self.state_dict())

        def training_step(self, batch, index):
            torch.manual_seed(self.global_step)
            return self.loss(self.net, self.target.module, batch[0]).mean()

        def configure_optimizers(self):
            if self.kind is torch.optim.Adam:
                return self.kind(self.parameters())  # of which the averages have no gradient
            averages = [self.target.module.parameters()]
            return self.kind(self.net.parameters(), averages=averages, decays=[0.5])

        def on_train_batch_end(self, *_):
            if self.kind is torch.optim.Adam:
                self.target.update(self.net, 0.5)
            else:
                self.target.copy_buffers(self.net)
            self.power.update(self.net, self.global_step)

    return System


def fit(lightning, system, folder, epochs, checkpoint=None, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(system, DataLoader(TensorDataset(images()), batch_size=4), ckpt_path=checkpoint)
    return trainer


@every_kind
@pytest.mark.filterwarnings("ignore")
def test_a_lightning_run_goes_on_with_its_target(tmp_path, lightning, system_class, kind):
    """In the bits of a run that did not stop."""
    straight, stopped, again = (system_class(kind, seed) for seed in (0, 0, 5))
    fit(lightning, straight, tmp_path, 2)
    fit(lightning, stopped, tmp_path, 1).save_checkpoint(tmp_path / "run.ckpt")
    fit(lightning, again, tmp_path, 2, checkpoint=tmp_path / "run.ckpt")
    assert equal(stopped, again.at_start) and stopped.power.step == 2
    assert equal(again, straight.state_dict()) and again.power.step == 4
    assert not equal(straight.target.module, straight.net.state_dict())
    assert not any(module.training for module in straight.target.modules())


@every_kind
@pytest.mark.filterwarnings("ignore")
def test_lightning_in_bfloat16_clips_for_every_optimizer(tmp_path, lightning, system_class, kind):
    """As for torch's Adam, in whose place they are put; one that takes GradScaler's scale itself is
    refused by Lightning, as torch's fused Adam is."""
    options = {"precision": "bf16-mixed", "gradient_clip_val": 1e-3}
    system = system_class(kind)
    before = copy.deepcopy(system.state_dict())
    fit(lightning, system, tmp_path, 1, **options)
    state = system.state_dict()
    moved = {name.partition(".")[0] for name in state if not torch.equal(state[name], before[name])}
    assert moved == {"net", "target", "power"}
    if kind is not torch.optim.Adam:
        with_scale = system_class(kind)
        with_scale.kind = lambda *args, **named: kind(*args, takes_grad_scale=True, **named)
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(lightning, with_scale, tmp_path, 1, **options)


# --- Accelerate


@every_kind
def test_accelerate_saves_and_loads_averages(tmp_path, accelerate, kind):
    def made(seed):
        net = network(seed)
        target, power = EMA(net), PowerFunctionEMA(net)
        if kind is torch.optim.Adam:
            optimizer = kind(net.parameters())
        else:
            averages = [target.module.parameters()]
            optimizer = kind(net.parameters(), averages=averages, decays=[1.0])
        accelerator = accelerate.Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(net, optimizer)
        accelerator.register_for_checkpointing(target, power)
        return accelerator, net, target, power, optimizer

    def train(run, steps):
        accelerator, net, target, power, optimizer = run
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            accelerator.backward(TDEDMLoss()(net, target.module, images()).mean())
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            if kind is not torch.optim.Adam:  # through the wrapper
                optimizer.param_groups[0]["decays"][0] = 0.5
            optimizer.step()
            if kind is torch.optim.Adam:
                target.update(net, 0.5)
            power.update(net, step)

    run = made(0)
    train(run, (1, 2))
    run[0].save_state(tmp_path / "state")
    again = made(5)
    again[0].load_state(tmp_path / "state")
    train(run, (3, 4))
    train(again, (3, 4))
    for module, other in zip(run[1:4], again[1:4], strict=True):
        assert equal(other, module.state_dict())
    assert not equal(run[2].module, run[1].state_dict())


def test_accelerate_prepares_an_average_as_a_module(accelerate):
    accelerator = accelerate.Accelerator(cpu=True)
    net = network()
    target = accelerator.prepare(EMA(net))
    x = images(2)
    assert torch.equal(target(x, torch.ones(2)), net.eval()(x, torch.ones(2)))
    assert isinstance(accelerator.unwrap_model(target), EMA)
