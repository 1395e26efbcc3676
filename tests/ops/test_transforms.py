"""Every op on every backend under PyTorch's transforms, modes and packagings: as the reference, or
as in a loop; never silently less."""

import io
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import tdkern
from helpers.cases import F64, device_of
from tdkern import losses
from tdkern.ops import OPS, _modes, tensors_of

# An argument of each op that is a tensor of floats and along which a sample can be batched.
BATCHED = {  # of ops that take levels or counts beside what they work through
    "td_coef": ("noise",),
    "noise_pair": ("x0",),
    "td_loss": ("out",),
    "heun_step": ("F", "coef"),
    "ema_update_": ("averages", "params"),
    "adam_ema_": ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "averages"),
}
WITH_BATCH = [  # ops whose tensors are a batch, not lists of parameters
    op for op in OPS if not any(isinstance(value, list) for value in OPS[op].example().values())
]
LOSSES = [name for name in losses.__all__ if name.endswith("Loss") and name != "Loss"]
NORMS = {"l2": {}, "l1": {"base_norm": "l1"}, "huber": {"base_norm": "huber", "huber_c": 0.3}}


def batched(op):
    """The arguments that are given one per batch element: all tensors, if nothing else is said."""
    arguments = OPS[op].example()
    return BATCHED.get(op, [name for name, value in arguments.items() if tensors_of(value)])


def td_loss_of(backend, norm="l2", base="consistency"):
    """(loss as a function of `out`, `out`), in float64."""
    arguments = OPS["td_loss"].example(shape=(3, 4), dtype=F64, device=device_of(backend))
    out = arguments.pop("out")
    return lambda out: tdkern.td_loss(
        out, **arguments, **NORMS[norm], base=base, backend=backend
    ), out


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# ---- derivatives


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives(compiled, norm):
    """The reference's numbers, where the loss is linear in the op's result and where it is not."""
    results = []
    for backend in (compiled, "reference"):
        loss, out = td_loss_of(backend, norm)
        w = torch.tensor(2.0, dtype=F64, device=out.device, requires_grad=True)
        for whole in (torch.sum, lambda loss: loss.square().sum()):
            scaled = out * w
            (gradient,) = torch.autograd.grad(whole(loss(scaled)), scaled, create_graph=True)
            assert gradient.requires_grad
            (penalty,) = torch.autograd.grad(whole(loss(scaled)) + gradient.square().sum(), w)
            hessian = torch.autograd.functional.hessian(
                lambda out, whole=whole, loss=loss: whole(loss(out)), out
            )
            results.append((gradient.detach().cpu(), penalty.cpu(), hessian.cpu()))
    for actual, expected in zip(results[:2], results[2:], strict=True):
        close(actual, expected)
    assert norm == "l1" or results[0][2].abs().max() > 0.01


def test_gradgradcheck(compiled):
    small = {
        name: (tensor[:, :2] if tensor.shape[-1] == 4 else tensor)
        for name, tensor in OPS["td_loss"]
        .example(shape=(2, 4), dtype=F64, device=device_of(compiled))
        .items()
    }
    out = small.pop("out").contiguous().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda out: tdkern.td_loss(out, **small, backend=compiled), out
    )


def test_the_first_derivative_is_as_before(compiled):
    """With create_graph the gradient is the reference's, to rounding; without, the op's own, handed
    out once more at each call."""
    loss, out = td_loss_of(compiled)
    out.requires_grad_()
    total = loss(out).sum()
    (plain,) = torch.autograd.grad(total, out, retain_graph=True)
    (again,) = torch.autograd.grad(total, out, create_graph=True)
    (third,) = torch.autograd.grad(total, out)
    close(again, plain)
    assert torch.equal(plain, third) and not plain.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_forward_mode(compiled, norm):
    loss, out = td_loss_of(compiled, norm)
    gradient = torch.autograd.functional.jacobian(lambda out: loss(out).sum(), out)
    tangent = torch.ones_like(out)
    expected = (gradient * tangent).sum()
    total = lambda out: loss(out).sum()
    close(torch.func.jvp(total, (out,), (tangent,))[1], expected)
    close(torch.func.linearize(total, out)[1](tangent), expected)
    close(torch.func.jacfwd(total)(out), gradient)
    close(
        torch.autograd.functional.jacobian(total, out, vectorize=True, strategy="forward-mode"),
        gradient,
    )
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(total(forward_ad.make_dual(out, tangent))).tangent, expected)


