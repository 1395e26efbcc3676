"""The settings of published runs, for `tdkern train --preset`.

What a source leaves out is a default.

Sources: EDM (arXiv 2206.00364, table 6 and its published commands), TD+EDM and TD+CT (2606.15048
and the published commands), CT (2303.01469), improved CT (2310.14189), easy consistency tuning
(2406.14548 and the published command).
"""

EDM_CIFAR10 = {"family": "edm", "td": False, "cond": True, "arch": "ddpmpp", "batch": 512}
EDM_64 = EDM_CIFAR10 | {
    "cond": False,
    "batch": 256,
    "cres": [1, 2, 2, 2],
    "lr": 2e-4,
    "augment": 0.15,
}
EDM_IMAGENET = {
    "family": "edm",
    "td": False,
    "cond": True,
    "arch": "adm",
    "duration": 2500.0,
    "batch": 4096,
    "lr": 1e-4,
    "ema": 50.0,
    "dropout": 0.10,
    "augment": 0.0,
    "precision": "fp16",
    "tick": 200.0,
}
# the learning rate is that of the published command, which trained its EDM baseline with it too
TD_CIFAR10 = EDM_CIFAR10 | {"td": True, "lr": 2e-4}
PUBLISHED_TD = {"k_idx": 3.0, "one_idx": 0.2, "weight": "online"}
WINDOW = {"weight": "online", "td_sigma": [0.3, 5.0]}

CT_CIFAR10 = {
    "family": "ct",
    "td": False,
    "arch": "ncsnpp",
    "batch": 512,
    "optim": "radam",
    "lr": 2e-4,
    "augment": 0.0,
    "loss": {"base_norm": "lpips"},
}
ICT_CIFAR10 = CT_CIFAR10 | {
    "batch": 1024,
    "lr": 1e-4,
    "dropout": 0.3,
    "duration": 409.6,  # 400,000 steps
    "scale_mode": "exponential",
    "target_ema_mode": "fixed",
    "start_ema": 0.0,
    "loss": {"base_norm": "huber", "base_weight": "inverse-step", "lognormal": [-1.1, 2.0]},
}
# from EDM's weights, by --transfer; the published command has --start-scales 2 and
# --total-training-steps 25000, whose last stage is this one
ECT_CIFAR10 = {
    "family": "ct",
    "td": False,
    "arch": "ddpmpp",
    "batch": 128,
    "duration": 25.6,
    "optim": "radam",
    "lr": 1e-4,
    "dropout": 0.2,
    "augment": 0.0,
    "ema": 0.127,  # half-life of the decay .9993
    "scale_mode": "easy",
    "start_scales": 256,
    "target_ema_mode": "fixed",
    "start_ema": 0.0,
    "loss": {
        "base_norm": "huber",
        "huber_c": 0.0,
        "base_weight": "inverse-step",
        "lognormal": [-1.1, 2.0],
    },
}

PRESETS = {
    # EDM, and with the paper's TD term
    "edm-cifar10": EDM_CIFAR10,
    "edm-ffhq": EDM_64 | {"dropout": 0.05},
    "edm-afhqv2": EDM_64 | {"dropout": 0.25},
    "edm-imagenet64": EDM_IMAGENET,
    "td-cifar10": TD_CIFAR10,
    "td-ffhq": EDM_64 | {"td": True, "dropout": 0.05},
    "td-afhqv2": EDM_64 | {"td": True, "dropout": 0.25},
    "td-imagenet64": EDM_IMAGENET | {"td": True},
    # what the published command sets, where it differs from the paper
    "td-cifar10-published": TD_CIFAR10 | {"loss": PUBLISHED_TD},
    # TD at the noise levels alone where it helps, and the target network on their share of a batch
    "td-window": TD_CIFAR10 | {"loss": WINDOW},
    # a small network, for comparisons
    "edm-small": EDM_CIFAR10 | {"cbase": 64, "cres": [1, 2, 2], "batch": 128, "duration": 20.0},
    "td-small": TD_CIFAR10 | {"cbase": 64, "cres": [1, 2, 2], "batch": 128, "duration": 20.0},
    # consistency training, improved, and with TD
    "ct-cifar10": CT_CIFAR10,
    "ict-cifar10": ICT_CIFAR10,
    "ect-cifar10": ECT_CIFAR10,
    "td-ct-cifar10": CT_CIFAR10 | {"td": True},
}
