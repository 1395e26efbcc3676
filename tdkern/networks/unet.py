"""The U-Nets of EDM: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

They have the constructor arguments and parameter names of EDM's checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import half
from .layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    ResBlock,
)
from .remembered import Remembered


class UNet(Remembered):
    """The encoder and decoder that both networks share.

    Set `checkpointing` to recompute blocks in the backward pass instead of keeping their
    activations. In half precision activations lie in memory as `half` says, whatever the image is;
    in float32 they have the image's memory format.
    """

    checkpointing = False

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int,
        augment_dim: int,
        label_dropout: float,
    ):
        super().__init__()
        self.img_resolution = img_resolution
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout

    def _build(
        self,
        stem: int,
        widths: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
        style: BlockStyle,
        heads: Callable[[int], int],
        attend_all: bool,
        encoder_type: str = "standard",
    ) -> None:
        """Add `enc` and `dec`.

        Args:
            stem: channels of the first layer.
            widths: channels of each level.
            num_blocks, attn_resolutions, encoder_type: as `SongUNet`'s.
            style: of all blocks.
            heads: the attention heads at so many channels.
            attend_all: in the decoder, all blocks of a level at `attn_resolutions` have attention,
                else the last one only.
        """
        name, halvings = type(self).__name__, len(widths) - 1
        if self.img_resolution % 2**halvings:
            raise ValueError(
                f"{name}: img_resolution must be a multiple of {2**halvings}, as it has "
                f"{len(widths)} levels, got {self.img_resolution}"
            )
        if not 0 <= style.dropout <= 1:
            raise ValueError(f"{name}: dropout must be in [0, 1], got {style.dropout}")
        self.encoder_type, self.num_blocks = encoder_type, num_blocks
        resolutions = [self.img_resolution >> i for i in range(len(widths))]
        self.levels = [f"{resolution}x{resolution}" for resolution in resolutions]

        def attention(resolution: int, channels: int) -> int:
            return heads(channels) if resolution in attn_resolutions else 0

        skips = self._build_encoder(stem, widths, resolutions, style, attention)
        self._build_decoder(skips, widths, resolutions, style, attention, heads, attend_all)

    def _build_encoder(
        self, stem: int, widths: Sequence[int], resolutions: list[int], style: BlockStyle, attention
    ) -> list[int]:
        """Add `enc`; returns the channels of every layer's output."""
        self.enc = nn.ModuleDict()
        channels = stem
        aux_channels = self.in_channels
        skips = []
        for level, resolution, width in zip(self.levels, resolutions, widths, strict=True):
            if level == self.levels[0]:
                self.enc[f"{level}_conv"] = Conv2d(self.in_channels, stem, 3, style.init)
            else:
                self.enc[f"{level}_down"] = ResBlock(channels, channels, style, down=True)
                if self.encoder_type == "skip":
                    self.enc[f"{level}_aux_down"] = Conv2d(
                        aux_channels,
                        aux_channels,
                        0,
                        down=True,
                        resample_filter=style.resample_filter,
                    )
                    self.enc[f"{level}_aux_skip"] = Conv2d(aux_channels, channels, 1, style.init)
                if self.encoder_type == "residual":
                    self.enc[f"{level}_aux_residual"] = Conv2d(
                        aux_channels,
                        channels,
                        3,
                        style.init,
                        down=True,
                        fused=True,
                        resample_filter=style.resample_filter,
                    )
                    aux_channels = channels
            skips.append(channels)
            for j in range(self.num_blocks):
                self.enc[f"{level}_block{j}"] = ResBlock(
                    channels, width, style, heads=attention(resolution, width)
                )
                channels = width
                skips.append(channels)
        return skips

    def _build_decoder(
        self,
        skips: list[int],
        widths: Sequence[int],
        resolutions: list[int],
        style: BlockStyle,
        attention,
        heads: Callable[[int], int],
        attend_all: bool,
    ) -> None:
        """Add `dec`, whose blocks take what the encoder left, from the end."""
        self.dec = nn.ModuleDict()
        channels = skips[-1]
        levels = list(zip(self.levels, resolutions, widths, strict=True))
        for level, resolution, width in reversed(levels):
            if level == self.levels[-1]:
                self.dec[f"{level}_in0"] = ResBlock(
                    channels, channels, style, heads=heads(channels)
                )
                self.dec[f"{level}_in1"] = ResBlock(channels, channels, style)
            else:
                self.dec[f"{level}_up"] = ResBlock(channels, channels, style, up=True)
            for j in range(self.num_blocks + 1):
                attends = attend_all or j == self.num_blocks
                self.dec[f"{level}_block{j}"] = ResBlock(
                    channels + skips.pop(),
                    width,
                    style,
                    heads=attention(resolution, width) if attends else 0,
                )
                channels = width

    def _labels(self, class_labels: Tensor | None, emb: Tensor) -> Tensor:
        """Class labels in the embedding's dtype.

        In training, rows are zeroed with probability `label_dropout`.
        """
        shape = None if class_labels is None else list(class_labels.shape)
        if class_labels is None or shape != [emb.shape[0], self.label_dim]:
            raise ValueError(
                f"{type(self).__name__}: class_labels must have shape "
                f"{[emb.shape[0], self.label_dim]}, got {shape}"
            )
        class_labels = class_labels.to(emb.dtype)
        if self.training and self.label_dropout:
            class_labels = class_labels * (torch.rand_like(emb[:, :1]) >= self.label_dropout)
        return class_labels

    def _block(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing:
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The output of every layer of the encoder, for the decoder to take from the end."""
        if x.dtype.itemsize == 2:
            x = x.contiguous(memory_format=half.image_format(x))
        aux, skips = x, []
        for level in self.levels:
            if level == self.levels[0]:
                x = self.enc[f"{level}_conv"](x)
            else:
                x = self._block(self.enc[f"{level}_down"], x, emb)
                if self.encoder_type == "skip":
                    aux = self.enc[f"{level}_aux_down"](aux)
                    x = x + self.enc[f"{level}_aux_skip"](aux)
                if self.encoder_type == "residual":
                    x = aux = (x + self.enc[f"{level}_aux_residual"](aux)) * 0.5**0.5
            skips.append(x)
            for j in range(self.num_blocks):
                x = self._block(self.enc[f"{level}_block{j}"], x, emb)
                skips.append(x)
        return skips

    def _decode(self, skips: list[Tensor], emb: Tensor) -> list[Tensor]:
        """The output of each level of the decoder, from the lowest resolution to the highest."""
        x, outputs = skips[-1], []
        for level in reversed(self.levels):
            for name in ("in0", "in1") if level == self.levels[-1] else ("up",):
                x = self._block(self.dec[f"{level}_{name}"], x, emb)
            for j in range(self.num_blocks + 1):
                x = self._block(self.dec[f"{level}_block{j}"], torch.cat([x, skips.pop()], 1), emb)
            outputs.append(x)
        return outputs


class SongUNet(UNet):
    """DDPM++ and NCSN++ (Song et al., arXiv 2011.13456), as in EDM.

    (arXiv 2206.00364, appendix C.2 and F.1.)

    Args:
        img_resolution: height and width in pixels, a multiple of 2^(levels - 1); names the layers
            and places the attention.
        in_channels, out_channels: channels of the image and of the output.
        label_dim, augment_dim: widths of the class and augmentation labels, 0 for none.
        model_channels, channel_mult: width, and its multiple at each level, from the full
            resolution down.
        channel_mult_emb, channel_mult_noise: multiples of `model_channels` for the embedding and
            the noise embedding.
        num_blocks: residual blocks of each level.
        attn_resolutions: resolutions with self-attention.
        dropout: of activations, in training. label_dropout: probability that a sample's class
            labels are zeroed in training.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        encoder_type: "standard" (DDPM++), "residual" (NCSN++) or "skip". decoder_type: "standard"
            or "skip".
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).

    Raises:
        ValueError: an argument is not one of the names above, img_resolution does not divide, or
            dropout is not in [0, 1].
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        kinds = {
            "embedding_type": (embedding_type, ("positional", "fourier")),
            "encoder_type": (encoder_type, ("standard", "skip", "residual")),
            "decoder_type": (decoder_type, ("standard", "skip")),
        }
        for argument, (value, allowed) in kinds.items():
            if value not in allowed:
                known = ", ".join(allowed)
                raise ValueError(f"SongUNet: {argument} must be one of {known}, got {value!r}")
        super().__init__(
            img_resolution, in_channels, out_channels, label_dim, augment_dim, label_dropout
        )
        self.decoder_type = decoder_type
        noise_channels = model_channels * channel_mult_noise
        style = BlockStyle(
            model_channels * channel_mult_emb,
            dropout,
            Init("xavier_uniform"),
            Init("xavier_uniform", 1e-5),
            init_attn=Init("xavier_uniform", 0.2**0.5),
            scale_shift=False,
            skip_scale=0.5**0.5,
            eps=1e-6,
            project_skip=True,
            resample_filter=tuple(resample_filter),
        )
        self._build_embedding(embedding_type == "fourier", noise_channels, style)
        widths = [model_channels * mult for mult in channel_mult]
        one_head = lambda channels: 1
        self._build(
            model_channels,
            widths,
            num_blocks,
            attn_resolutions,
            style,
            one_head,
            False,
            encoder_type,
        )
        self._build_outputs(widths, style)

    def _build_embedding(self, fourier: bool, channels: int, style: BlockStyle) -> None:
        """Add the layers that embed c_noise and the labels."""
        self.map_noise: nn.Module
        if fourier:
            self.map_noise = FourierEmbedding(channels)
        else:
            self.map_noise = PositionalEmbedding(channels, endpoint=True)
        self.map_label = self.map_augment = None
        if self.label_dim:
            self.map_label = Linear(self.label_dim, channels, style.init)
        if self.augment_dim:
            self.map_augment = Linear(self.augment_dim, channels, style.init, bias=False)
        self.map_layer0 = Linear(channels, style.emb_channels, style.init)
        self.map_layer1 = Linear(style.emb_channels, style.emb_channels, style.init)

    def _build_outputs(self, widths: Sequence[int], style: BlockStyle) -> None:
        """Add the layers of the decoder that give the image: at full resolution, or at each
        level.
        """
        each_level, channels = self.decoder_type == "skip", self.out_channels
        for level, width in reversed(list(zip(self.levels, widths, strict=True))):
            if level == self.levels[0] or each_level:
                if level != self.levels[-1] and each_level:
                    self.dec[f"{level}_aux_up"] = Conv2d(
                        channels, channels, 0, up=True, resample_filter=style.resample_filter
                    )
                self.dec[f"{level}_aux_norm"] = GroupNorm(width, style.eps)
                self.dec[f"{level}_aux_conv"] = Conv2d(width, channels, 3, style.init_zero)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The raw output F [B, out_channels, H, W] in x's dtype.

        It is computed from the scaled image x [B, in_channels, H, W] and c_noise [B].

        The embedding is computed in c_noise's dtype.

        Args:
            x, noise_labels: the scaled image and c_noise.
            class_labels: [B, label_dim], one-hot floats, if label_dim is not 0.
            augment_labels: [B, augment_dim], or None, which stands for zeros.

        Gradients to all floating inputs and parameters. Deterministic outside training.
        """
        emb = torch.cat(self.map_noise(noise_labels).chunk(2, 1)[::-1], 1)  # sines first
        if self.map_label is not None:
            emb = emb + self.map_label(self._labels(class_labels, emb) * self.label_dim**0.5)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        outputs = self._decode(self._encode(x, emb), emb)
        if self.decoder_type != "skip":
            return self._image(self.levels[0], outputs[-1])
        aux = self._image(self.levels[-1], outputs[0])
        for level, h in zip(reversed(self.levels[:-1]), outputs[1:], strict=True):
            aux = self.dec[f"{level}_aux_up"](aux) + self._image(level, h)
        return aux

    def _image(self, level: str, h: Tensor) -> Tensor:
        """What the output of a level of the decoder adds to F."""
        norm = cast("GroupNorm", self.dec[f"{level}_aux_norm"])
        return self.dec[f"{level}_aux_conv"](norm.silu(h))


class DhariwalUNet(UNet):
    """ADM (Dhariwal and Nichol, arXiv 2105.05233), as in EDM.

    (arXiv 2206.00364, appendix C.2 and F.1.)

    Args and Raises: as SongUNet. Attention has heads of 64 channels, and is left out of
    layers with fewer.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ):
        super().__init__(
            img_resolution, in_channels, out_channels, label_dim, augment_dim, label_dropout
        )
        init = Init("kaiming_uniform", (1 / 3) ** 0.5, (1 / 3) ** 0.5)
        init_zero = Init("kaiming_uniform", 0)
        emb_channels = model_channels * channel_mult_emb
        style = BlockStyle(
            emb_channels,
            dropout,
            init,
            init_zero,
            init_attn=init,
            scale_shift=True,
            skip_scale=1,
            eps=1e-5,
            project_skip=False,
        )

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = (
            Linear(augment_dim, model_channels, init_zero, bias=False) if augment_dim else None
        )
        self.map_layer0 = Linear(model_channels, emb_channels, init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init)
        self.map_label = (
            Linear(label_dim, emb_channels, Init("kaiming_normal", label_dim**0.5), bias=False)
            if label_dim
            else None
        )

        widths = [model_channels * mult for mult in channel_mult]
        self._build(
            widths[0],
            widths,
            num_blocks,
            attn_resolutions,
            style,
            lambda channels: channels // 64,
            True,
        )
        self.out_norm = GroupNorm(widths[0])
        self.out_conv = Conv2d(widths[0], out_channels, 3, init_zero)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """As SongUNet's."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._labels(class_labels, emb))
        emb = F.silu(emb)
        h = self._decode(self._encode(x, emb), emb)[-1]
        return self.out_conv(self.out_norm.silu(h))