@pytest.mark.parametrize(
    "op, name",
    [
        ("td_coef", "noise"),
        ("noise_pair", "x0"),
        ("noise_pair", "sigma"),
        ("heun_step", "F"),
        ("heun_step", "x"),
        ("heun_step", "coef"),
        ("td_loss", "out_target"),
        ("td_loss", "x0"),
        ("td_loss", "x_t"),
        ("td_loss", "x_tp"),
        ("td_loss", "coef"),
    ],
)
def test_forward_mode_of_what_has_no_gradient(backend, op, name):
    """The tangent, which finite differences confirm: an argument without a gradient is not one
    without a tangent."""
    arguments = OPS[op].example(shape=(3, 4), dtype=F64, device=device_of(backend))

    def results(value):
        return torch.cat(
            [result.flatten() for result in OPS[op].results({**arguments, name: value}, backend)]
        )

    value = arguments[name]
    tangent = torch.full_like(value, 0.25)
    step = 1e-6
    finite = (results(value + step * tangent) - results(value - step * tangent)) / (2 * step)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(results(forward_ad.make_dual(value, tangent))).tangent
    torch.testing.assert_close(got, finite, rtol=1e-5, atol=1e-6)
    assert got.abs().max() > 0


@pytest.mark.parametrize(
    "op, name",
    [
        ("ema_update_", "averages"),
        ("ema_update_", "params"),
        ("ema_update_", "decays"),
        ("adam_ema_", "params"),
        ("adam_ema_", "grads"),
        ("adam_ema_", "exp_avgs"),
        ("adam_ema_", "exp_avg_sqs"),
        ("adam_ema_", "averages"),
        ("adam_ema_", "decays"),
        ("adam_ema_", "lr"),
        ("adam_ema_", "clip"),
        ("adam_ema_", "grad_scale"),
    ],
)
def test_forward_mode_of_ops_in_place(backend, op, name):
    """What an op writes gets its tangent, which finite differences confirm."""
    factors = dict.fromkeys(("clip", "grad_scale"), 0.5) if op == "adam_ema_" else {}
    given = OPS[op].example(shape=(3, 4), dtype=F64, device=device_of(backend)) | factors
    for scalar in {"decays", "lr", *factors} & given.keys():
        given[scalar] = torch.tensor(given[scalar], dtype=F64, device=device_of(backend))

    def results(change):
        arguments = copied(given)
        arguments[name] = changed(arguments[name], change)
        return torch.cat([result.flatten() for result in OPS[op].results(arguments, backend)])

    step = 1e-6
    above, below = (results(lambda tensor, by=by: tensor + by) for by in (step, -step))
    with forward_ad.dual_level():
        dual = results(lambda tensor: forward_ad.make_dual(tensor, torch.ones_like(tensor)))
        got = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(got, (above - below) / (2 * step), rtol=1e-5, atol=1e-6)
    assert got.abs().max() > 0


def changed(value, change):
    return [changed(part, change) for part in value] if isinstance(value, list) else change(value)


def test_transforms_of_gradients(backend):
    loss, out = td_loss_of(backend)
    plain = torch.autograd.functional.jacobian(loss, out)
    total = lambda out: loss(out).sum()
    close(torch.func.grad(total)(out), plain.sum((0, 1)))
    close(torch.func.jacrev(loss)(out), plain)
    close(torch.autograd.functional.jacobian(loss, out, vectorize=True), plain)
    close(torch.vmap(torch.func.grad(total))(torch.stack([out, 2 * out]))[0], plain.sum((0, 1)))
    result = loss(out.requires_grad_())
    (batched,) = torch.autograd.grad(
        result,
        out,
        torch.stack([torch.ones_like(result), torch.zeros_like(result)]),
        is_grads_batched=True,
    )
    close(batched, torch.stack([plain.sum((0, 1)), torch.zeros_like(out)]))


@pytest.mark.parametrize("op", OPS)
def test_vmap(backend, op):
    """As a loop over the slices."""
    calls = [OPS[op].example(shape=(3, 4), dtype=F64, device=device_of(backend)) for _ in range(2)]
    for name in batched(op):
        for tensor in tensors_of(calls[1][name]):
            tensor.mul_(1.5)
    expected = [OPS[op].results(copied(call), backend) for call in calls]
    mapped = {name: stacked([call[name] for call in calls]) for name in batched(op)}
    rest = {name: value for name, value in calls[0].items() if name not in batched(op)}

    def one(mapped):
        return [result + 0 for result in OPS[op].results({**rest, **mapped}, backend)]

    for actual, *wanted in zip(torch.vmap(one)(mapped), *expected, strict=True):
        close(actual, torch.stack(wanted))


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, list | tuple) else value


