"""diffusers: its training example, and denoisers and losses of its models and schedulers."""

import types

import pytest
import torch

from helpers.examples import example, lines_changed, same_tensors
from tdkern.ema import EMA
from tdkern.integrations.diffusers import Denoiser, Loss
from tdkern.losses import DDPMLoss, TDDDPMLoss, TDFlowLoss
from tdkern.schedules import FlowMatching, of_scheduler

pytestmark = pytest.mark.usefixtures("torchvision_operators")

# CogVideoX's shifts its levels behind its betas
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "CogVideoXDDIMScheduler")
SMALL = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}


def scheduler_of(name, **settings):
    import diffusers

    return getattr(diffusers, name)(**settings)


def models(kind):
    """A model of diffusers, and what a loss hands it beside the images, for a batch of 4."""
    import diffusers

    torch.manual_seed(0)
    if kind == "unconditional":
        return example("diffusers_loop").small_unet(), {}
    if kind == "classes":
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        model = diffusers.UNet2DModel(num_class_embeds=10, **blocks, **SMALL)
        return model, {"labels": torch.arange(4)}
    if kind == "text":
        model = diffusers.UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            **SMALL,
        )
        return model, {"encoder_hidden_states": torch.rand(4, 5, 8)}
    if kind == "transformer":  # forward(hidden_states, encoder_hidden_states, ..., timestep, ...)
        model = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_projection_dim=16,
            joint_attention_dim=8,
            pooled_projection_dim=8,
        )
        text = {"encoder_hidden_states": torch.rand(4, 5, 8)}
        return model, text | {"pooled_projections": torch.rand(4, 8)}
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=3,
        out_channels=6,  # with a learned variance
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )
    return model, {"labels": torch.arange(4)}


# --- the loop


def test_the_example_runs_and_resumes(tmp_path):
    loop = example("diffusers_loop")
    torch.manual_seed(0)
    model, average, target = loop.train(tmp_path)
    assert not same_tensors(target.module.model.module, model)
    _, _, resumed = loop.train(steps=0, resume=tmp_path)
    assert same_tensors(resumed.module, target.module)
    average.copy_to(model.parameters())  # diffusers' own average goes on beside the target
    assert lines_changed("diffusers_loop") == 5


@pytest.mark.parametrize("kind", ["unconditional", "classes", "text", "transformer", "dit"])
def test_models_and_their_conditions(kind):
    """Class indices, int64, and a text's embeddings reach both networks, also where the target
    network runs on a share of the batch.
    """
    model, conditions = models(kind)
    scheduler = scheduler_of("DDPMScheduler")
    if kind == "transformer":
        scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    net, x = Denoiser.from_scheduler(model, scheduler), torch.rand(4, 3, 8, 8)
    for share in (1.0, 0.5):
        loss = Loss.from_scheduler(scheduler, td_share=share)
        loss(net, EMA(net), x, **conditions).mean().backward()
    if not conditions:
        return
    with torch.no_grad():
        torch.manual_seed(1)
        told = loss(net, EMA(net), x, **conditions)
        other = {name: value.flip(0) for name, value in conditions.items()}
        torch.manual_seed(1)
        otherwise = loss(net, EMA(net), x, **other)
    if kind != "dit":  # which begins at zero
        assert not torch.allclose(told, otherwise)


