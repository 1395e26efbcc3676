"""Denoising as a Markov reward process (arXiv 2606.15048), in closed form.

It has a reward, a return, a value and a TD error.

A path x_t = alpha_t x0 + sigma_t eps, walked from noise to data, is a chain of states x_t, x_t',
x_t'', ... To each state belongs the mean of x_tau, a little nearer to the data, given the state and
the data (`schedules.two_moment`):

    mu(x_t) = A x0 + kappa x_t                                                       `mean`

The reward of a step from x_t to x_t' is what this mean drifts, known in training, where x0 is:

    R = mu(x_t) - mu(x_t')                                                           `reward`

so a return telescopes: k rewards add up to mu(x_t) - mu(x_t''...), and with the value of the state
    where they end,

    G = R_1 + ... + R_k + V(x_t''...)                                                `k_step_return`

The last state's value is its own mean, so the whole return of x_t is mu(x_t), whatever lies
between. Its expectation is the state's value, and a denoiser D is a value function: what it
predicts is

    V(x_t) = E[mu(x_t) | x_t] = A E[x0 | x_t] + kappa x_t,   modelled by A D(x_t) + kappa x_t
    `value`

Bellman's equation V(x_t) = E[R + V(x_t') | x_t] asks for E[mu(x_t') - V(x_t') | x_t] = 0. It holds
if x_t adds nothing to what x_t' says of x0, which is to say if the states are a Markov chain: that
is the "markov" coupling. If they share their noise, two states together give x0 away, and the
equation does not hold: see the losses. Its residual is the TD error, the loss of `td_loss`:

    delta = R + V(x_t') - V(x_t)
          = (mu(x_t) - mu(x_t')) - (V(x_t) - V(x_t')) = A (x0 - D) - A' (x0 - D')    `td_error`

Every function takes tensors that broadcast and is differentiable by PyTorch. States are the path's
own, alpha_t times EDM's. The losses never form these means: the kappa terms cancel, so `td_loss`
reads A and A' alone.
"""

from collections.abc import Sequence

from torch import Tensor


def mean(x0: Tensor, x_t: Tensor, A: Tensor, kappa: Tensor) -> Tensor:
    """mu(x_t) = A x0 + kappa x_t, the mean of x_tau given the state and the data.

    It is the state's whole return too.
    """
    return A * x0 + kappa * x_t


def value(D: Tensor, x_t: Tensor, A: Tensor, kappa: Tensor) -> Tensor:
    """V(x_t) = A D + kappa x_t, the return that a denoiser D(x_t) expects.

    It is the true value where D = E[x0 | x_t].
    """
    return mean(D, x_t, A, kappa)


def reward(mu: Tensor, mu_p: Tensor) -> Tensor:
    """R = mu(x_t) - mu(x_t'), the drift of the mean in one step."""
    return mu - mu_p


def k_step_return(rewards: Sequence[Tensor], last_value: Tensor) -> Tensor:
    """G = R_1 + ... + R_k + V, with V the value of the state that the k-th step leads to."""
    return sum(rewards) + last_value


def td_error(reward: Tensor, value: Tensor, value_p: Tensor) -> Tensor:
    """delta = R + V(x_t') - V(x_t)."""
    return reward + value_p - value
