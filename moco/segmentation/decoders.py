"""Decoders that turn a backbone's feature maps into logits for every pixel, for any image size.

Most decoders come from segmentation_models_pytorch (an optional extra) and torchvision. The code
here fits them to the feature maps of our backbones.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from moco.errors import InputError
from moco.extras import install_command
from moco.models.swin.backbone import Swin
from moco.models.vit import VisionTransformer

PYRAMID_DECODERS = ("fpn", "unet", "upernet")
DECODERS = (*PYRAMID_DECODERS, "deeplabv3", "fcn", "linear")
DEFAULT_CHANNELS = 256  # width of a pyramid decoder, as in segmentation_models_pytorch

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


def fill_up(x: Tensor, height: int, width: int) -> Tensor:
    """Repeat the last row and column of maps until they have at least this size."""
    missing_rows = max(height - x.shape[-2], 0)
    missing_columns = max(width - x.shape[-1], 0)
    if missing_rows == missing_columns == 0:
        return x
    return F.pad(x, (0, missing_columns, 0, missing_rows), mode="replicate")


def choose_decoder(name: str, freeze_backbone: bool) -> str:
    """Return the decoder's name, with ``auto`` resolved.

    Raises:
        InputError: the decoder needs a package that is not installed.
    """
    if name == "auto":
        name = "linear" if freeze_backbone else "upernet"
    is_missing = importlib.util.find_spec("segmentation_models_pytorch") is None
    if name in PYRAMID_DECODERS and is_missing:
        raise InputError(
            f"decoder={name}: segmentation_models_pytorch is not installed: "
            f"{install_command('segment')}; decoder=fcn, deeplabv3 and linear do not need it"
        )
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


class PyramidDecoder(nn.Module):
    """UPerNet, FPN or U-Net of segmentation_models_pytorch, and a 1x1 convolution to logits.

    UPerNet is arXiv 1807.10221, FPN arXiv 1901.02446, U-Net arXiv 1505.04597. Differs from that
    library's own models: the logits are as fine as the first feature map. Its U-Net goes on to the
    image's size, where it has no features to use.

    The decoders need strides that double from map to map. Maps of one stride are resampled, see
    `resample_to_pyramid`. Swin and ViT normalise only their last map. For them the other maps are
    normalised here, as in Swin's segmentation code; UPerNet has its own normalisation.

    Args:
        name: one of `PYRAMID_DECODERS`.
        channels: width of the decoder.

    Raises:
        InputError: the FPN's GroupNorm cannot have this width.
    """

    def __init__(self, name: str, backbone: Any, num_classes: int, channels: int) -> None:
        super().__init__()
        # An optional package, which takes seconds to import.
        from segmentation_models_pytorch.base import initialization
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        dims, strides = backbone.feature_map_dims, backbone.feature_map_strides
        self.name = name
        self.stride = strides[0]
        # Maps of one stride become a pyramid, whose finest map has a quarter of that stride.
        self.has_one_stride = strides[0] == strides[-1]
        if self.has_one_stride:
            self.stride //= 4
        # The library counts maps from the image's own resolution on. It skips the first ones,
        # which are given no channels here.
        if name == "fpn":
            # Half of the channels are normalised in 32 groups, each of at least two channels.
            if channels % 64 or channels < 128:
                raise InputError(
                    f"decoder.channels={channels}: the FPN needs a multiple of 64, at least 128"
                )
            width = channels // 2
            self.num_skipped_maps = 0
            self.decoder = FPNDecoder(
                list(dims), pyramid_channels=channels, segmentation_channels=width
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
        """Return logits (N, classes, rows, columns) of the cells of the finest map."""
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