def stacked(values):
    if isinstance(values[0], torch.Tensor):
        return torch.stack(values)
    return [stacked(parts) for parts in zip(*values, strict=True)]


# ---- modes and traces


def test_whether_values_may_be_looked_at():
    real = torch.ones(3)
    assert _modes.can_check_values(real) and _modes.can_check_values(torch.nn.Parameter(real), real)
    assert not _modes.can_check_values(real, real.to("meta"))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
        assert not _modes.can_check_values(fake) and not _modes.can_check_values(real)
    assert not _modes.can_check_values(fake)
    seen = []
    look = lambda x: (seen.append(_modes.can_check_values(x)), x + 0)[1]
    torch.vmap(look)(real)
    torch.func.grad(lambda x: look(x).sum())(real)
    torch.func.jvp(look, (real,), (real,))
    for tracing_mode in ("real", "fake", "symbolic"):
        make_fx(look, tracing_mode=tracing_mode)(real)
    torch.jit.trace(look, (real,), check_trace=False)
    torch.export.export(Module(look), (real,), strict=False)
    assert len(seen) >= 8 and not any(seen)
    assert _modes.can_check_values(real)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(backend, op):
    """The shapes, dtypes and strides of the real call, without one."""
    arguments = OPS[op].example(device=device_of(backend))
    real = OPS[op].results(copied(arguments), backend)
    with FakeTensorMode() as mode:
        faked = {name: fakes_of(mode, value) for name, value in arguments.items()}
        fake = OPS[op].results(faked, backend)
    kinds = [
        [(result.shape, result.dtype, result.device.type) for result in results]
        for results in (real, fake)
    ]
    assert kinds[0] == kinds[1]


