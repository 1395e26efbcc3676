"""ema-pytorch's averages and torch-fidelity's Inception, the real ones, beside tdkern's."""

import pytest
import torch

from helpers.tiny import pixels
from tdkern.ema import EMA
from tdkern.evaluation.fid import Inception
from tdkern.losses import TDEDMLoss
from tdkern.networks import EDMPrecond, unet

pytestmark = pytest.mark.usefixtures("torchvision_operators")


def test_ema_pytorch_as_the_average_and_as_the_target():
    """`ema_pytorch.EMA` is a module that calls its copy: a target like any other. Its average with
    a constant decay is ours.
    """
    import ema_pytorch

    torch.manual_seed(0)
    net = EDMPrecond(unet("ddpmpp", 8, 3, 0, cbase=4, cres=[1]))
    theirs = ema_pytorch.EMA(net, beta=0.9, update_after_step=-1, update_every=1, power=1e9)
    theirs.update()  # the first copies
    ours = EMA(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        TDEDMLoss()(net, theirs, torch.rand(2, 3, 8, 8)).mean().backward()
        optimizer.step()
        decay = theirs.get_current_decay()
        theirs.update()
        ours.update(net, float(decay))
    for mine, other in zip(ours.parameters(), theirs.ema_model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_torch_fidelitys_inception_gives_our_features(tmp_path, monkeypatch):
    """Its own extractor, with weights from a file, which are random here: those of the published
    network cannot be had without a download.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    load = FeatureExtractorInceptionV3.load_state_dict
    torch.manual_seed(0)
    (tmp_path / "empty.pth").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        made = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "empty.pth"
        )
    assert FeatureExtractorInceptionV3.load_state_dict is load
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    images = torch.from_numpy(pixels(2))
    features = Inception(tmp_path / "weights.pth")(images)
    with torch.no_grad():
        (expected,) = made.eval()(images)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features.float(), expected, rtol=1e-4, atol=1e-5)
