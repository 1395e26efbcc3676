"""Small networks for the losses, and the losses against golden numbers."""

import torch

from helpers import golden_of
from tdkern.losses import EDMLoss, TDEDMLoss, VELoss, VPLoss
from tdkern.preconditioning import EDM


class Raw:
    """A network with EDM's preconditioning whose raw output is given."""

    def __init__(self, out, sigma_data=0.5):
        self.out, self.preconditioning, self.calls = out, EDM(sigma_data), []

    def __call__(self, x, sigma, class_labels=None, augment_labels=None, *, raw):
        assert raw
        self.calls.append((x, sigma, class_labels, augment_labels))
        self.grad_enabled = torch.is_grad_enabled()
        return self.out


class Linear(torch.nn.Module):
    """A small network with EDM's preconditioning, both as F and as D."""

    def __init__(self, sigma_data=0.5, seed=0):
        super().__init__()
        self.sigma_data, self.preconditioning = sigma_data, EDM(sigma_data)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)

    def output(self, x, sigma):
        c_in = (sigma**2 + self.sigma_data**2).rsqrt().reshape(-1, 1, 1, 1)
        return torch.tanh(self.conv(c_in * x) + sigma.log().reshape(-1, 1, 1, 1) / 4)

    def forward(self, x, sigma, class_labels=None, augment_labels=None, *, raw=False):
        s, sd = sigma.reshape(-1, 1, 1, 1), self.sigma_data
        out = self.output(x, sigma)
        return out if raw else sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2).sqrt() * out


def plain(net):
    """The same denoiser as a bare callable, which gives D only."""
    return lambda x, sigma, class_labels=None, augment_labels=None: net(
        x, sigma, class_labels, augment_labels
    )


def error(ours, theirs, tolerance=1e-12):
    """The worst sample's relative L2 distance, in units of `tolerance`."""
    ours, theirs = (
        tensor.detach().cpu().double().reshape(len(tensor), -1) for tensor in (ours, theirs)
    )
    return (
        ((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-300) / tolerance)
        .max()
        .item()
    )


def golden_loss(golden, weight, backend):
    return TDEDMLoss(
        float(golden["P_mean"]),
        float(golden["P_std"]),
        float(golden["sigma_data"]),
        float(golden["lambda_edm"]),
        float(golden["sigma_min"]),
        float(golden["sigma_max"]),
        float(golden["rho"]),
        int(golden["steps"]),
        float(golden["k_idx"]),
        float(golden["one_idx"]),
        "shared" if golden["coupling_shared"] else "markov",
        weight,
        backend=backend,
    )


def golden_batch(loss, golden, device, dtype=torch.float64):
    n1, n2 = (golden[name].to(device, dtype) for name in ("n1", "n2"))
    noises = {"noise": n1} if loss.coupling == "shared" else {"noise": n2, "noise_p": n1}
    return loss.pair(golden["x0"].to(device, dtype), sigma=golden["sigma_t"].to(device), **noises)


def check_golden(name, weight, backend, device, dtype):
    golden = golden_of(name)
    valid, lambda_edm = golden["td_valid"].bool(), golden["lambda_edm"]
    weighted = bool(golden["weight_td"])
    if weight == "none":
        w_td = valid.double()
        losses = golden["td_mse_per"] + (lambda_edm + (~valid).double()) * golden["recon_per"]
        grad = None if weighted else golden["grad_F_t"]
        if not weighted:
            assert error(losses, golden["losses_per"]) <= 1
    else:
        suffix = "_pairwise" if weight == "pairwise" else ""
        w_td, losses, grad = (golden[key + suffix] for key in ("w_td", "losses_per", "grad_F_t"))
        assert error(losses.mean().reshape(1), golden["loss" + suffix].reshape(1)) <= 1

    loss = golden_loss(golden, weight, backend)
    batch = golden_batch(loss, golden, device, dtype)
    F, F_p = (golden[key].to(device, dtype, copy=True).requires_grad_() for key in ("F_t", "F_tp"))
    terms = loss.evaluate(Raw(F), Raw(F_p), batch)
    terms.loss.mean().backward()
    # in float32, an x_t of about 1 carries an error of 2^-24 and the denoising error is about sigma
    tolerance = 1e-12 if dtype == torch.float64 else (2**-24 / golden["sigma_t"]).clamp(min=1e-5)
    assert terms.loss.dtype == dtype
    assert torch.equal(terms.valid.cpu(), valid)
    assert error(batch.coef[:, 6], w_td, 1e-11) <= 1  # 1 / A^2
    assert error(terms.td, w_td * golden["td_mse_per"], tolerance) <= 1
    assert error(terms.base, (lambda_edm + (~valid).double()) * golden["recon_per"], tolerance) <= 1
    assert error(terms.loss, losses, tolerance) <= 1
    if grad is not None:
        assert error(F.grad, grad, tolerance) <= 1
    assert F_p.grad is None


def check_edm_golden():
    golden = golden_of("precond_loss_edm")
    loss = EDMLoss(float(golden["P_mean"]), float(golden["P_std"]), float(golden["sigma_data"]))
    assert error((loss.P_mean + loss.P_std * golden["draw"]).exp(), golden["sigma"]) <= 1
    y, n, D = (golden[key].double() for key in ("y", "n", "D"))
    D.requires_grad_()
    batch = loss.pair(y, sigma=golden["sigma"], noise=n)
    terms = loss.evaluate(lambda x, sigma: D, None, batch)
    terms.loss.sum().backward()
    n_elements = y[0].numel()
    assert error(batch.x_t, golden["x_noisy"]) <= 1
    assert error(batch.coef[:, 7], golden["weight"]) <= 1
    assert error(terms.loss, golden["loss_elementwise"].mean((1, 2, 3))) <= 1
    assert error(D.grad * n_elements / len(y), golden["grad_D"]) <= 1
    assert not terms.valid.any() and (terms.td == 0).all()


def check_path_golden(family):
    golden = golden_of(f"precond_loss_{family}")
    keys = ("beta_d", "beta_min", "epsilon_t") if family == "vp" else ("sigma_min", "sigma_max")
    loss = {"vp": VPLoss, "ve": VELoss}[family](*(float(golden[key]) for key in keys))
    t = 1 + golden["draw"] * (loss.epsilon_t - 1) if family == "vp" else golden["draw"]
    y, n, D = (golden[key].double() for key in ("y", "n", "D"))
    D.requires_grad_()
    batch = loss.pair(y, t=t, noise=n)
    terms = loss.evaluate(lambda x, sigma: D, None, batch)
    terms.loss.sum().backward()
    close = lambda ours, theirs: torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    close(batch.levels[:, 0], golden["sigma"])
    close(batch.coef[:, 7], golden["weight"])
    close(batch.x_t, golden["x_noisy"])
    close(terms.loss.detach(), golden["loss_elementwise"].mean((1, 2, 3)))
    close(D.grad * y[0].numel() / len(y), golden["grad_D"])
    assert not terms.valid.any()
