"""The formats of what a run writes, and how an older one is read.

A change of what is written gets a new number, a function in `NEXT_FORMAT`, and an example of the
old format in tests/data.
"""

from dataclasses import asdict

from ..families import FAMILIES

FORMAT = 4

# up to format 3 a thing had other names in some places than in others
RENAMED = {
    "precond": "family",
    "lambda_edm": "lambda_base",
    "td_coupling": "coupling",
    "td_weight": "weight",
    "td_eta": "eta",
    "diffusion_steps": "T",
    "noise_schedule": "beta_schedule",
    "loss_norm": "base_norm",
    "weight_schedule": "base_weight",
}


def _format_2(meta: dict) -> dict:
    """Format 1 knew no augmentation."""
    network = {"augment_dim": 0, **meta["network"]}
    return meta | {"format": 2, "network": network, "options": _options_2(meta["options"])}


def _options_2(options: dict) -> dict:
    return {"augment": 0.0, **options}


def _format_3(meta: dict) -> dict:
    """Format 2 knew no checksums."""
    return meta | {"format": 3}


def _format_4(meta: dict) -> dict:
    """Up to format 3 a network was described by the options that it was made from."""
    parts = {"network": _network_4, "options": _options_4}
    newer = {name: parts[name](meta[name]) for name in parts if name in meta}
    return meta | newer | {"format": 4}


def _options_4(options: dict) -> dict:
    """The options of the losses are apart, and have the losses' own names."""
    options = {RENAMED.get(name, name): value for name, value in options.items()}
    options["td"] = options.pop("loss_type") == "td"
    own = FAMILIES[options["family"]].options
    if "k" in own:
        k = options.pop("k_idx")
        options["k"] = int(k) if k % 1 == 0 else k
    share = {"td_share": 1.0} if "td_share" in own else {}
    every = {name for family in FAMILIES.values() for name in family.options}
    loss = {name: options.pop(name) for name in every & options.keys()}
    loss = {name: loss[name] for name in own if loss.get(name) is not None}
    return options | {"loss": share | loss}


def _network_4(network: dict) -> dict:
    """The classes and their arguments, in place of the options that they were made from."""
    network = {RENAMED.get(name, name): value for name, value in network.items()}
    name, sigma_data = network.pop("family"), network.pop("sigma_data")
    family = FAMILIES[name]
    own = {each: network.pop(each) for each in family.options.keys() & network.keys()}
    loss = family.make_loss(False, {"sigma_data": sigma_data} | own)
    return family.network(loss, **network).to_json()


# what makes a format's meta that of the next
NEXT_FORMAT = {1: _format_2, 2: _format_3, 3: _format_4}


def as_json(options) -> dict:
    """A run's `Options` as its file holds them, for `tdkern train --config`."""
    return {"format": FORMAT, **asdict(options)}


def options_of_today(number: int, options: dict) -> dict:
    """The options of a run in today's names, from those in the format of a number."""
    if type(number) is not int or number < 1:
        raise TypeError("its format is no number from 1 up")
    if number > FORMAT:
        raise ValueError(f"it is in format {number}; this tdkern reads up to {FORMAT}; update it")
    if number < 2:
        options = _options_2(options)
    if number < 4:
        options = _options_4(options)
    return options
