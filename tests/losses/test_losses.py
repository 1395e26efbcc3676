"""The losses against golden vectors of the published code, and against what the mathematics says of
them.
"""

from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers import DATA, golden_of
from helpers.losses import (
    Linear,
    Raw,
    check_edm_golden,
    check_golden,
    error,
    golden_batch,
    golden_loss,
    plain,
)
from tdkern.losses import EDMLoss, TDEDMLoss
from tdkern.ops._backends import resolve
from tdkern.preconditioning import Eps

GOLDEN = sorted(path.stem for path in DATA.glob("td_edm_*.npz"))
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# a file that ends in w0 was published without w_td
CASES = [
    (name, weight)
    for name in GOLDEN
    for weight in ("online", "pairwise", "none")
    if weight == "none" or not name.endswith("w0")
]
RUNS = [("reference", "cpu"), *(("auto", device) for device in DEVICES)]


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("name", GOLDEN)
def test_pair_golden(name, backend, device):
    golden = golden_of(name)
    loss = golden_loss(golden, "online", backend)
    batch = golden_batch(loss, golden, device)
    valid = golden["td_valid"].bool()
    skip, scale, skip_p, scale_p, A, A_p, w_td, w_base = (
        column.cpu() for column in batch.coef.unbind(1)
    )

    assert error((loss.P_mean + loss.P_std * golden["z"]).exp(), golden["sigma_t"]) <= 1
    for column, key in enumerate(("sigma_t", "sigma_prev", "sigma_prime", "sigma_p_prev")):
        assert error(batch.levels[:, column], golden[key]) <= 1, key
    assert error(1 - A, golden["kappa_t"]) <= 1
    assert error(1 - A_p, golden["kappa_tp"]) <= 1
    assert error(A, golden["A_t"], 1e-11) <= 1  # 1 - kappa
    assert error(A_p, golden["A_tp"], 1e-11) <= 1
    assert error(w_base, golden["w_edm"] * (loss.lambda_base + (~valid).double())) <= 1
    assert torch.equal(w_td != 0, valid)
    for key, skip_, scale_, x, F in (
        ("D_t", skip, scale, batch.x_t, golden["F_t"]),
        ("D_tp", skip_p, scale_p, batch.x_tp, golden["F_tp"]),
    ):
        D = skip_.reshape(-1, 1, 1, 1) * x.cpu() + scale_.reshape(-1, 1, 1, 1) * F
        assert error(D, golden[key]) <= 1, key
    assert error(batch.x_t, golden["x_t"], 1e-7) <= 1  # stored as float32
    assert error(batch.x_tp, golden["x_tp"], 1e-7) <= 1


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize(("name", "weight"), CASES)
def test_loss_golden(name, weight, backend, device):
    check_golden(name, weight, backend, device, torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "weight"), CASES)
def test_loss_golden_float32(name, weight, device):
    if resolve("td_loss", "auto", torch.device(device)) == "reference":
        pytest.skip("the reference's four means cancel too much in float32")
    check_golden(name, weight, "auto", device, torch.float32)


def test_edm_golden():
    check_edm_golden()


def make_batch(loss, dtype=torch.float64, B=6, seed=0):
    torch.manual_seed(seed)
    images = torch.randn(B, 3, 4, 4, dtype=dtype) / 2
    sigma = torch.tensor([0.001, 0.05, 0.4, 2.0, 30.0, 100.0])[:B]
    return loss.pair(images, sigma=sigma)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("make", [EDMLoss, TDEDMLoss])
def test_raw_and_plain_networks_agree(make, backend):
    """F through the fused preconditioning and D from any callable: one value, one gradient; also
    with one of each.
    """
    loss = make(backend=backend)
    batch = make_batch(loss)
    results = []
    for wrap, wrap_target in ((0, 0), (0, 1), (1, 0), (1, 1)):
        net, target = Linear(seed=1).double(), Linear(seed=2).double()
        terms = loss.evaluate(
            plain(net) if wrap else net, plain(target) if wrap_target else target, batch
        )
        terms.loss.sum().backward()
        assert all(parameter.grad is None for parameter in target.parameters())
        results.append((terms.loss, terms.td, terms.base, net.conv.weight.grad, net.conv.bias.grad))
    assert (results[0][4].abs() > 0.01).all()
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert error(ours, theirs) <= 1