def fakes_of(mode, value):
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    return [fakes_of(mode, part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op", OPS)
def test_make_fx(backend, op, tracing_mode):
    arguments = OPS[op].example(device=device_of(backend))
    names = [name for name, value in arguments.items() if tensors_of(value)]

    def call(*values):
        return OPS[op].results({**arguments, **dict(zip(names, values, strict=True))}, backend)

    values = [arguments[name] for name in names]
    graph = make_fx(call, tracing_mode=tracing_mode)(*copied(values))
    for actual, expected in zip(graph(*copied(values)), call(*copied(values)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_jit_trace_takes_the_backend_by_device(op):
    """A trace is saved, loaded and called; in it the ops have no backend's name, and in-place ops
    are not lost."""
    arguments = OPS[op].example()
    names = batched(op)

    def call(*flat):
        given, flat = {}, list(flat)
        for name in names:
            given[name] = rebuilt(arguments[name], flat)
        return [result * 1 for result in OPS[op].results({**arguments, **given})]

    flat = [tensor.clone() for name in names for tensor in tensors_of(arguments[name])]
    traced = torch.jit.trace(call, tuple(tensor.clone() for tensor in flat), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    again = torch.jit.load(file)
    for actual, expected in zip(
        again(*(tensor.clone() for tensor in flat)),
        call(*(tensor.clone() for tensor in flat)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
    assert not any(f"{op}.{backend}" in str(traced.graph) for backend in ("cpp", "cuda", "triton"))


def rebuilt(like, flat):
    if isinstance(like, torch.Tensor):
        return flat.pop(0)
    return [rebuilt(part, flat) for part in like]


def test_direct_calls_take_the_backend_by_device():
    arguments = OPS["td_loss"].example()
    out = arguments["out"].requires_grad_()
    gradients = []
    for loss in (
        torch.ops.tdkern.td_loss(*arguments.values(), False, False, True)[0],
        tdkern.td_loss(**arguments),
    ):
        gradients.append((loss.detach(), *torch.autograd.grad(loss.sum(), out)))
    assert all(map(torch.equal, *gradients))
    for op in (
        torch.ops.tdkern.ema_update_,
        torch.ops.tdkern.adam_ema_,
        torch.ops.tdkern.heun_step,
    ):
        assert "default" in op.overloads()
    average = torch.zeros(3)
    torch.ops.tdkern.ema_update_([average], [torch.ones(3)], torch.tensor([0.5]))
    assert average.tolist() == [0.5] * 3


# ---- compilation


def test_one_compilation_for_any_batch(backend):
    torch._dynamo.reset()
    traced = torch.compile(
        lambda noise: tdkern.td_coef(noise, backend=backend),
        dynamic=True,
        fullgraph=True,
        backend="aot_eager",
    )
    noise = torch.linspace(0.1, 5, 20, dtype=F64, device=device_of(backend))
    traced(noise[:2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in range(3, 20):
            assert torch.equal(
                traced(noise[:batch])[0], tdkern.td_coef(noise[:batch], backend=backend)[0]
            )


def test_one_compilation_for_any_seed_and_offset(compiled):
    torch._dynamo.reset()
    arguments = OPS["noise_pair"].example(device=device_of(compiled)) | {"backend": compiled}

    def pair(seed, offset):
        return tdkern.noise_pair(**{**arguments, "seed": seed}, offset=offset)[0]

    traced = torch.compile(pair, dynamic=True, fullgraph=True, backend="aot_eager")
    traced(7, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, offset in [(8, 3), (2**40, 2**50), (9, 2**62), (12345, 77), (3, 2)]:
            assert torch.equal(traced(seed, offset), pair(seed, offset))


@pytest.mark.parametrize(
    "name, by",
    [*((name, "eager") for name in LOSSES), ("TDEDMLoss", "aot_eager"), ("CTLoss", "aot_eager")],
)
def test_one_compilation_of_a_loss_for_any_batch(name, by):
    """Two of them with the graph of the backward pass too, which takes four times as long."""
    torch._dynamo.reset()
    loss, linear = getattr(losses, name)(), torch.nn.Linear(4, 4)
    net = lambda x, sigma, **labels: linear(x)
    traced = torch.compile(
        lambda images: loss(net, net, images), dynamic=True, fullgraph=True, backend=by
    )
    traced(torch.randn(3, 4)).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 7, 16):
            traced(torch.randn(batch, 4)).sum().backward()


@pytest.mark.skipif(not _modes.COMPILES_TRANSFORMS, reason="torch.compile cannot trace it yet")
@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda f: lambda x: torch.vmap(f)(x[None]),
    ],
)
def test_transforms_inside_a_compiled_function(compiled, transform):
    torch._dynamo.reset()
    loss, out = td_loss_of(compiled)
    function = transform(lambda out: loss(out).sum())
    close(torch.compile(function, fullgraph=True, backend="aot_eager")(out), function(out))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("op", WITH_BATCH)
def test_export_with_a_dynamic_batch(compiled, op, strict):
    largest = OPS[op].example(shape=(8, 4), device=device_of(compiled))
    names = [name for name, value in largest.items() if tensors_of(value) and len(value) == 8]
    rest = {name: value for name, value in largest.items() if name not in names}

    def inputs(batch):
        return [largest[name][:batch] for name in names]

    module = Module(
        lambda *given: OPS[op].results(rest | dict(zip(names, given, strict=True)), compiled)
    )
    shapes = {"args": tuple({0: torch.export.Dim.DYNAMIC} for _ in names)}
    program = torch.export.export(
        module, tuple(inputs(3)), dynamic_shapes=shapes, strict=strict
    ).module()
    for batch in (2, 3, 8):
        for actual, expected in zip(program(*inputs(batch)), module(*inputs(batch)), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a compiler")
def test_a_package_of_a_loss_has_the_same_bits():
    """td_coef with its defaults, td_loss and a network: no argument of an op is infinite, which a
    package cannot hold."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)
    arguments = OPS["td_loss"].example(shape=(3, 4))

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear

        def forward(self, sigma, x_t, x_tp, x0):
            coef, _ = tdkern.td_coef(sigma)
            return tdkern.td_loss(self.net(x_t), self.net(x_tp), x0, coef, x_t, x_tp)

    inputs = (
        torch.tensor([0.3, 1.0, 9.0], dtype=F64),
        arguments["x_t"],
        arguments["x_tp"],
        arguments["x0"],
    )
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(Loss(), inputs)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "loss.pt2")
        )
        assert torch.equal(torch._inductor.aoti_load_package(package)(*inputs), Loss()(*inputs))