# --- what a scheduler says


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "zero_snr"])
def test_losses_are_those_of_diffusers_loops(name, prediction, betas):
    """add_noise, the model at its timesteps, and the mean square error to what it predicts."""
    if betas == "zero_snr":
        if prediction == "epsilon":
            return  # says nothing of the image at the last timestep; refused below
        settings = {"beta_schedule": "linear", "rescale_betas_zero_snr": True}
    else:
        settings = {"beta_schedule": betas}
    scheduler = scheduler_of(name, prediction_type=prediction, **settings)
    model, _ = models("unconditional")
    x, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8)
    timesteps = torch.tensor([0, 17, 600, 999])
    noisy = scheduler.add_noise(x, noise, timesteps)
    predicted = model(noisy, timesteps).sample
    # get_velocity, which not every scheduler has
    squares = scheduler.alphas_cumprod[timesteps].float()[:, None, None, None]
    velocity = squares.sqrt() * noise - (1 - squares).sqrt() * x
    wanted = {"epsilon": noise, "sample": x, "v_prediction": velocity}[prediction]
    expected = (predicted - wanted).square().mean((1, 2, 3))

    loss = Loss.from_scheduler(scheduler, td=False)
    net = Denoiser.from_scheduler(model, scheduler)
    assert type(loss) is DDPMLoss and loss.fits(net)
    batch = loss.pair(x, t=timesteps + 1, noise=noise)
    got = loss.evaluate(net, None, batch).loss
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_with_its_shift(shift):
    """The model is told sigma T, predicts noise - x, and times crowd towards the noise."""
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler", shift=shift)
    model, _ = models("unconditional")
    x, noise = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 3, 8, 8)
    timesteps = scheduler.timesteps[[50, 500, 900]]
    noisy = scheduler.scale_noise(x, timesteps, noise)
    expected = (model(noisy, timesteps).sample - (noise - x)).square().mean((1, 2, 3))

    loss = Loss.from_scheduler(scheduler, td=False)
    net = Denoiser.from_scheduler(model, scheduler)
    unshifted = torch.linspace(1, 1000, 1000).flip(0)[[50, 500, 900]] / 1000
    batch = loss.pair(x, t=unshifted, noise=noise)
    got = loss.evaluate(net, None, batch).loss
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-5)
    td = Loss.from_scheduler(scheduler)
    assert type(td) is TDFlowLoss and td.schedule == FlowMatching(shift=shift)
    td(net, EMA(net), x).mean().backward()


def test_a_transformer_is_told_the_time_by_its_name():
    model, text = models("transformer")
    net = Denoiser.from_scheduler(model, scheduler_of("FlowMatchEulerDiscreteScheduler"))
    x, sigma = torch.rand(4, 3, 8, 8), torch.tensor([0.1, 1.0, 3.0, 9.0])
    t = sigma / (1 + sigma)
    noisy = x * (1 - t)[:, None, None, None]
    expected = noisy - t[:, None, None, None] * model(noisy, timestep=1000 * t, **text).sample
    torch.testing.assert_close(net(x, sigma, **text), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shifted_path(shift):
    path, t = FlowMatching(shift=shift), torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) + path.sigma(t), torch.ones_like(t))
    torch.testing.assert_close(path.time(path.sigma_hat(t)), t)
    assert (path.sigma(t) > t).all() == (shift > 1)
    with pytest.raises(ValueError, match="FlowMatching: shift must be a number above 0, got 0"):
        FlowMatching(shift=0)


def test_td_with_the_options_of_the_family():
    scheduler = scheduler_of("DDPMScheduler", num_train_timesteps=100)
    loss = Loss.from_scheduler(scheduler, k=3, lambda_base=0.1)
    assert type(loss) is TDDDPMLoss and (loss.T, loss.k, loss.lambda_base) == (100, 3, 0.1)
    torch.testing.assert_close(
        loss.schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-5, atol=1e-8
    )


def test_schedulers_that_do_not_fit_are_refused_in_a_line():
    unknown = types.SimpleNamespace(config=types.SimpleNamespace(prediction_type="flow"), betas=[])
    zero = scheduler_of("DDPMScheduler", rescale_betas_zero_snr=True)
    edm = scheduler_of("EDMEulerScheduler")
    dynamic = scheduler_of("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    inverted = scheduler_of("FlowMatchEulerDiscreteScheduler", invert_sigmas=True)
    untold = scheduler_of("IPNDMScheduler")  # which has betas of its own kind
    for scheduler, message in (
        (unknown, "the prediction_type of SimpleNamespace must be one of epsilon, sample, v_pred"),
        (edm, "scheduler must have betas, or a fixed shift of flow matching, got EDMEuler"),
        (dynamic, "scheduler must have betas, or a fixed shift of flow matching, got FlowMatch"),
        (inverted, "invert_sigmas of FlowMatchEulerDiscreteScheduler must be False"),
        (untold, "the prediction_type of IPNDMScheduler must be one of epsilon, .*, got None"),
        (zero, "prediction must be"),  # eps says nothing of the image where no signal is left
    ):
        for make in (Loss.from_scheduler, lambda each: Denoiser.from_scheduler(None, each)):
            with pytest.raises(ValueError, match=message) as raised:
                make(scheduler)
            assert len(str(raised.value)) < 300
    assert of_scheduler(scheduler_of("DDPMScheduler"))[0] == "eps"
