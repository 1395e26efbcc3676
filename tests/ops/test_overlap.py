"""Memory that is written and lies in two tensors, or twice in one, is refused by every in-place op
before anything is written."""

import pytest
import torch

import tdkern
from helpers.cases import device_of
from tdkern.ops import OPS, _backends, adam_ema_, tensors_of
from tdkern.ops._checks import refuse_overlap

N = 6


def memory(backend, count=4 * N):
    return torch.arange(1.0, 1 + count, device=device_of(backend))


def ema(averages, params):
    return {"averages": averages, "params": params, "decays": [0.5] * len(averages)}


# name: (averages, params) of one buffer, and what the message names
EMA = {
    "expanded": (
        lambda m: ([[m[:1].expand(N)]], [m[N : 2 * N]]),
        r"averages\[0\]\[0\] is written and overlaps itself",
    ),
    "as_strided": (
        lambda m: ([[m.as_strided((3, 2), (1, 1))]], [m[N : 2 * N].view(3, 2)]),
        r"averages\[0\]\[0\] is written and overlaps itself",
    ),
    "shifted by one": (
        lambda m: ([[m[1 : N + 1]]], [m[:N]]),
        r"averages\[0\]\[0\] is written and overlaps params\[0\]",
    ),
    "every second": (
        lambda m: ([[m[: 2 * N : 2]]], [m[2 : 2 * N + 2 : 2]]),
        r"averages\[0\]\[0\] is written and overlaps params\[0\]",
    ),
    "another parameter": (
        lambda m: ([[m[:N], m[N : 2 * N]]], [m[2 * N : 3 * N], m[:N]]),
        r"averages\[0\]\[0\] is written and overlaps params\[1\]",
    ),
    "two averages of one": (
        lambda m: ([[m[:N]], [m[:N]]], [m[N : 2 * N]]),
        r"averages\[.\]\[0\] is written and overlaps averages\[.\]\[0\]",
    ),
    "transposed": (
        lambda m: ([[m[:4].view(2, 2)]], [m[:4].view(2, 2).t()]),
        r"averages\[0\]\[0\] is written and overlaps params\[0\]",
    ),
}


@pytest.mark.parametrize("how", EMA)
def test_ema_update_refuses(backend, how):
    make, message = EMA[how]
    buffer = memory(backend)
    before = buffer.clone()
    with pytest.raises(ValueError, match=f"ema_update_: {message}"):
        tdkern.ema_update_(**ema(*make(buffer)), backend=backend)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("column", ["params", "exp_avgs", "exp_avg_sqs", "averages", "steps"])
@pytest.mark.parametrize("how", ["itself", "what is read", "another"])
def test_adam_ema_refuses(backend, column, how):
    arguments = OPS["adam_ema_"].example(shape=(N, 2), device=device_of(backend))
    arguments["averages"] = arguments["averages"][0]
    tensor = arguments[column][0]
    if column == "steps" and how != "another":
        pytest.skip("a step has one element")
    if how == "itself":
        arguments[column][0] = tensor[:1].expand(N, 2)
    elif how == "what is read":
        buffer = memory(backend)
        arguments[column][0] = buffer[2 : 2 + 2 * N].view(N, 2)
        arguments["grads"][0] = buffer[: 2 * N].view(N, 2)
    else:
        arguments[column][1] = tensor if column == "steps" else tensor[0]
    arguments["averages"] = [arguments["averages"]]
    before = [tensor.clone() for tensor in tensors_of(list(arguments.values()))]
    with pytest.raises(ValueError, match=r"adam_ema_: .*\] is written and overlaps"):
        adam_ema_(**arguments, backend=backend)
    assert all(map(torch.equal, before, tensors_of(list(arguments.values()))))


def test_what_does_not_overlap_is_taken(backend):
    """Neighbours in one buffer, elements between another's, and a parameter that is its own
    average."""
    buffer = memory(backend)
    tdkern.ema_update_(
        [[buffer[:N], buffer[N : 2 * N]]],
        [buffer[2 * N : 3 * N], buffer[3 * N :]],
        [0.5],
        backend=backend,
    )
    assert buffer[:2].tolist() == [1 + N, 2 + N]
    buffer = memory(backend)
    tdkern.ema_update_([[buffer[0::2]]], [buffer[1::2]], [0.0], backend=backend)
    assert buffer[:4].tolist() == [2, 2, 4, 4]
    tdkern.ema_update_([[buffer[:N]]], [buffer[:N]], [0.5], backend=backend)
    # one parameter twice
    tdkern.ema_update_(
        [[buffer[:N], buffer[N : 2 * N]]], [buffer[2 * N : 3 * N]] * 2, [0.5], backend=backend
    )
    assert buffer.isfinite().all()


@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_the_gradient_of_td_loss_refuses(name):
    if _backends.MISSING[name] or device_of(name) != "cpu":
        pytest.skip(_backends.MISSING[name] or "on the CPU alone")
    arguments = OPS["td_loss"].example(shape=(3, N))
    rest = (*arguments.values(), False, False)
    upstream = torch.full((3, 2), 0.5)
    backward = _backends.op("td_loss_backward_", name)
    with pytest.raises(
        RuntimeError, match="td_loss_backward_: a tensor that is written overlaps itself"
    ):
        backward(torch.ones(1, N).expand(3, N), upstream, *rest)
    buffer = torch.ones(4 * N)
    with pytest.raises(
        RuntimeError, match="td_loss_backward_: a tensor that is written overlaps another tensor"
    ):
        backward(buffer[1 : 1 + 3 * N].view(3, N), upstream, buffer[: 3 * N].view(3, N), *rest[1:])
    assert (buffer == 1).all()


def test_both_languages_have_the_same_rules():
    """The check in Python, on its own, agrees with what the C++ op does on views of one buffer,
    drawn at random."""
    if _backends.MISSING["cpp"]:
        pytest.skip(_backends.MISSING["cpp"])
    random = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        draw = lambda high: int(torch.randint(high, (), generator=random))
        buffer = torch.zeros(40)
        views = [buffer.as_strided((2, 3), (draw(4), draw(4)), draw(20)) for _ in range(2)]
        answers = []
        for refuse in (
            lambda views=views: refuse_overlap("x", {"a": views[:1]}, {"b": views[1:]}),
            lambda views=views: _backends.op("ema_update_", "cpp")(
                views[:1], views[1:], torch.tensor([0.5])
            ),
        ):
            try:
                refuse()
                answers.append(False)
            except (ValueError, RuntimeError):
                answers.append(True)
        assert answers[0] == answers[1], [(view.stride(), view.storage_offset()) for view in views]
        refused += answers[0]
    assert 20 < refused < 280
