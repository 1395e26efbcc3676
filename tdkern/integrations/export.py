"""Networks as folders that diffusers reads."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from ..data.files import beside, check_new, remove_leftovers, sync_directory, write_atomic
from ..networks import DhariwalUNet
from ..networks.layers import ResBlock
from ..networks.precond import Preconditioned


def export_diffusers(net: Preconditioned, dst: str | Path, *, name: str = "the network") -> str:
    """Write the U-Net of a network as a folder of diffusers' `UNet2DModel`.

    That then computes the same: F(c_in x, c_noise), before c_out and c_skip.

    diffusers' EDMEulerScheduler does an `EDMPrecond`'s preconditioning. A `UNet2DModel` has one
    number of groups in all its normalisations, 32, whole attention heads of 64 channels, a noise
    embedding as wide as its first level, and no scale on its residual sums. So it can be a
    `DhariwalUNet` (ADM) whose levels are multiples of 64 channels from 128 up, the first as wide as
    model_channels, as the published ADM networks are. It cannot be a `SongUNet`, which scales each
    sum by sqrt(1/2) and, in the decoder, has attention in a level's last block alone.

    Args:
        net: such as `load_network` gives.
        dst: a folder that is not there yet.
        name: of the network, for the messages.

    Returns:
        One line that says what was done.

    Raises:
        ValueError: the network has no counterpart in diffusers, or `dst` is there. Nothing is
            written then.
    """
    dst = Path(dst)
    check_new("convert: DST", dst)
    model = _adm_of(net, name)
    config, tensors = _config(model), _tensors(model)
    _write_folder(dst, config, tensors)
    left = "nothing"
    if model.map_augment is not None:
        left = "the augmentation labels' layer, which sampling does without"
    return (
        f"{dst}: the {type(model).__name__} of {name} as a UNet2DModel, to be called with c_in x "
        f"and c_noise of {type(net).__name__}: "
        f"{len(tensors)} tensors, {sum(map(Tensor.numel, tensors.values())):,} numbers; left out: "
        f"{left}"
    )


def _adm_of(net: Preconditioned, name: str) -> DhariwalUNet:
    """The U-Net of a network, where a UNet2DModel computes it; raises ValueError."""
    model = net.model
    reason = (
        "it scales its residual sums by sqrt(1/2), and its decoder has attention in the last "
        "block of a level alone, which a UNet2DModel cannot"
    )
    if isinstance(model, DhariwalUNet):
        reason = _misfit(model)
        if not reason:
            return model
    raise ValueError(
        f"{name}: no UNet2DModel computes this {type(model).__name__}: {reason}; `tdkern "
        "generate` samples from it"
    )


def _write_folder(dst: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """The folder that diffusers reads, whole or not at all."""
    import safetensors.torch

    dst.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(dst.parent, dst.name.__eq__)
    unfinished = beside(dst)
    unfinished.mkdir()
    try:
        write_atomic(unfinished / "config.json", json.dumps(config, indent=2).encode())
        write_atomic(
            unfinished / "diffusion_pytorch_model.safetensors",
            safetensors.torch.save(tensors, {"format": "pt"}),
        )
        os.rename(unfinished, dst)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_directory(dst.parent)


def _block_of(part: nn.ModuleDict, name: str) -> ResBlock:
    return cast("ResBlock", part[name])


def _widths(model: DhariwalUNet) -> list[int]:
    return [_block_of(model.enc, f"{level}_block0").out_channels for level in model.levels]


def _misfit(model: DhariwalUNet) -> str:
    """Why no UNet2DModel computes what a network does; empty if one does."""
    widths, embedding = _widths(model), model.map_layer0.in_features
    if widths[0] != embedding:
        return (
            f"its noise embedding has {embedding} channels and its first level {widths[0]}, which "
            "are one number in a UNet2DModel"
        )
    for width in widths:
        if width < 128 or width % 64:
            return (
                f"a level has {width} channels, and only multiples of 64 from 128 up make its 32 "
                "groups and attention heads of 64"
            )
    return ""


def _config(model: DhariwalUNet) -> dict:
    attends = [_block_of(model.enc, f"{level}_block0").heads > 0 for level in model.levels]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": model.img_resolution,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "block_out_channels": _widths(model),
        "layers_per_block": model.num_blocks,
        "down_block_types": [
            "AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends
        ],
        "up_block_types": [
            "AttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)
        ],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": model.out_norm.eps,
        "act_fn": "silu",
        "dropout": _block_of(model.dec, f"{model.levels[0]}_block0").style.dropout,
        "time_embedding_type": "positional",
        "time_embedding_dim": len(model.map_layer0.weight),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": model.label_dim or None,
    }


def _tensors(model: DhariwalUNet) -> dict[str, Tensor]:
    """The parameters under a UNet2DModel's names.

    In diffusers a level ends with its resampling, in EDM the next begins with it.
    """
    tensors = _layer(model.map_layer0, "time_embedding.linear_1") | _layer(
        model.map_layer1, "time_embedding.linear_2"
    )
    if model.map_label is not None:
        tensors["class_embedding.weight"] = model.map_label.weight.T
    tensors |= _layer(model.enc[f"{model.levels[0]}_conv"], "conv_in")
    enc, dec = partial(_block_of, model.enc), partial(_block_of, model.dec)
    for i, level in enumerate(model.levels):
        if i > 0:
            tensors |= _block(enc(f"{level}_down"), f"down_blocks.{i - 1}", "downsamplers", 0)
        for j in range(model.num_blocks):
            tensors |= _block(enc(f"{level}_block{j}"), f"down_blocks.{i}", "resnets", j)
    for j in range(2):
        tensors |= _block(dec(f"{model.levels[-1]}_in{j}"), "mid_block", "resnets", j)
    for i, level in enumerate(reversed(model.levels)):
        if i > 0:
            tensors |= _block(dec(f"{level}_up"), f"up_blocks.{i - 1}", "upsamplers", 0)
        for j in range(model.num_blocks + 1):
            tensors |= _block(dec(f"{level}_block{j}"), f"up_blocks.{i}", "resnets", j)
    tensors |= _layer(model.out_norm, "conv_norm_out") | _layer(model.out_conv, "conv_out")
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _layer(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """Weight and bias under a layer's new name."""
    return {f"{name}.{key}": each for key, each in layer.named_parameters(recurse=False)}


def _block(block: ResBlock, place: str, kind: str, number: int) -> dict[str, Tensor]:
    name = f"{place}.{kind}.{number}"
    tensors = (
        _layer(block.norm0, f"{name}.norm1")
        | _layer(block.conv0, f"{name}.conv1")
        | _layer(block.affine, f"{name}.time_emb_proj")
    )
    tensors |= _layer(block.norm1, f"{name}.norm2") | _layer(block.conv1, f"{name}.conv2")
    if block.skip is not None and block.skip.weight is not None:
        tensors |= _layer(block.skip, f"{name}.conv_shortcut")
    if block.heads:
        name = f"{place}.attentions.{number}"
        tensors |= _layer(block.norm2, f"{name}.group_norm")
        weight, bias = block.qkv.weight_and_bias
        weight, bias = (
            p.unflatten(0, (block.heads, -1, 3)).movedim(2, 0).flatten(1, 2)
            for p in (weight.flatten(1), bias)
        )
        for i, part in enumerate("qkv"):
            tensors |= {f"{name}.to_{part}.weight": weight[i], f"{name}.to_{part}.bias": bias[i]}
        weight, bias = block.proj.weight_and_bias
        tensors |= {f"{name}.to_out.0.weight": weight.flatten(1), f"{name}.to_out.0.bias": bias}
    return tensors
