"""Lists for adam_ema_, and how its results are compared."""

import torch

from helpers.cases import DTYPES, channels_last, gaps, offset, swapped

SHAPES = [(1003,), (3, 5, 7, 2), (), (0,), (40, 5), (4097,)]
DECAYS = [0.9, 0.99, 0.5]
AS_IT_IS = torch.Tensor.contiguous
LIE = {
    "misaligned": (offset,) * 5,
    "channels_last": (channels_last,) * 5,
    "gradient channels_last": (channels_last, *(AS_IT_IS,) * 4),
    "averages gaps": (*(AS_IT_IS,) * 4, gaps),
    "all gaps": (gaps,) * 5,
    "state swapped": (AS_IT_IS, swapped, swapped, AS_IT_IS, AS_IT_IS),
}


def problem(dtypes="float64", device="cpu", K=2, shapes=SHAPES, lie=(AS_IT_IS,) * 5, steps=3):
    """adam_ema_'s lists in its order: params, grads, exp_avgs, exp_avg_sqs, steps, averages,
    decays.
    """
    random = torch.Generator().manual_seed(0)
    net, wide = DTYPES[dtypes]

    def draw(lie, dtype, positive=False):
        values = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
        return [lie((value.abs() if positive else value).to(device, dtype)) for value in values]

    grads = draw(lie[0], net)
    exp_avgs = draw(lie[1], net)
    exp_avg_sqs = draw(lie[2], net, True)
    params = draw(lie[3], net)
    averages = [draw(lie[4], wide) for _ in range(K)]
    counts = [torch.tensor(float(steps + i), device=device) for i in range(len(shapes))]
    return [params, grads, exp_avgs, exp_avg_sqs, counts, averages, DECAYS[:K]]


def flatten(lists):
    return [tensor for column in (*lists[:5], *lists[5]) for tensor in column]


def widened(lists):
    double = lambda column: [
        tensor.double().cpu().clone(memory_format=torch.contiguous_format) for tensor in column
    ]
    return [
        *(double(column) for column in lists[:4]),
        [step.cpu().clone() for step in lists[4]],
        [double(average) for average in lists[5]],
        lists[6],
    ]


def close(actual, expected, backend):
    """To the rounding of the parameters, which their averages see."""
    dtype = actual[0][0].dtype
    eps = torch.finfo(dtype).eps
    # the interpreter cuts off instead of rounding
    ulps = 16 if backend == "triton" and dtype == torch.bfloat16 else 8
    for tensor, want in zip(flatten(actual), flatten(expected), strict=True):
        torch.testing.assert_close(
            tensor.double().cpu(), want.double(), rtol=ulps * eps, atol=ulps * eps
        )