def test_raw_is_used_only_where_it_fits():
    class Refuses(Linear):
        def forward(self, x, sigma, class_labels=None, augment_labels=None, *, raw=False):
            assert not raw, "raw was called"
            return x

    batch = make_batch(TDEDMLoss())
    other_precond = Refuses()
    other_precond.preconditioning = Eps()
    for net in (Refuses(sigma_data=0.25), other_precond):
        assert TDEDMLoss().evaluate(net, net, batch).loss.isfinite().all()
    with pytest.raises(AssertionError, match="raw was called"):
        TDEDMLoss().evaluate(Refuses(), Refuses(), batch)


def test_a_compiled_network_runs_compiled():
    runs = []

    def backend(graph, _):
        return lambda *args: runs.append(1) or graph(*args)

    net, loss = Linear().double(), TDEDMLoss()
    batch = make_batch(loss)
    compiled = torch.compile(net, backend=backend)
    assert (
        error(loss.evaluate(compiled, compiled, batch).loss, loss.evaluate(net, net, batch).loss)
        <= 1
    )
    assert len(runs) == 2


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_networks_may_answer_in_half_precision(dtypes):
    loss = TDEDMLoss()
    batch = make_batch(loss, torch.float32)
    out, out_target = (torch.randn_like(batch.x0).to(dtype) for dtype in dtypes)
    expected = loss.evaluate(Raw(out.float()), Raw(out_target.float()), batch).loss
    ours = loss.evaluate(Raw(out), Raw(out_target), batch).loss
    assert ours.dtype == torch.float32
    assert error(ours, expected, 1e-6) <= 1


def test_what_the_networks_are_given():
    images, labels = torch.randn(4, 3, 2, 2), torch.eye(4)
    net, target = Raw(torch.zeros_like(images)), Raw(torch.zeros_like(images))
    loss = TDEDMLoss()
    torch.manual_seed(0)
    value = loss(
        net, target, images, labels, augment_pipe=lambda images: (2 * images, torch.ones(4, 9))
    )
    torch.manual_seed(0)
    batch = loss.pair(2 * images)
    assert value.shape == (4,)
    assert torch.equal(value, loss.evaluate(Raw(net.out), Raw(target.out), batch).loss)
    assert net.grad_enabled and not target.grad_enabled
    for network, x, sigma in (
        (net, batch.x_t, batch.levels[:, 0]),
        (target, batch.x_tp, batch.levels[:, 2]),
    ):
        (call,) = network.calls
        for received, expected in zip(
            call, (x, sigma.float(), labels, torch.ones(4, 9)), strict=True
        ):
            assert torch.equal(received, expected)


def test_pair_draws():
    """Draws: ln sigma ~ N(P_mean, P_std^2), the noise of each level has its sigma, and the pair is
    coupled as named.
    """
    B = 200_000
    images = torch.zeros(B, 1, dtype=torch.float64)
    torch.manual_seed(0)
    z = (EDMLoss(-1.0, 0.7).pair(images).levels[:, 0].log() + 1.0) / 0.7
    assert abs(z.mean()) < 4 * B**-0.5 and abs(z.var() - 1) < 4 * (2 / B) ** 0.5
    for coupling in ("markov", "shared"):
        batch = TDEDMLoss(coupling=coupling).pair(images, index=torch.full((B,), 6.5))
        sigma, _, sigma_p, _ = batch.levels[0]
        expected = sigma_p**2 if coupling == "markov" else sigma * sigma_p
        for product, mean in (
            (batch.x_t**2, sigma**2),
            (batch.x_tp**2, sigma_p**2),
            (batch.x_t * batch.x_tp, expected),
        ):
            assert abs(product.mean() - mean) < 4 * product.std() / B**0.5, coupling


