"""What a training loop hands to a loss: conditions, labels, targets, and whatever its networks
answer.
"""

from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from helpers.losses import Linear
from tdkern.ema import EMA
from tdkern.losses import (
    CTLoss,
    DDPMLoss,
    EDMLoss,
    FlowLoss,
    TDCTLoss,
    TDDDPMLoss,
    TDEDMLoss,
    TDFlowLoss,
    VELoss,
    VPLoss,
)
from tdkern.networks import CTPrecond, EDMPrecond, SongUNet

ALONE = [EDMLoss(), DDPMLoss(), VPLoss(), VELoss(), FlowLoss()]
WITH_TARGET = [TDEDMLoss(), TDDDPMLoss(), TDFlowLoss(), CTLoss(), TDCTLoss()]
SIGMA = torch.tensor([0.05, 2.0, 0.001, 0.4])  # the third has no pair on the schedule


def named(loss):
    return type(loss).__name__


class Told(torch.nn.Module):
    """A denoiser that keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = Linear(seed=1), []

    def forward(self, x, sigma, *args, **named):
        self.calls.append((x, args, named))
        return self.net(x, sigma)


def images(batch=4):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 2


def seeded(call):
    torch.manual_seed(0)
    return call()


@pytest.mark.parametrize("loss", [*ALONE, *WITH_TARGET], ids=named)
def test_only_what_is_given_is_passed_on(loss):
    net, target = Told(), Told()
    loss(net, target, images())
    loss(net, target, images(), torch.eye(4), scale=2.0)
    calls = [(args, named) for _, args, named in net.calls]
    assert calls[0] == ((), {})
    (labels,), given = calls[1]
    assert torch.equal(labels, torch.eye(4)) and given == {"scale": 2.0}
    if loss in WITH_TARGET:
        assert [len(args) for _, args, _ in target.calls] == [0, 1]
        assert target.calls[1][2] == {"scale": 2.0}


@pytest.mark.parametrize("loss", [*ALONE, *WITH_TARGET], ids=named)
def test_a_callable_of_x_and_sigma(loss):
    """What every sampler takes serves the losses too, as the network and as the target."""
    net = Linear(seed=1)
    values = [
        seeded(lambda each=each: loss(each, each, images()))
        for each in (net, lambda x, s: net(x, s))
    ]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_conditions_are_split_with_the_samples(share):
    """The target network sees the rows of its own samples, in tensors, lists and dicts alike, and
    what is no batch as it is.
    """
    loss = TDEDMLoss(td_share=share)
    batch = loss.pair(images(), sigma=SIGMA)
    rows = torch.arange(4.0)
    given = {
        "text": rows[:, None, None].expand(4, 7, 2),
        "added": {"ids": rows, "pairs": [rows[:, None], (rows, "word")]},
        "guidance": torch.tensor(3.0),
        "scale": 2,
        "nothing": None,
    }
    net, target = Told(), Told()
    loss.evaluate(net, target, batch, rows.long(), rows[:, None], **given)
    for told, indices in ((net, [0, 1, 2, 3]), (target, [1, 3, 0] if share == 1 else [1, 3])):
        ((x, (labels,), seen),) = told.calls
        expected = torch.tensor(indices)
        assert torch.equal(labels, expected) and len(x) == len(expected)
        assert torch.equal(seen["augment_labels"], expected[:, None].float())
        assert torch.equal(seen["text"][:, 6, 1], expected.float())
        ids, (column, (others, word)) = seen["added"]["ids"], seen["added"]["pairs"]
        assert torch.equal(ids, expected.float()) and torch.equal(others, ids)
        assert torch.equal(column[:, 0], ids) and word == "word"
        assert seen["guidance"] == 3 and seen["scale"] == 2 and seen["nothing"] is None


class Text(NamedTuple):
    """As code of one's own passes several tensors on."""

    states: torch.Tensor
    mask: torch.Tensor


class Output(OrderedDict):
    """As transformers' and diffusers' outputs are."""

    def __getattr__(self, name):
        return self[name]

    def update(self, *_, **__):
        raise TypeError("an output has no update")


@pytest.mark.parametrize("kind", [Text, Output], ids=["named tuple", "dict with attributes"])
def test_conditions_keep_their_class(kind):
    rows = torch.arange(4.0)
    given = kind(states=rows[:, None], mask=rows)
    net, target = Told(), Told()
    loss = TDEDMLoss()
    loss.evaluate(net, target, loss.pair(images(), sigma=SIGMA), text=given)
    ((_, _, seen),) = target.calls
    assert type(seen["text"]) is kind and seen["text"].mask.tolist() == [1, 3, 0]
    assert seen["text"].states.tolist() == [[1], [3], [0]]
    assert torch.equal(given.mask, rows) and net.calls[0][2]["text"] is given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": torch.zeros(3, 10)}, r"labels must begin with the batch.*4, got \[3, 10\]"),
        ({"text": torch.zeros(1, 7, 8)}, r"text must begin with the batch.*4, got \[1, 7, 8\]"),
        ({"more": {"ids": [torch.zeros(5)]}}, r"more\['ids'\]\[0\] must begin .*4, got \[5\]"),
    ],
)
def test_conditions_of_another_batch_are_refused(given, message):
    for loss in (EDMLoss(), TDEDMLoss(), CTLoss()):
        with pytest.raises(ValueError, match=f"^{named(loss)}: {message}$"):
            loss(Told(), Told(), images(), **given)


