"""Every family × coupling × prediction × weight, against its textbook in the path's own state and
by finite differences; `pytest -s` prints the table.
"""

import pytest
import torch

import tdkern
from helpers import golden_of
from helpers.families import FAMILIES, Raw, draws, textbook
from helpers.losses import check_edm_golden, check_golden, check_path_golden
from tdkern.ops.td_coef import WEIGHTS

pytestmark = pytest.mark.xdist_group("families")
CELLS = [
    (family, coupling, eta, prediction)
    for family in FAMILIES
    for coupling in ("markov", "shared")
    for eta in family.etas
    if not (coupling == "shared" and eta == 0.0)
    for prediction in family.predictions
]
TABLE = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints, when all is done, what the tests filled in."""
    yield
    width = max((len(name) for name, *_ in TABLE), default=0)
    print(
        f"\n\n{'family':{width}}  {'coupling':13}  {'prediction':10}  "
        + "  ".join(f"{weight:>11}" for weight in WEIGHTS)
        + "  golden"
    )
    for (name, coupling, prediction), row in TABLE.items():
        cells = "  ".join(
            f"{row[weight]:11.0e}" if weight in row else f"{'':11}" for weight in WEIGHTS
        )
        golden = "yes" if "golden" in row else ""
        print(f"{name:{width}}  {coupling:13}  {prediction:10}  {cells}  {golden}".rstrip())
    print(
        "Each number: the gradient's worst relative distance to finite differences. Loss and "
        "weights also agree with the family's textbook."
    )


def slopes(loss, batch, F, F_p, h=1e-3):
    """d loss_b / d F_b,i by central differences, exact for a quadratic loss; samples do not mix, so
    all at once.
    """

    def value(F):
        return loss.evaluate(Raw(F, loss), Raw(F_p, loss), batch).loss

    steps = [h * torch.eye(F.shape[1], dtype=F.dtype)[i] for i in range(F.shape[1])]
    return torch.stack([(value(F + step) - value(F - step)) / (2 * h) for step in steps], 1)


@pytest.mark.parametrize(
    ("family", "coupling", "eta", "prediction"),
    CELLS,
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_cell(family, coupling, eta, prediction):
    """Loss and gradient of each weight; the row of the table has the gradient's error against
    finite differences.
    """
    t, x0, noise, F, F_p = draws(family)
    row = TABLE.setdefault(
        (family.name, coupling if eta is None else f"{coupling}, eta=0", prediction), {}
    )
    for weight in WEIGHTS:
        loss = family.loss(coupling, prediction, weight, eta)
        batch = family.pair(loss, x0, t, noise=noise)
        td, base, valid = textbook(family, coupling, eta, prediction, weight, batch, t, F, F_p)
        F = F.clone().requires_grad_()
        terms = loss.evaluate(Raw(F, loss), Raw(F_p, loss), batch)
        torch.testing.assert_close(
            terms.td.detach(),
            td.detach(),
            rtol=1e-7,
            atol=0,
            msg=lambda text, weight=weight: f"{weight}: {text}",
        )
        torch.testing.assert_close(terms.base.detach(), base.detach(), rtol=1e-9, atol=0)
        assert torch.equal(terms.valid, valid)
        (grad,) = torch.autograd.grad(terms.loss.sum(), F)
        F = F.detach()
        numeric = slopes(loss, batch, F, F_p)
        row[weight] = ((grad - numeric).abs().amax(1) / numeric.abs().amax(1)).max().item()
        assert row[weight] < 1e-6


@pytest.mark.parametrize("family", ["vp", "ve", "edm"])
def test_baseline_golden(family):
    check_edm_golden() if family == "edm" else check_path_golden(family)
    TABLE[family, "no TD", "golden"] = {"golden": True}


@pytest.mark.parametrize("coupling", ["markov", "shared"])
def test_edm_golden(coupling):
    for weight in ("online", "pairwise", "none"):
        check_golden(
            f"td_edm_l0.5_k1_o0.25_n18_{coupling}_w{int(weight != 'none')}",
            weight,
            "auto",
            "cpu",
            torch.float64,
        )
    TABLE.setdefault(("edm", coupling, "edm"), {})["golden"] = True


def test_ct_golden():
    golden = golden_of("td_ct_ns40")
    valid = golden["boundary"] == 0
    for weight, key in (("pairwise_x0", "l2_w1_uniform"), ("none", "l2_w0_uniform")):
        coef, _ = tdkern.td_coef(
            golden["indices"],
            from_index=True,
            steps=40,
            one_idx=float(golden["one_idx"]),
            lambda_base=float(golden["lambda_td"]),
            precond="ct",
            base_weight="uniform",
            weight=weight,
        )
        F, F_p, x0 = (golden[name].double() for name in ("F_t", "F_tp", "x0"))
        terms = tdkern.td_loss(F, F_p, x0, coef, golden["x_t"], golden["x_t2"], base="consistency")
        torch.testing.assert_close(terms[:, 0], golden[f"loss_td__{key}"], rtol=1e-11, atol=0)
        torch.testing.assert_close(terms.sum(1), golden[f"loss__{key}"], rtol=1e-11, atol=0)
        assert 0 < valid.sum() < len(valid)
    TABLE.setdefault(("ct", "markov", "ct"), {})["golden"] = True
