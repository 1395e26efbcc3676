"""The best of the power-function averages."""

import torch

from tdkern.ablation.rivals import WIDTHS, best_width
from tdkern.ema import PowerFunctionEMA


def test_the_best_width_is_the_one_of_the_least_score():
    net = torch.nn.Linear(1, 1, bias=False)
    averages = PowerFunctionEMA(net, WIDTHS)
    for step in range(1, 201):
        net.weight.data.fill_(float(step))
        averages.update(net, step)
    values = {width: each.module.weight.item() for width, each in averages.averages.items()}
    assert 190 < values[WIDTHS[0]] < 200 and values[WIDTHS[-1]] < 160
    score = lambda module: abs(module.weight.item() - values[0.085])
    width, module = best_width(averages, score)
    assert width == 0.085 and module.weight.item() == values[0.085]