@pytest.mark.parametrize("make", [TDEDMLoss, TDCTLoss])
def test_class_indices_are_one_hot_labels(make):
    wrapper = EDMPrecond if make is TDEDMLoss else CTPrecond
    unet = SongUNet(8, 3, 3, 5, model_channels=4, channel_mult=[1], num_blocks=1, dropout=0.0)
    net, classes = wrapper(unet), torch.tensor([3, 0, 4, 3])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(4, 3, 8, 8)
    values = [
        seeded(lambda labels=labels: make()(net, EMA(net), x, labels))
        for labels in (classes, torch.eye(5)[classes], classes.int(), torch.eye(5)[[0, 0, 0, 0]])
    ]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert not torch.allclose(values[0], values[3], rtol=1e-3)
    for wrong in (5, -1):
        message = f"class_labels must be from 0 to 4, got {min(wrong, 0)} to {max(wrong, 0)}"
        with pytest.raises(ValueError, match=f"{wrapper.__name__}: {message}"):
            make()(net, net, x, torch.tensor([0, 0, wrong, 0]))


@pytest.mark.parametrize("loss", WITH_TARGET, ids=named)
def test_a_target_may_be_an_average(loss):
    """Our `EMA`, its module, and PyTorch's own average, are one target."""
    net = Linear(seed=1)
    ours, torchs = EMA(Linear(seed=2)), torch.optim.swa_utils.AveragedModel(Linear(seed=2))
    values = [
        seeded(lambda target=target: loss(net, target, images()))
        for target in (ours, ours.module, torchs)
    ]
    assert torch.equal(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


ANSWERS = {
    "tuple": lambda D: (D, None),
    "list": lambda D: [D],
    "object": lambda D: SimpleNamespace(sample=D),
    "dict": lambda D: {"sample": D},
    "ModelOutput": lambda D: OrderedDict(sample=D),
}


@pytest.mark.parametrize("loss", [EDMLoss(), TDEDMLoss(), CTLoss()], ids=named)
@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_hold_a_tensor(answer, loss):
    net = Linear(seed=1)
    holding = lambda x, sigma: ANSWERS[answer](net(x, sigma))
    values = [seeded(lambda each=each: loss(each, each, images())) for each in (net, holding)]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("answer", [(), {}, {"logits": 1}, SimpleNamespace(), None, ("text",), 3.0])
@pytest.mark.parametrize("argument", ["net", "target_net"])
def test_answers_without_a_tensor_are_refused(argument, answer):
    networks = {"net": Linear(), "target_net": Linear()} | {argument: lambda x, sigma: answer}
    message = f"^TDEDMLoss: {argument} must return a tensor, .* got {type(answer).__name__}$"
    with pytest.raises(ValueError, match=message):
        TDEDMLoss()(*networks.values(), images())


@pytest.mark.parametrize("loss", ALONE, ids=named)
def test_edms_own_call(loss):
    """Without a target network, by place and by name, with labels and augmentation."""
    net, labels = Told(), torch.eye(4)
    augment = lambda images: (images, torch.ones(4, 9))
    expected = seeded(lambda: loss(net, None, images(), labels, augment))
    calls = [
        lambda: loss(net, images(), labels, augment),
        lambda: loss(net, images(), labels=labels, augment_pipe=augment),
        lambda: loss(net=net, images=images(), labels=labels, augment_pipe=augment),
    ]
    for call in calls:
        assert torch.equal(seeded(call), expected)
    for _, (given,), also in net.calls:
        assert torch.equal(given, labels) and also.keys() == {"augment_labels"}


def wrong_calls():
    """Calls that are refused, each with how its message begins."""
    net, x, td = Linear(), images(), TDEDMLoss()
    wide = lambda x, sigma: x.repeat(1, 2, 1, 1)
    return [
        (lambda: td(net, x, torch.eye(4)), "TDEDMLoss: target_net must be a network, got None"),
        (lambda: td(net, "ema", x), "TDEDMLoss: target_net must be a network, got str"),
        (lambda: td(3, net, x), "TDEDMLoss: net must be a network, got int"),
        (lambda: td(net, net), "TDEDMLoss: images must be a tensor, got NoneType"),
        (lambda: td(net, net, [x]), "TDEDMLoss: images must be a tensor, got list"),
        (lambda: td(wide, net, x), r"TDEDMLoss: net must answer \[4, 3, 4, 4\], .* got \[4, 6,"),
        (lambda: td(net, wide, x), r"TDEDMLoss: target_net must answer \[4, 3, 4, 4\], .* \[4, 6,"),
        (
            lambda: td(lambda x, s: x.float(), net, x.double()),
            r"TDEDMLoss: net must answer float64 images in float64, got torch.float32: give images",
        ),
        (lambda: TDEDMLoss(base_weight=x), "TDEDMLoss: base_weight must be one of own, karras"),
        (lambda: TDEDMLoss(td_sigma=x), r"td_coef: td_sigma must be \(lo, hi\) or None"),
        (lambda: CTLoss(base_norm=list(range(9999))), "CTLoss: base_norm must be one of l2"),
        (lambda: CTLoss(base_weight="x" * 9999), "CTLoss: base_weight must be one of karras"),
        (lambda: DDPMLoss(prediction=[1] * 9999), "DDPMLoss: prediction must be one of eps"),
        (lambda: TDDDPMLoss(weight=x), "TDDDPMLoss: weight must be one of pairwise"),
        (lambda: TDEDMLoss(lambda_base="1" * 999), "TDEDMLoss: lambda_base must be a number"),
    ]


@pytest.mark.parametrize("which", range(len(wrong_calls())))
def test_what_is_wrong_is_told_in_one_line(which):
    call, message = wrong_calls()[which]
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        call()
    text = str(refused.value)
    assert "\n" not in text and len(text) < 320 and "tensor(" not in text
