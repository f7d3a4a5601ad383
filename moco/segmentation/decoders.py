"""Decoders that turn a backbone's feature maps into logits for every pixel, for any image size.

The pyramid decoders of `moco.models.pyramid` and the heads of torchvision are fitted here to the
feature maps of our backbones.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from moco.errors import InputError
from moco.models.pyramid import (
    DEFAULT_CHANNELS,
    PYRAMID_DECODERS,
    PyramidDecoder,
    check_pyramid_library,
    fill_up,
)

DECODERS = (*PYRAMID_DECODERS, "deeplabv3", "fcn", "linear")

# The dilation rates 12, 24 and 36 of DeepLabV3 (arXiv 1706.05587) are for cells of 8 px.
DEEPLAB_REACHES = (96, 192, 288)  # px


class SegmentationModel(nn.Module):
    """A backbone and a decoder: images (N, 3, height, width) to logits of their pixels.

    Args:
        backbone: a module with `feature_maps`, see `build_backbone`.
        decoder: a module with ``stride``, see `build_decoder`.
        freeze_backbone: its weights get no gradient, and it stays in eval mode: without stochastic
            depth, and with the running statistics of BatchNorm as they are.
    """

    def __init__(
        self, backbone: nn.Module, decoder: nn.Module, freeze_backbone: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            backbone.requires_grad_(False)
            backbone.eval()  # Lightning does not call train(), which would do it

    def train(self, mode: bool = True) -> "SegmentationModel":
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes, height, width)."""
        maps = self.backbone.feature_maps(images)  # type: ignore[operator]
        height, width = images.shape[-2:]
        logits = self.decoder(maps)
        return enlarge_logits(logits, self.decoder.stride, height, width)  # type: ignore[arg-type]


def enlarge_logits(logits: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Enlarge logits of cells (N, classes, rows, columns) to logits of pixels, bilinearly.

    Every cell is enlarged to `stride` pixels. Where the image ends inside a cell, the rest is cut
    off. (Squeezing the map into the image, as is usual, would move its far end by up to a cell.)
    A backbone that drops partial patches has no cell for the last pixels of an image: they get the
    nearest logits.

    Args:
        stride: height and width of a cell, px.
        height, width: of the image, px.
    """
    num_rows, num_columns = logits.shape[-2:]
    if stride > 1:
        size = (num_rows * stride, num_columns * stride)
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return fill_up(logits, height, width)[..., :height, :width]


def choose_decoder(name: str, freeze_backbone: bool) -> str:
    """Return the decoder's name, with ``auto`` resolved.

    Raises:
        InputError: the decoder needs a package that is not installed.
    """
    if name == "auto":
        name = "linear" if freeze_backbone else "upernet"
    if name in PYRAMID_DECODERS:
        remedy = "; decoder=fcn, deeplabv3 and linear do not need it"
        check_pyramid_library(f"decoder={name}", remedy)
    return name


def build_decoder(
    name: str, backbone: Any, num_classes: int, channels: int | None = None
) -> nn.Module:
    """Return a freshly initialised decoder for a backbone's feature maps.

    Its attribute ``stride`` says how many pixels wide a cell of its logits is.

    Args:
        name: one of `DECODERS`.
        backbone: has `feature_map_dims` and `feature_map_strides`.
        channels: width of fpn, unet and upernet; None: `DEFAULT_CHANNELS`.

    Raises:
        InputError: the decoder cannot have this width.
    """
    if name in PYRAMID_DECODERS:
        return PyramidDecoder(name, backbone, num_classes, channels or DEFAULT_CHANNELS)
    if channels is not None:
        raise InputError(f"decoder.channels={channels}: the decoder {name} has no such setting")
    dims, strides = backbone.feature_map_dims, backbone.feature_map_strides
    if name == "linear":
        return LinearDecoder(dims, num_classes, strides)
    if name == "fcn":
        return LastMapDecoder(FCNHead(dims[-1], num_classes), strides[-1])
    assert name == "deeplabv3", name  # the schema has no other
    rates = []
    for reach in DEEPLAB_REACHES:
        # Cells of another stride get the same reach in pixels.
        rates.append(max(1, reach // strides[-1]))
    head = DeepLabHead(dims[-1], num_classes, rates)
    return LastMapDecoder(head, strides[-1])


class LastMapDecoder(nn.Module):
    """A head of torchvision on the coarsest map: FCN (arXiv 1411.4038) or DeepLabV3.

    Args:
        head: a map (N, width, rows, columns) to logits (N, classes, rows, columns).
        stride: of the last map, px.
    """

    def __init__(self, head: nn.Module, stride: int) -> None:
        super().__init__()
        self.head = head
        self.stride = stride

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.head(maps[-1])


class LinearDecoder(nn.Module):
    """Logits of a cell that are linear in its features on all maps, normalised by BatchNorm.

    It shows what a frozen backbone has learned, like the linear segmentation head of DINOv2
    (arXiv 2304.07193). The sum of the logits of all maps, each enlarged to the finest map, is the
    linear function of the concatenated features, and needs less memory.

    Args:
        dims: width of each feature map.
        strides: of the feature maps, px.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.stride = strides[0]
        self.factors = [stride // strides[0] for stride in strides]
        self.layers = nn.ModuleList()
        for dim in dims:
            convolution = nn.Conv2d(dim, num_classes, kernel_size=1)
            self.layers.append(nn.Sequential(nn.BatchNorm2d(dim), convolution))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return logits (N, classes, rows, columns) of the cells of the first map."""
        height, width = maps[0].shape[-2:]
        total = self.layers[0](maps[0])
        for layer, x, factor in zip(self.layers[1:], maps[1:], self.factors[1:], strict=True):
            total = total + enlarge_logits(layer(x), factor, height, width)
        return total
