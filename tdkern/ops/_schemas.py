"""The schema of every op, and their hash, which a compiled library carries: run as a script, by the
build, this prints it.

Imports nothing of the package, so that the build can run it. Every backend's overload of an op has
this schema.
"""

import hashlib

_TD_LOSS = (
    "Tensor out, Tensor out_target, Tensor x0, Tensor coef, Tensor? x_t, Tensor? x_tp, "
    "bool consistency, bool l1"
)
SCHEMAS = {
    "td_coef": (
        "(Tensor noise, bool from_index, int steps, float sigma_min, float sigma_max, float rho, "
        "float sigma_data, float k_idx, "
        "float one_idx, float lambda_base, str precond, str base_weight, float eta, str weight, "
        "float td_lo, float td_hi) "
        "-> (Tensor coef, Tensor levels)"
    ),
    "noise_pair": (
        "(Tensor x0, Tensor alpha, Tensor sigma, Tensor alpha_p, Tensor sigma_p, bool shared, "
        "SymInt seed, Tensor? seed_at, "
        "SymInt offset, Tensor? offset_at, SymInt first_sample) -> (Tensor x_t, Tensor x_tp)"
    ),
    "td_loss": f"({_TD_LOSS}, bool want_grad) -> (Tensor loss, Tensor grad)",
    "td_loss_backward_": f"(Tensor(a!) grad, Tensor upstream, {_TD_LOSS}) -> ()",
    "ema_update_": "(Tensor(a!)[] averages, Tensor[] params, Tensor decays) -> ()",
    "found_inf": "(Tensor[] grads, Tensor? grad_scale, Tensor? clip) -> Tensor",
    "adam_ema_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, "
        "Tensor(e!)[] averages, Tensor decays, Tensor lr, Tensor found_inf, Tensor? grad_scale, "
        "Tensor? clip, Tensor(f!)? skipped, "
        "float beta1, float beta2, float eps, float weight_decay, bool decoupled) -> ()"
    ),
    "heun_step": (
        "(Tensor F, Tensor x, Tensor coef, Tensor? x_hat, Tensor? noise, ScalarType? net_dtype) -> "
        "(Tensor x_next, Tensor net_input)"
    ),
}


def digest() -> str:
    """The hash of all schemas: a library that carries another was built for other ones."""
    lines = [name + schema for name, schema in sorted(SCHEMAS.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    print(digest())
