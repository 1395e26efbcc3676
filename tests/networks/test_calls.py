"""Other people's models in every wrapper: how each is called, and what its answer may be."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tdkern.ema import EMA
from tdkern.losses import CTLoss, DDPMLoss, EDMLoss, FlowLoss, TDDDPMLoss, TDEDMLoss
from tdkern.networks import (
    MLP,
    CTPrecond,
    Denoiser,
    EDMPrecond,
    SongUNet,
    VEPrecond,
    VPPrecond,
    iDDPMPrecond,
)
from tdkern.networks.precond import index_argument
from tdkern.schedules import DDPM

WRAPPERS = {
    "edm": EDMPrecond,
    "ct": CTPrecond,
    "vp": VPPrecond,
    "ve": VEPrecond,
    "iddpm": iDDPMPrecond,
    "eps": lambda model: Denoiser(model, "eps", alphas_cumprod=DDPM().alphas_cumprod),
    "flow": lambda model: Denoiser(model, "velocity"),
}
LOSSES = {
    "edm": TDEDMLoss(),
    "ct": CTLoss(),
    "vp": EDMLoss(),
    "ve": EDMLoss(),
    "iddpm": DDPMLoss(beta_schedule="cosine"),
    "eps": TDDDPMLoss(),
    "flow": FlowLoss(),
}


class Model(nn.Module):
    """Keeps what it was told; every other model here is one that is called in another way."""

    def __init__(self):
        super().__init__()
        self.scale, self.told = nn.Parameter(torch.ones(())), []

    def answer(self, x, **told):
        self.told.append({name: value for name, value in told.items() if value is not None})
        return torch.tanh(self.scale * x)


class OfConsistencyModels(Model):
    def forward(self, x, timesteps, y=None):
        return self.answer(x, y=y)


class OfDiT(Model):
    def forward(self, x, t, y):
        return self.answer(x, y=y)


class OfDiffusers(Model):
    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return {"sample": self.answer(sample, class_labels=class_labels)}


class OfText(Model):
    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        class_labels=None,
        attention_mask=None,
        return_dict=True,
    ):
        told = {"text": encoder_hidden_states, "mask": attention_mask, "class_labels": class_labels}
        return (self.answer(sample, **told),)


class Unconditional(Model):
    def forward(self, x, time, x_self_cond=None):
        return self.answer(x)


X = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([2, 0, 1])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("make", [OfConsistencyModels, OfDiT, OfDiffusers])
def test_classes_reach_a_model_as_indices_by_its_own_name(make, wrapper):
    model = make()
    net, loss = WRAPPERS[wrapper](model), LOSSES[wrapper]
    name = "class_labels" if make is OfDiffusers else "y"
    for labels in (CLASSES, torch.eye(4)[CLASSES]):
        net(X, 1.0, labels)
        assert torch.equal(model.told[-1][name], CLASSES)
        assert loss(net, EMA(net), X, labels).isfinite().all()
    if make is not OfDiT:
        assert net(X, 1.0, torch.zeros(3, 0)).shape == X.shape and model.told[-1] == {}
        assert loss(net, EMA(net), X).isfinite().all() and model.told[-1] == {}
    with pytest.raises(ValueError, match=f"{type(net).__name__}: augment_labels must be None"):
        net(X, 1.0, CLASSES, torch.zeros(3, 9))


def test_parameters_keep_their_names():
    assert set(CTPrecond(OfConsistencyModels()).state_dict()) == {"model.scale"}
    assert set(Denoiser(OfConsistencyModels(), "velocity").state_dict()) == {"model.module.scale"}


@pytest.mark.parametrize("wrapper", ["edm", "eps", "flow", "ct"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_text(wrapper, share):
    """Embeddings and masks of the losses reach the model, split with its samples."""
    model, target = OfText(), OfText()
    net, other = WRAPPERS[wrapper](model), WRAPPERS[wrapper](target)
    loss = LOSSES[wrapper]
    if hasattr(loss, "lambda_base") and wrapper != "ct":
        loss = type(loss)(td_share=share)
    text = torch.arange(3.0)[:, None, None].expand(3, 7, 2)
    mask = torch.arange(3.0)[:, None]
    loss(net, other, X, CLASSES, encoder_hidden_states=text, attention_mask=mask)
    (told,) = model.told
    assert torch.equal(told["text"], text) and torch.equal(told["class_labels"], CLASSES)
    for told in target.told:
        rows = told["text"][:, 0, 0].long()
        assert torch.equal(told["mask"][:, 0].long(), rows)
        assert torch.equal(told["class_labels"], CLASSES[rows])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_labels_that_a_model_does_not_take_are_refused(wrapper):
    net = WRAPPERS[wrapper](Unconditional())
    assert net(X, 1.0).shape == X.shape
    with pytest.raises(ValueError, match=f"{type(net).__name__}: class_labels must be None, as"):
        net(X, 1.0, CLASSES)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (MLP(), None),
        (SongUNet(8, 3, 3, 2, model_channels=4, channel_mult=[1], num_blocks=1), None),
        (OfConsistencyModels(), "y"),
        (OfDiffusers(), "class_labels"),
        (OfText(), "class_labels"),
        (Unconditional(), ""),
        (torch.compile(OfConsistencyModels(), backend="eager"), "y"),
        (nn.DataParallel(OfConsistencyModels()), "y"),
        (lambda *args: args[0], None),
    ],
)
def test_how_a_model_is_called(model, name):
    assert index_argument(model) == name


def test_a_copy_is_called_alike():
    net = CTPrecond(OfConsistencyModels())
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), EMA(net).module):
        copied(X, 1.0, CLASSES)
        assert torch.equal(copied.model.told[-1]["y"], CLASSES)


def test_labels_inside_a_wrapper_of_torch():
    """The width of the labels is the U-Net's, also where something holds it."""
    unet = SongUNet(8, 3, 3, 4, model_channels=4, channel_mult=[1], num_blocks=1)
    net, x = EDMPrecond(unet).eval(), torch.randn(2, 3, 8, 8)
    expected = net(x, 1.0), net(x, 1.0, torch.tensor([1, 3]))
    net.model = torch.compile(unet, backend="eager")
    torch.testing.assert_close((net(x, 1.0), net(x, 1.0, torch.tensor([1, 3]))), expected)
    net.model = unet
    with pytest.raises(
        ValueError, match=r"^EDMPrecond: class_labels must be from 0 to 3, got 1 to 4"
    ):
        net(x, 1.0, torch.tensor([1, 4]))


@pytest.mark.parametrize("answer", [None, {}, (), {"logits": 3}])
def test_an_answer_without_a_tensor_is_refused(answer):
    class Odd(nn.Module):
        def forward(self, x, t):
            return answer

    for wrapper in (EDMPrecond, CTPrecond, lambda model: Denoiser(model, "velocity")):
        with pytest.raises(
            ValueError, match=r": the model must return a tensor, a tuple that begins"
        ):
            wrapper(Odd())(X, 1.0)
