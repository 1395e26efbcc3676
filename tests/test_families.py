"""Every family × coupling × prediction × weight, against its textbook in the path's own state and by finite differences; `pytest -s` prints the table."""
import pytest
import test_losses
import test_path_losses
import torch
from families import FAMILIES, Raw, column, denoised, drift

import tdkern
from tdkern.ops.td_coef import WEIGHTS

CELLS = [(family, coupling, eta, prediction) for family in FAMILIES for coupling in ("markov", "shared") for eta in family.etas
         if not (coupling == "shared" and eta == 0.0) for prediction in family.predictions]
TABLE = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints, when all is done, what the tests filled in."""
    yield
    width = max((len(name) for name, *_ in TABLE), default=0)
    print(f"\n\n{'family':{width}}  {'coupling':13}  {'prediction':10}  " + "  ".join(f"{weight:>11}" for weight in WEIGHTS) + "  golden")
    for (name, coupling, prediction), row in TABLE.items():
        cells = "  ".join(f"{row[weight]:11.0e}" if weight in row else f"{'':11}" for weight in WEIGHTS)
        print(f"{name:{width}}  {coupling:13}  {prediction:10}  {cells}  {'yes' if 'golden' in row else ''}".rstrip())
    print("Each number: the gradient's worst relative distance to finite differences. Loss and weights also agree with the family's textbook.")


def draws(family):
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor(family.times, dtype=torch.float64)
    x0, noise, F, F_p = torch.randn(4, len(t), 3, dtype=torch.float64, generator=generator)
    return t, x0 / 2, noise, F, F_p


def textbook(family, coupling, eta, prediction, weight, batch, t, F, F_p):
    """td and base [B], from the path's own states, four means, and the weights' definitions."""
    alpha, sigma = family.four(t)
    eta = {"markov": 1, "shared": 0}[coupling] if eta is None else eta
    x0, sides = batch.x0, []
    for side, (x, out) in enumerate(((batch.x_t, F), (batch.x_tp, F_p))):
        levels = [column(level, x0) for level in (alpha[2 * side], sigma[2 * side], alpha[2 * side + 1], sigma[2 * side + 1])]
        state = levels[0] * x
        A, kappa = drift(*levels, eta)
        D, slope = denoised(prediction, state, out, *levels[:2])
        sides.append((A * x0 + kappa * state, A * D + kappa * state, D, A[:, 0], slope[:, 0]))
    (mu, model, D, A, c), (mu_p, model_p, D_p, A_p, c_p) = sides
    delta = (mu - mu_p) - (model - model_p)
    w_td = {"pairwise": 1 / ((A * c) ** 2 + (A_p * c_p) ** 2), "pairwise_x0": 1 / (A**2 + A_p**2).clamp(min=0.01),
            "online": 1 / ((A * c) ** 2).clamp(min=1e-8), "none": torch.ones_like(A)}[weight]
    valid = torch.arange(len(t)) < len(t) - 1
    base = (x0 - D) if family.base == "denoise" else (D_p - D)
    w = torch.ones_like(c) if family.name == "ct" else c**-2
    return torch.where(valid, w_td * delta.square().mean(1), 0.0), (0.5 + (~valid).double()) * w * base.square().mean(1), valid


def slopes(loss, batch, F, F_p, h=1e-3):
    """d loss_b / d F_b,i by central differences, exact for a quadratic loss; samples do not mix, so all at once."""
    def value(F):
        return loss.evaluate(Raw(F, loss), Raw(F_p, loss), batch).loss

    steps = [h * torch.eye(F.shape[1], dtype=F.dtype)[i] for i in range(F.shape[1])]
    return torch.stack([(value(F + step) - value(F - step)) / (2 * h) for step in steps], 1)


@pytest.mark.parametrize(("family", "coupling", "eta", "prediction"), CELLS, ids=lambda value: getattr(value, "name", str(value)))
def test_cell(family, coupling, eta, prediction):
    """Loss and gradient of each weight; the row of the table has the gradient's error against finite differences."""
    t, x0, noise, F, F_p = draws(family)
    row = TABLE.setdefault((family.name, coupling if eta is None else f"{coupling}, eta=0", prediction), {})
    for weight in WEIGHTS:
        loss = family.loss(coupling, prediction, weight, eta)
        batch = family.pair(loss, x0, t, noise=noise)
        td, base, valid = textbook(family, coupling, eta, prediction, weight, batch, t, F, F_p)
        F = F.clone().requires_grad_()
        terms = loss.evaluate(Raw(F, loss), Raw(F_p, loss), batch)
        torch.testing.assert_close(terms.td.detach(), td.detach(), rtol=1e-7, atol=0, msg=lambda text, weight=weight: f"{weight}: {text}")
        torch.testing.assert_close(terms.base.detach(), base.detach(), rtol=1e-9, atol=0)
        assert torch.equal(terms.valid, valid)
        (grad,) = torch.autograd.grad(terms.loss.sum(), F)
        F = F.detach()
        numeric = slopes(loss, batch, F, F_p)
        row[weight] = ((grad - numeric).abs().amax(1) / numeric.abs().amax(1)).max().item()
        assert row[weight] < 1e-6


@pytest.mark.parametrize("family", ["vp", "ve", "edm"])
def test_baseline_golden(family):
    test_losses.test_edm_golden() if family == "edm" else test_path_losses.test_golden(family)
    TABLE[family, "no TD", "golden"] = {"golden": True}


@pytest.mark.parametrize("coupling", ["markov", "shared"])
def test_edm_golden(coupling):
    for weight in ("online", "pairwise", "none"):
        test_losses.check_golden(f"td_edm_l0.5_k1_o0.25_n18_{coupling}_w{int(weight != 'none')}", weight, "auto", "cpu", torch.float64)
    TABLE.setdefault(("edm", coupling, "edm"), {})["golden"] = True


def test_ct_golden():
    golden = test_losses.load("td_ct_ns40")
    valid = golden["boundary"] == 0
    for weight, key in (("pairwise_x0", "l2_w1_uniform"), ("none", "l2_w0_uniform")):
        coef, _ = tdkern.td_coef(golden["indices"], from_index=True, steps=40, one_idx=float(golden["one_idx"]), lambda_base=float(golden["lambda_td"]),
                                 precond="ct", base_weight="uniform", weight=weight)
        F, F_p, x0 = (golden[name].double() for name in ("F_t", "F_tp", "x0"))
        terms = tdkern.td_loss(F, F_p, x0, coef, golden["x_t"], golden["x_t2"], base="consistency")
        torch.testing.assert_close(terms[:, 0], golden[f"loss_td__{key}"], rtol=1e-11, atol=0)
        torch.testing.assert_close(terms.sum(1), golden[f"loss__{key}"], rtol=1e-11, atol=0)
        assert 0 < valid.sum() < len(valid)
    TABLE.setdefault(("ct", "markov", "ct"), {})["golden"] = True