@pytest.mark.parametrize("make", [EDMLoss, TDEDMLoss, partial(TDEDMLoss, coupling="shared")])
def test_a_seed_repeats_the_pair(make):
    """Torch's global generator is all that a pair depends on; the reference draws the same
    numbers.
    """
    images = torch.randn(4, 3, 5, dtype=torch.float64)
    torch.manual_seed(3)
    first, other = make().pair(images), make().pair(images)
    torch.manual_seed(3)
    again = make().pair(images)
    torch.manual_seed(3)
    reference = make(backend="reference").pair(images)
    assert torch.equal(first.x_t, again.x_t) and not torch.isclose(first.x_t, other.x_t).any()
    torch.testing.assert_close(first.x_t, reference.x_t, rtol=1e-12, atol=1e-12)
    if first.x_tp is not None:
        torch.testing.assert_close(first.x_tp, reference.x_tp, rtol=1e-12, atol=1e-12)


def test_index_and_sigma_are_one_level():
    loss = TDEDMLoss(steps=12, k_idx=2.0)
    images, noise = torch.randn(5, 2, 2), torch.randn(2, 5, 2, 2)
    by_index = loss.pair(
        images, index=torch.tensor([0, 1, 5, 8, 11]), noise=noise[0], noise_p=noise[1]
    )
    by_sigma = loss.pair(images, sigma=by_index.levels[:, 0], noise=noise[0], noise_p=noise[1])
    assert (
        error(by_index.x_t, by_sigma.x_t, 1e-6) <= 1
        and error(by_index.x_tp, by_sigma.x_tp, 1e-6) <= 1
    )
    torch.testing.assert_close(by_index.coef[1:], by_sigma.coef[1:])


def test_td_sigma_window():
    """Outside the window the loss is (1 + lambda) EDM's; inside, it is as without a window."""
    everywhere, window = TDEDMLoss(), TDEDMLoss(td_sigma=(0.3, 5.0))
    net, target = Linear(seed=1).double(), Linear(seed=2).double()
    batch = make_batch(everywhere)
    sigma = batch.levels[:, 0]
    windowed = batch._replace(coef=window.pair(batch.x0, sigma=sigma).coef)
    inside = (sigma >= 0.3) & (sigma <= 5)
    terms, full = window.evaluate(net, target, windowed), everywhere.evaluate(net, target, batch)
    edm = (
        EDMLoss()
        .evaluate(net, None, EDMLoss().pair(batch.x0, sigma=sigma)._replace(x_t=batch.x_t))
        .loss
    )
    assert torch.equal(terms.valid, inside) and 0 < inside.sum() < full.valid.sum()
    assert error(terms.loss[inside], full.loss[inside]) <= 1
    assert error(terms.loss[~inside], 1.5 * edm[~inside]) <= 1


def test_pairwise_x0_weight():
    """1 / (A^2 + A'^2), at most 100, and the TD term so weighed."""
    loss = TDEDMLoss(weight="pairwise_x0", k_idx=0.3, one_idx=0.05)
    batch = loss.pair(
        torch.randn(4, 3, dtype=torch.float64), sigma=torch.tensor([0.01, 0.4, 30.0, 100.0])
    )
    A, A_p, w_td = batch.coef[:, 4:7].unbind(1)
    expected = 1 / (A**2 + A_p**2)
    assert expected[0] < 100 < expected[2]
    expected = expected.clamp(max=100) * torch.tensor([1, 1, 1, 0])  # the last is beyond sigma_max
    torch.testing.assert_close(w_td, expected)
    D, D_p = torch.randn(2, 4, 3, dtype=torch.float64)
    terms = loss.evaluate(lambda *_, **__: D, lambda *_, **__: D_p, batch)
    delta = A[:, None] * (batch.x0 - D) - A_p[:, None] * (batch.x0 - D_p)
    torch.testing.assert_close(terms.td, expected * delta.square().mean(1))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 200), st.floats(0.05, 6.0), st.floats(0.01, 2.0), st.floats(0, 1))
