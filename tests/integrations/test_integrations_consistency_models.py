"""The loop of consistency models: its U-Net's signature, its call of the loss, its target."""

import copy

import pytest
import torch

from helpers.examples import example, lines_changed, same_tensors
from tdkern.integrations.consistency_models import Diffusion
from tdkern.losses import CTLoss, TDCTLoss
from tdkern.networks import CTPrecond
from tdkern.samplers import onestep


def test_the_example_runs():
    torch.manual_seed(0)
    model, target = example("consistency_models_loop").train()
    assert not same_tensors(model, target) and target.training
    assert lines_changed("consistency_models_loop") == 2


@pytest.mark.parametrize("td", [True, False])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_losses_are_those_of_the_family(td, norm):
    """With class indices by the U-Net's own name, and at the scales of the step."""
    torch.manual_seed(0)
    model = example("consistency_models_loop").UNetModel().eval()
    target = copy.deepcopy(model)
    torch.nn.init.normal_(target.time.weight)
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    diffusion = Diffusion(td, loss_norm=norm, weight_schedule="karras")
    family = TDCTLoss if td else CTLoss
    for scales in (6, 9):
        torch.manual_seed(1)
        got = diffusion.consistency_losses(
            model, x, scales, target_model=target, model_kwargs={"y": y}
        )
        torch.manual_seed(1)
        loss = family(scales, base_norm=norm, base_weight="karras")
        expected = loss(CTPrecond(model), CTPrecond(target), x, y)
        assert list(got) == ["loss"] and torch.equal(got["loss"], expected)
    # where its curricula begin, there is no room for a TD term
    first = diffusion.consistency_losses(model, x, 2, target_model=target)["loss"]
    assert first.shape == (4,) and first.isfinite().all()
    got["loss"].mean().backward()
    assert model.label.weight.grad.abs().sum() > 0 and target.label.weight.grad is None


def test_dropout_is_shared_as_in_that_loop():
    """With one network as both, at the last scales, the loss is no mask noise."""
    torch.manual_seed(0)
    model = example("consistency_models_loop").UNetModel().train()
    model.after[1].p = 0.3
    x = torch.rand(8, 3, 8, 8)
    diffusion = Diffusion(False, loss_norm="l2", weight_schedule="uniform")
    shared = diffusion.consistency_losses(model, x, 1000, target_model=model)["loss"].mean()
    model.eval()
    without = diffusion.consistency_losses(model, x, 1000, target_model=model)["loss"].mean()
    assert shared < 10 * without


def test_its_samplers_take_the_denoiser():
    model = example("consistency_models_loop").UNetModel().eval()
    denoiser = Diffusion(loss_norm="l2").denoiser(model)
    x = onestep(denoiser, torch.randn(2, 3, 8, 8) * 80, [80.0, 0.0])
    assert x.shape == (2, 3, 8, 8)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="Diffusion: loss_norm must be one of l1, l2, lpips, got"):
        Diffusion(loss_norm="huber")
    with pytest.raises(ValueError, match="target_net must be a network, got None"):
        Diffusion(loss_norm="l2").consistency_losses(
            example("consistency_models_loop").UNetModel(), torch.rand(2, 3, 8, 8), 8
        )
