"""Files as EDM's loop writes them, of networks of our own: nothing of EDM's code is needed."""

import sys
from collections import OrderedDict

import numpy as np
import torch

SONG = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 2,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
ADM = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 6,
    "label_dim": 0,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
}


class Record:
    """Pickled as EDM's persistence pickles an object."""

    def __init__(self, class_name, **state):
        self.record = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit\n",
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.record,)


def record(module, **extra):
    """A module as EDM's persistence has it."""
    children = OrderedDict(
        (name, record(child)) for name, child in module._modules.items() if child is not None
    )
    buffers = OrderedDict(
        (name, buffer) for name, buffer in module._buffers.items() if buffer is not None
    )
    return Record(
        type(module).__name__,
        training=False,
        _parameters=OrderedDict(module._parameters),
        _buffers=buffers,
        _non_persistent_buffers_set=set(),
        _modules=children,
        **extra,
    )


def network_record(precond, model, model_arguments, settings, **attributes):
    """The record of a network of EDM's, and the network."""
    torch.manual_seed(0)
    net = precond(
        model(**model_arguments),
        **{
            name: float(value) if isinstance(value, np.generic) else value
            for name, value in settings.items()
        },
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = record(
        net,
        _init_args=(),
        _init_kwargs={},
        img_resolution=8,
        img_channels=3,
        label_dim=model_arguments.get("label_dim", 0),
        **settings,
        **attributes,
    )
    made.record["state"]["_modules"]["model"].record["state"] |= {
        "_init_args": (),
        "_init_kwargs": dict(model_arguments),
    }
    return made, net.eval()
