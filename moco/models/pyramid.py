"""Decoders that join the feature maps of a backbone into one fine map.

They are those of segmentation_models_pytorch, an optional extra. Segmentation puts a head of logits
on top. Pretraining can have an FPN without a head, whose weights segmentation takes over.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from moco.errors import InputError
from moco.extras import install_command
from moco.models.swin.backbone import Swin
from moco.models.vit import VisionTransformer

PYRAMID_DECODERS = ("fpn", "unet", "upernet")
DEFAULT_CHANNELS = 256
"""Width of a pyramid decoder, as in segmentation_models_pytorch."""
DROPOUT = 0.2
"""Chance that the FPN drops a channel in training, as in segmentation_models_pytorch."""
HEAD = "head."
"""How the names of a head's weights begin."""


class PyramidDecoder(nn.Module):
    """UPerNet, FPN or U-Net of segmentation_models_pytorch, with a 1x1 convolution to logits.

    UPerNet is arXiv 1807.10221, FPN arXiv 1901.02446, U-Net arXiv 1505.04597. Differs from that
    library's own models: the result is as fine as the first feature map. Its U-Net goes on to the
    image's size, where it has no features to use.

    The decoders need strides that double from map to map. Maps of one stride are resampled, see
    `resample_to_pyramid`. Swin and ViT normalise only their last map. For them the other maps are
    normalised here, as in Swin's segmentation code; UPerNet has its own normalisation.

    Args:
        name: one of `PYRAMID_DECODERS`.
        backbone: has `feature_map_dims` and `feature_map_strides`.
        num_classes: channels of the logits. None: there is no head, and the result is the
            decoder's features, `width` channels of them.
        channels: width of the decoder.
        dropout: chance that the FPN drops a channel in training. The others have none.

    Raises:
        InputError: the decoder cannot have this width, or the backbone has other maps.
    """

    def __init__(
        self,
        name: str,
        backbone: Any,
        num_classes: int | None,
        channels: int,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        # An optional package, which takes seconds to import.
        from segmentation_models_pytorch.base import initialization
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        check_pyramid(backbone, name, f"decoder={name}")
        dims, strides = backbone.feature_map_dims, backbone.feature_map_strides
        self.name = name
        self.stride = pyramid_stride(strides)
        self.has_one_stride = strides[0] == strides[-1]
        # The library counts maps from the image's own resolution on. It skips the first ones,
        # which are given no channels here.
        if name == "fpn":
            check_fpn_width(channels, "decoder.channels")
            width = channels // 2
            self.num_skipped_maps = 0
            self.decoder = FPNDecoder(
                list(dims),
                pyramid_channels=channels,
                segmentation_channels=width,
                dropout=dropout,
            )
        elif name == "unet":
            width = channels // 4
            self.num_skipped_maps = 1
            widths = (channels, channels // 2, width)
            self.decoder = UnetDecoder((0, *dims), widths, n_blocks=3)
        else:
            width = channels
            self.num_skipped_maps = 2
            self.decoder = UPerNetDecoder((0, 0, *dims), decoder_channels=channels)
        self.width = width
        self.head: nn.Module = nn.Identity()
        if num_classes is not None:
            self.head = nn.Conv2d(width, num_classes, kernel_size=1)
        initialization.initialize_decoder(self.decoder)
        initialization.initialize_head(self.head)
        is_transformer = isinstance(backbone, (Swin, VisionTransformer))
        self.norms = nn.ModuleList()
        for dim in dims[:-1]:
            if is_transformer and name != "upernet":
                self.norms.append(LayerNorm2d(dim))
            else:
                self.norms.append(nn.Identity())

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return logits (N, classes, rows, columns) of the cells of the finest map.

        Without a head these are features, (N, width, rows, columns).
        """
        *finer, coarsest = maps
        maps = [norm(x) for norm, x in zip(self.norms, finer, strict=True)]
        maps.append(coarsest)
        if self.has_one_stride:
            maps = resample_to_pyramid(maps)
        # The FPN's maps are padded. What the padding adds is cut off again below.
        num_rows, num_columns = maps[0].shape[-2:]
        if self.name == "fpn":
            maps = pad_to_exact_doubles(maps)
        skipped = [maps[0][:, :0]] * self.num_skipped_maps
        decoded = self.decoder([*skipped, *maps])
        return self.head(decoded[..., :num_rows, :num_columns])


def check_pyramid_library(setting: str, remedy: str = "") -> None:
    """Raise InputError if segmentation_models_pytorch is not installed.

    Args:
        setting: what needs it, such as ``decoder=fpn``.
        remedy: what else can be done, for the end of the message.
    """
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        raise InputError(
            f"{setting}: segmentation_models_pytorch is not installed: "
            f"{install_command('segment')}{remedy}"
        )


def check_fpn_width(channels: int, key: str) -> None:
    """Raise InputError if the FPN's GroupNorm cannot have this width.

    Half of the channels are normalised in 32 groups, each of at least two channels.

    Args:
        channels: the width.
        key: its setting.
    """
    if channels % 64 or channels < 128:
        raise InputError(f"{key}={channels}: the FPN needs a multiple of 64, at least 128")


def check_pyramid(backbone: Any, decoder: str, setting: str) -> None:
    """Raise InputError if a backbone's maps do not form the pyramid that a decoder needs.

    Args:
        backbone: has `feature_map_strides`.
        decoder: one of `PYRAMID_DECODERS`. UPerNet joins any number of maps, the others four.
        setting: what needs the pyramid, such as ``decoder=fpn``.
    """
    strides = list(backbone.feature_map_strides)
    doubled = [strides[0] * 2**place for place in range(len(strides))]
    has_number = len(strides) >= 2 if decoder == "upernet" else len(strides) == 4
    is_pyramid = has_number and strides == doubled
    if not is_pyramid and strides != strides[:1] * 4:
        number = "two or more" if decoder == "upernet" else "four"
        same = "four that are" if decoder == "upernet" else "are"
        raise InputError(
            f"{setting}: needs {number} feature maps whose strides double, or {same} all the same; "
            f"{type(backbone).__name__} has the strides {strides}"
        )


def pyramid_stride(strides: Sequence[int]) -> int:
    """Return how many pixels wide a cell of the finest map of the pyramid is.

    Maps of one stride become a pyramid, whose finest map has a quarter of that stride.

    Args:
        strides: of the backbone's feature maps, px.
    """
    if strides[0] == strides[-1]:
        return strides[0] // 4
    return strides[0]


def resample_to_pyramid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Resample four maps of one stride s, as a ViT has, to the strides s / 4, s / 2, s and 2 s.

    The segmentation code of BEiT (arXiv 2106.08254) does the same with learned layers. Differs from
    it: maps are enlarged bilinearly and four cells are averaged, without weights.
    """
    first, second, third, fourth = maps
    return [
        F.interpolate(first, scale_factor=4, mode="bilinear", align_corners=False),
        F.interpolate(second, scale_factor=2, mode="bilinear", align_corners=False),
        third,
        F.avg_pool2d(fourth, kernel_size=2, ceil_mode=True),
    ]


def pad_to_exact_doubles(maps: Sequence[Tensor]) -> list[Tensor]:
    """Pad four maps so that each has exactly twice the height and width of the next one.

    The FPN doubles a map and adds it to the finer one.
    """
    height, width = maps[-1].shape[-2:]
    padded = []
    for factor, x in zip((8, 4, 2, 1), maps, strict=True):
        padded.append(fill_up(x, factor * height, factor * width))
    return padded


def fill_up(x: Tensor, height: int, width: int) -> Tensor:
    """Repeat the last row and column of maps until they have at least this size."""
    missing_rows = max(height - x.shape[-2], 0)
    missing_columns = max(width - x.shape[-1], 0)
    if missing_rows == missing_columns == 0:
        return x
    return F.pad(x, (0, missing_columns, 0, missing_rows), mode="replicate")
