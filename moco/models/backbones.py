"""Backbones under one contract: images in, one feature vector or four feature maps out, no classifier.

Every backbone has
- ``feature_dim``: D, the width of its feature,
- ``forward(images) -> (N, D)``,
- ``feature_maps(images) -> [(N, C_1, H_1, W_1), ..., (N, C_4, H_4, W_4)]``, from the first layers' to the last ones',
- ``feature_and_maps(images)``, both in one pass,
- ``feature_map_dims`` = (C_1, ..., C_4) and ``feature_map_strides``, in px of the image per cell.

ResNet and Swin double the stride from map to map, and the feature is the last map's mean. ViT has one stride, its patch, and
the feature is its class token.

Letters: N batch, D feature width, H W pixels.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet

from moco.errors import InputError, unknown_name
from moco.models.swin.backbone import Swin
from moco.models.vit import VisionTransformer

CIFAR_STEMS = {"cifar": 1, "solo_cifar": 2}
"""Padding of the 3x3 convolution, px, by the name of the stem."""
STEMS = ("imagenet", *CIFAR_STEMS)
CIFAR_STEM_STRIDES = (1, 2, 4, 8)
IMAGENET_STEM_STRIDES = (4, 8, 16, 32)


class ResNet(resnet.ResNet):
    """torchvision's ResNet (arXiv 1512.03385) without its classifier; parameter names are torchvision's.

    Args:
        block: torchvision's ``BasicBlock`` or ``Bottleneck``.
        depths: blocks in each of the four stages.
        stem: ``imagenet``, or ``cifar``: 3x3 convolution of stride 1 with padding 1 and no max-pool, as in the official
            CIFAR notebook (https://github.com/facebookresearch/moco, branch colab-notebook), which also leaves that
            convolution at PyTorch's default initialisation. ``solo_cifar`` is the same with padding
            2, as in solo-learn: the maps inside are those of an image that is 2 px larger.
        width: channels of the stem and of the first stage's blocks before expansion; the stages double it. torchvision's
            is 64.
        width_per_group: 128 makes the wide variants (arXiv 1605.07146).
        zero_init_residual: the last BatchNorm of every block starts with a scale of zero, so that the block is the identity
            (arXiv 1706.02677, section 5.1); MoCo v3 does so.

    Raises:
        InputError: there is no such stem.
    """

    def __init__(
        self,
        block: type[resnet.BasicBlock] | type[resnet.Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        stem: str = "imagenet",
        width: int = 64,
        width_per_group: int = 64,
        zero_init_residual: bool = False,
    ) -> None:
        if stem not in STEMS:
            raise InputError(f"backbone.stem: {unknown_name('stem', stem, STEMS)}")
        self.width = width
        super().__init__(
            block,
            list(depths),
            width_per_group=width_per_group,
            zero_init_residual=zero_init_residual,
        )
        del self.fc
        self.has_wide_padding = stem == "solo_cifar"
        if stem in CIFAR_STEMS:
            padding = CIFAR_STEMS[stem]
            self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=padding, bias=False)
            self.maxpool = nn.Identity()
        elif width != 64:
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        if width != 64:
            self.bn1 = nn.BatchNorm2d(width)
        self.feature_map_dims = tuple(width * 2**stage * block.expansion for stage in range(4))
        is_small = stem in CIFAR_STEMS
        self.feature_map_strides = CIFAR_STEM_STRIDES if is_small else IMAGENET_STEM_STRIDES
        self.feature_dim = self.feature_map_dims[-1]

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:  # the first stage, after a stem of `width` channels
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The four stages' outputs for images (N, 3, H, W): (N, C_i, ceil(H / stride_i), ceil(W / stride_i))."""
        return self.feature_and_maps(images)[1]

    def feature_and_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`forward` and `feature_maps` in one pass.

        With the stem ``solo_cifar`` the feature is the mean of the last stage's whole output, whose
        border lies outside of the image; the maps are without that border.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for stage, stride in zip(self.stages(), self.feature_map_strides, strict=True):
            x = stage(x)
            maps.append(inside(x, images, stride) if self.has_wide_padding else x)
        return self.avgpool(x).flatten(1), maps

    def stages(self) -> tuple[nn.Module, ...]:
        """The four stages."""
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, images: Tensor) -> Tensor:
        """The last stage's output averaged over its cells: (N, D)."""
        return self.feature_and_maps(images)[0]


def inside(x: Tensor, images: Tensor, stride: int) -> Tensor:
    """Return the cells of a map that are in the image: (N, C, ceil(H / stride), ceil(W / stride)).

    Args:
        x: a map whose cell number j is centred at pixel stride * j - 1.
        images: (N, 3, H, W).
        stride: px.
    """
    first = 1 if stride == 1 else 0
    height, width = (-(-side // stride) for side in images.shape[-2:])
    return x[:, :, first : first + height, first : first + width]


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet_tiny": partial(ResNet, resnet.BasicBlock, (1, 1, 1, 1), width=16),
    "resnet18": partial(ResNet, resnet.BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, resnet.BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, resnet.Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, resnet.Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, resnet.Bottleneck, (3, 8, 36, 3)),
    "wide_resnet50_2": partial(ResNet, resnet.Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "swin_tiny_patch2": partial(
        Swin, 1, 32, (2, 2, 2, 2), (1, 2, 4, 8), patch_size=2, window_size=4
    ),
    "swin_t": partial(Swin, 1, 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": partial(Swin, 1, 96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": partial(Swin, 1, 128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_v2_tiny_patch2": partial(
        Swin, 2, 32, (2, 2, 2, 2), (1, 2, 4, 8), patch_size=2, window_size=4
    ),
    "swin_v2_t": partial(Swin, 2, 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_v2_s": partial(Swin, 2, 96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_v2_b": partial(Swin, 2, 128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "vit_tiny_patch4": partial(VisionTransformer, 4, 64, 4, num_heads=4),
    "vit_small": partial(VisionTransformer, 16, 384, 12, num_heads=12),
    "vit_b_16": partial(VisionTransformer, 16, 768, 12, num_heads=12),
}


def settings_of_backbone(name: str) -> list[str]:
    """The keyword arguments that `build_backbone` takes for a backbone; none if there is no such backbone."""
    parameters = inspect.signature(BACKBONES[name]).parameters if name in BACKBONES else {}
    return [
        key for key, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY
    ]


def build_backbone(name: str, **kwargs: Any) -> Any:
    """A freshly initialised backbone.

    Args:
        kwargs: its settings; one that is None is left at the backbone's default.

    Raises:
        InputError: no backbone has that name, or the backbone has no such setting.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone.name: {unknown_name('backbone', name, BACKBONES)}")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    known = settings_of_backbone(name)
    for key, value in kwargs.items():
        if key not in known:
            raise InputError(
                f"backbone.{key}={value}: {name} has no such setting (it has {', '.join(known)})"
            )
    return BACKBONES[name](**kwargs)
