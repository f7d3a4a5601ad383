"""From feature maps to classes: a backbone under our contract and the decoder of a library, for images of any size.

The decoders are segmentation_models_pytorch's (an optional extra) and torchvision's; what stands here fits them to the maps.

Letters: N batch, C classes, D_1 to D_4 the maps' widths, H W pixels, h w cells of a map.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import ResNet
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from moco.errors import InputError
from moco.models.swin.backbone import Swin
from moco.models.vit import VisionTransformer

PYRAMID_DECODERS = ("fpn", "unet", "upernet")
DECODERS = (*PYRAMID_DECODERS, "deeplabv3", "fcn", "linear")


class SegmentationModel(nn.Module):
    """A backbone and a decoder: images (N, 3, H, W) to logits (N, C, H, W).

    Args:
        backbone: of `build_backbone`.
        decoder: of `build_decoder`.
        freeze_backbone: its weights get no gradient, and it stays in eval mode: no stochastic depth, and BatchNorm as it
            was left.
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
            backbone.eval()  # Lightning calls no train(), which would do it

    def train(self, mode: bool = True) -> "SegmentationModel":
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone.feature_maps(images)  # type: ignore[operator]  # [(N, D_1, h, w), ...], the first the finest
        height, width = images.shape[-2:]
        return enlarged(self.decoder(maps), self.decoder.stride, (height, width))  # type: ignore[arg-type]


def enlarged(logits: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Logits of cells (N, C, h, w) as logits of pixels (N, C, *size), bilinearly.

    A cell is `stride` pixels wide to the last: where the image ends inside a cell, the rest is cut off. (To squeeze the
    map into the image instead, as is usual, moves its far end by up to a cell.) Pixels past the last cell, of a backbone
    that drops partial patches, get the nearest logits.
    """
    height, width = (cells * stride for cells in logits.shape[-2:])
    if stride > 1:
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    if height < size[0] or width < size[1]:
        logits = F.pad(
            logits, (0, max(size[1] - width, 0), 0, max(size[0] - height, 0)), mode="replicate"
        )
    return logits[..., : size[0], : size[1]]


def build_decoder(
    name: str, backbone: Any, num_classes: int, channels: int | None = None
) -> nn.Module:
    """A freshly initialised decoder for a backbone's maps; ``stride`` says how many pixels wide its cells are.

    Args:
        name: one of `DECODERS`.
        channels: width of fpn, unet and upernet; None is 256, the library's.

    Raises:
        InputError: the decoder needs a package that is not installed, or has no such width.
    """
    dims, strides = backbone.feature_map_dims, backbone.feature_map_strides
    if name in PYRAMID_DECODERS:
        is_transformer = isinstance(backbone, (Swin, VisionTransformer))
        return PyramidDecoder(
            name, dims, num_classes, strides, channels or 256, normalize=is_transformer
        )
    if channels is not None:
        raise InputError(f"decoder.channels={channels}: the decoder {name} has no such setting")
    if name == "linear":
        return LinearDecoder(dims, num_classes, strides)
    if name == "fcn":
        return LastMapDecoder(FCNHead(dims[-1], num_classes), strides[-1])
    assert name == "deeplabv3", name  # the schema has no other
    # The rates of arXiv 1706.05587 are for cells of 8 px; others get the same reach in pixels.
    rates = [max(1, reach // strides[-1]) for reach in (96, 192, 288)]
    return LastMapDecoder(DeepLabHead(dims[-1], num_classes, rates), strides[-1])


def pyramid_decoders(name: str) -> dict[str, Any]:
    """The decoder classes of segmentation_models_pytorch.

    Raises:
        InputError: it is not installed, and the decoder `name` needs it.
    """
    try:
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as error:
        raise InputError(
            f"decoder={name}: segmentation_models_pytorch is not installed: pip install moco-ssl[segment]; decoder=fcn, "
            "deeplabv3 and linear come without it"
        ) from error
    return {"fpn": FPNDecoder, "unet": UnetDecoder, "upernet": UPerNetDecoder}


class PyramidDecoder(nn.Module):
    """UPerNet (arXiv 1807.10221), FPN (arXiv 1901.02446) or U-Net (arXiv 1505.04597) of segmentation_models_pytorch.

    All give a map as fine as their first; a 1x1 convolution makes it logits. Differs from that library's own models: its
    U-Net goes on to the image's size, without anything to see there.

    The decoders want strides that double. Maps of one stride are resampled to a pyramid, see `pyramid_of`.

    Args:
        dims: D_1 to D_4.
        strides: of the maps, px.
        channels: width.
        normalize: normalise the maps that the backbone has not normalised (all but the last of Swin and ViT), as the
            segmentation code of Swin does; UPerNet does it by itself.

    Raises:
        InputError: the library is not installed, or the FPN's GroupNorm cannot have that width.
    """

    def __init__(
        self,
        name: str,
        dims: Sequence[int],
        num_classes: int,
        strides: Sequence[int],
        channels: int,
        normalize: bool,
    ) -> None:
        super().__init__()
        library = pyramid_decoders(name)
        from segmentation_models_pytorch.base.initialization import (
            initialize_decoder,
            initialize_head,
        )

        self.name = name
        self.has_one_stride = strides[0] == strides[-1]
        self.stride = strides[0] // 4 if self.has_one_stride else strides[0]
        width = {"fpn": channels // 2, "unet": channels // 4, "upernet": channels}[name]
        if name == "fpn":
            if channels % 64 or channels < 128:  # half of them in 32 groups, of at least two
                raise InputError(
                    f"decoder.channels={channels}: the FPN needs a multiple of 64 from 128 on"
                )
            self.num_finer_maps = 0
            self.decoder = library["fpn"](
                list(dims), pyramid_channels=channels, segmentation_channels=width
            )
        elif name == "unet":
            self.num_finer_maps = 1
            self.decoder = library["unet"]((0, *dims), (channels, channels // 2, width), n_blocks=3)
        else:
            self.num_finer_maps = 2
            self.decoder = library["upernet"]((0, 0, *dims), decoder_channels=channels)
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)
        initialize_decoder(self.decoder)
        initialize_head(self.head)
        needs_norm = normalize and name != "upernet"
        self.norms = nn.ModuleList(
            [LayerNorm2d(dim) if needs_norm else nn.Identity() for dim in dims[:-1]]
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Logits (N, C, h, w) of the cells of the first map, or of the pyramid's."""
        maps = [*(norm(x) for norm, x in zip(self.norms, maps[:-1], strict=True)), maps[-1]]
        if self.has_one_stride:
            maps = pyramid_of(maps)
        height, width = maps[0].shape[-2:]
        if self.name == "fpn":
            maps = completed(maps)
        # The library counts maps from the full resolution on and passes over the finer ones, which have no channels here.
        finer = [maps[0][:, :0]] * self.num_finer_maps
        return self.head(self.decoder([*finer, *maps])[..., :height, :width])


def pyramid_of(maps: Sequence[Tensor]) -> list[Tensor]:
    """Four maps of one stride s, as ViT's, as maps of the strides s / 4, s / 2, s and 2 s.

    As in the segmentation code of BEiT (arXiv 2106.08254), which learns how to enlarge and takes the largest of four cells;
    here maps are enlarged bilinearly and four cells averaged, without weights.
    """
    quarter, half, same, double = maps
    return [
        F.interpolate(quarter, scale_factor=4, mode="bilinear", align_corners=False),
        F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False),
        same,
        F.avg_pool2d(double, kernel_size=2, ceil_mode=True),
    ]


