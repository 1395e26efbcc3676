"""torchvision where the torch at hand cannot load its compiled operators."""

import sys

import torch

KEPT = []  # a library undoes its declarations when it goes


def stand_in_for_operators() -> None:
    """Import torchvision, which diffusers, piq and torch-fidelity import.

    A build for another device than torch's cannot load its operators: the two that are missed on
    importing it are then declared, and fail if they are called.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        KEPT.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            KEPT[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