def test_real_index_distances(steps, k_idx, one_idx, share):
    """t' and tau lie any real distance along the schedule, and the term is there as long as tau' is
    on it.
    """
    assume(k_idx + one_idx < steps - 1)  # else no sample has a TD term, which is refused
    index = share * (steps - 1)
    loss = TDEDMLoss(steps=steps, k_idx=k_idx, one_idx=one_idx)
    batch = loss.pair(torch.zeros(1, 2), index=torch.tensor([index], dtype=torch.float64))
    level = lambda i: (
        (80 ** (1 / 7) + min(i, steps - 1) / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    )
    torch.testing.assert_close(
        batch.levels[0],
        torch.tensor(
            [level(index + d) for d in (0, one_idx, k_idx, k_idx + one_idx)], dtype=torch.float64
        ),
        rtol=1e-9,
        atol=0,
    )
    assert bool(batch.coef[0, 6] != 0) == (index <= steps - 1 - (k_idx + one_idx))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nan_of_samples_without_td_stays_out(backend):
    loss = TDEDMLoss(backend=backend)
    batch = make_batch(loss)
    net = Linear(seed=1).double()
    clean = loss.evaluate(net, Linear(seed=2).double(), batch)
    batch.x_tp[~clean.valid] = torch.nan
    assert 0 < clean.valid.sum() < 6
    terms = loss.evaluate(net, Linear(seed=2).double(), batch)
    assert torch.equal(terms.loss, clean.loss)
    (grad,) = torch.autograd.grad(terms.loss.sum(), net.conv.weight)
    assert grad.isfinite().all()


@pytest.mark.parametrize("make", [EDMLoss, TDEDMLoss])
@pytest.mark.parametrize("B", [0, 1])
def test_small_batches(make, B):
    """The published code fails on one valid sample."""
    images = torch.randn(B, 3, 4, 4)
    net = Linear()
    value = make()(net, Linear(seed=1), images)
    assert value.shape == (B,)
    value.sum().backward()
    assert net.conv.weight.grad.isfinite().all()
    terms = TDEDMLoss().evaluate(
        net, Linear(seed=1), TDEDMLoss().pair(images, sigma=torch.full((B,), 0.5))
    )
    assert terms.valid.shape == (B,) and terms.valid.all() and terms.loss.isfinite().all()


def test_bad_arguments():
    images = torch.zeros(2, 3)
    pair = TDEDMLoss().pair
    for call, message in (
        (lambda: EDMLoss(P_std=-1.0), "EDMLoss: P_std must be a number >= 0, got -1.0"),
        (lambda: EDMLoss(sigma_data=0.0), "sigma_data must be a positive number, got 0.0"),
        (
            lambda: TDEDMLoss(lambda_base=-0.5),
            "TDEDMLoss: lambda_base must be a number >= 0, got -0.5",
        ),
        (
            lambda: TDEDMLoss(weight="both"),
            "weight must be one of pairwise, pairwise_x0, online, none, got 'both'",
        ),
        (lambda: TDEDMLoss(coupling="none"), "coupling must be 'markov' or 'shared', got 'none'"),
        (
            lambda: TDEDMLoss(td_sigma=(5.0, 0.3)),
            r"td_sigma must be \(lo, hi\) with lo < hi, got \(5.0, 0.3\)",
        ),
        (lambda: TDEDMLoss(steps=1), "steps must be at least 2, got 1"),
        (
            lambda: pair(images.byte()),
            r"TDEDMLoss: images must be \[B, ...\] of float32 or float64, got \[2, 3\] of "
            r"torch.uint8",
        ),
        (lambda: EDMLoss().pair(torch.tensor(0.0)), r"EDMLoss: images must be \[B, ...\]"),
        (
            lambda: pair(images, sigma=torch.ones(3)),
            r"TDEDMLoss: sigma must have shape \[2\], got \[3\]",
        ),
        (
            lambda: pair(images, index=torch.ones(2, 1)),
            r"TDEDMLoss: index must have shape \[2\], got \[2, 1\]",
        ),
        (
            lambda: pair(images, noise=torch.ones(2)),
            r"TDEDMLoss: noise must have shape \[2, 3\], got \[2\]",
        ),
        (
            lambda: pair(images, noise_p=torch.ones(2)),
            r"TDEDMLoss: noise_p must have shape \[2, 3\], got \[2\]",
        ),
        (
            lambda: pair(images, sigma=torch.ones(2), index=torch.ones(2)),
            "only one of sigma and index may be given, got both",
        ),
        (
            lambda: TDEDMLoss(coupling="shared").pair(images, noise_p=images),
            "noise_p must be None with shared coupling",
        ),
        (
            lambda: TDEDMLoss()(Raw(images), None, images),
            "TDEDMLoss: target_net must be a network, got None",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="backend must be one of"):
        EDMLoss(backend="cupy").pair(images)