def completed(maps: Sequence[Tensor]) -> list[Tensor]:
    """Four maps, each of exactly twice the next one's height and width: odd ones get another row or column of the same.

    The FPN doubles maps and adds them.
    """
    height, width = maps[-1].shape[-2:]
    return [
        F.pad(
            x, (0, times * width - x.shape[-1], 0, times * height - x.shape[-2]), mode="replicate"
        )
        for times, x in zip((8, 4, 2, 1), maps, strict=True)
    ]


class LastMapDecoder(nn.Module):
    """A head of torchvision's on the coarsest map: FCN (arXiv 1411.4038) or DeepLabV3 (arXiv 1706.05587).

    Args:
        head: a map (N, D_4, h, w) to logits (N, C, h, w).
        stride: of the last map, px.
    """

    def __init__(self, head: nn.Module, stride: int) -> None:
        super().__init__()
        self.head = head
        self.stride = stride

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.head(maps[-1])


class LinearDecoder(nn.Module):
    """Each cell's logits are linear in its features on all four maps, normalised by BatchNorm.

    For what a frozen backbone has learned, as DINOv2's linear segmentation head (arXiv 2304.07193). The sum of the maps'
    logits, made as fine as the first map, is the linear function of the joined features, without their memory.

    Args:
        dims: D_1 to D_4.
        strides: of the maps, px.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.stride = strides[0]
        self.enlargements = [stride // strides[0] for stride in strides]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, num_classes, kernel_size=1))
            for dim in dims
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Logits (N, C, h, w) of the first map's cells."""
        height, width = maps[0].shape[-2:]
        total = self.layers[0](maps[0])
        for layer, x, times in zip(self.layers[1:], maps[1:], self.enlargements[1:], strict=True):
            total = total + enlarged(layer(x), times, (height, width))
        return total


def depths_from_the_top(backbone: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers below the decoder each of the backbone's parameters is, from 1.

    A layer is a block of ViT or Swin, with the patch merging before it, or a stage of ResNet. The last norm counts to the
    last block; the patch embedding, with ViT's class token and learned positions, or ResNet's stem, is the lowest layer.

    Raises:
        InputError: the backbone's layers are not known.
    """
    layers: list[list[nn.Module]]  # from the bottom to the top
    if isinstance(backbone, Swin):
        layers = [[backbone.features[0]]]
        for stage, blocks in enumerate(backbone.stages()):
            merging = [backbone.features[2 * stage]] if stage else []
            layers += [[*merging, blocks[0]], *([block] for block in blocks[1:])]
        layers[-1].append(backbone.norm)
    elif isinstance(backbone, VisionTransformer):
        tokens = [
            value
            for name, value in backbone.named_parameters()
            if name.endswith(("class_token", "pos_embedding"))
        ]
        layers = [
            [backbone.conv_proj, nn.ParameterList(tokens)],
            *([block] for block in backbone.blocks()),
        ]
        layers[-1].append(backbone.encoder["ln"])
    elif isinstance(backbone, ResNet):
        layers = [
            [backbone.conv1, backbone.bn1], [backbone.layer1], [backbone.layer2], [backbone.layer3], [backbone.layer4]
        ]  # fmt: skip
    else:
        raise InputError(
            f"optimizer.layer_decay: the layers of {type(backbone).__name__} are not known; set it to 1"
        )
    return {
        parameter: depth
        for depth, modules in enumerate(reversed(layers), start=1)
        for module in modules
        for parameter in module.parameters()
    }
