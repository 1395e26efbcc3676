"""What else lowers the variance of training, or of its result; each goes with and without TD.

The stable target field is `losses.stable_target`. A larger batch is the first of them, and needs no
code: a run's batch times a factor.
"""

from collections.abc import Callable

from torch import nn

from ..ema import PowerFunctionEMA

# relative widths of power-function averages, about a factor of 1.4 apart
WIDTHS = (0.02, 0.03, 0.04, 0.06, 0.085, 0.12, 0.17, 0.24)


def best_width(
    averages: PowerFunctionEMA, score: Callable[[nn.Module], float]
) -> tuple[float, nn.Module]:
    """Of EDM2's power-function averages the one of the least score: its width and its network.

    Args:
        averages: such as `PowerFunctionEMA(net, WIDTHS)`, after training.
        score: of a network, less being better, on other draws than the ones that are reported.
    """
    networks = {width: average.module for width, average in averages.averages.items()}
    width = min(networks, key=lambda width: score(networks[width]))
    return width, networks[width]
