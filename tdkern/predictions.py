"""What a network may predict, as the two numbers of D = skip x + scale F in EDM's state x = x_t / alpha_t = x0 + sigma_hat eps."""
import torch
from torch import Tensor

# The values of a network's attribute `precond` whose raw output F has these two numbers
PRECONDS = {"x0": ("x0",), "eps": ("eps", "vp", "iddpm"), "v": ("v",), "velocity": ("velocity",), "score": ("ve",)}


def skip_scale(prediction: str, sigma_hat: Tensor) -> tuple[Tensor, Tensor]:
    """(skip, scale) of a prediction at the noise levels sigma_hat = sigma_t / alpha_t, any shape, in their dtype.

    | prediction | F | path | D |
    | --- | --- | --- | --- |
    | "x0" | x0 | any | F |
    | "eps" | eps | any | x - sigma_hat F |
    | "v" (arXiv 2202.00512) | alpha_t eps - sigma_t x0 | VP | x/(1 + sigma_hat^2) - sigma_hat/sqrt(1 + sigma_hat^2) F |
    | "velocity" (arXiv 2210.02747) | eps - x0 | flow | (x - sigma_hat F)/(1 + sigma_hat) |
    | "score" (arXiv 2011.13456) | sigma_hat times the score, -eps | VE | x + sigma_hat F |
    """
    one = torch.ones_like(sigma_hat)
    if prediction == "x0":
        return 0 * one, one
    if prediction == "eps":
        return one, -sigma_hat
    if prediction == "v":
        return 1 / (1 + sigma_hat**2), -sigma_hat * (1 + sigma_hat**2).rsqrt()
    if prediction == "velocity":
        return 1 / (1 + sigma_hat), -sigma_hat / (1 + sigma_hat)
    if prediction == "score":
        return one, sigma_hat
    raise ValueError(f"prediction must be one of {', '.join(PRECONDS)}, got {prediction!r}")
