"""ResNet as a backbone: torchvision's layers with two more stems and any width."""

from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet

from moco.errors import InputError, unknown_name
from moco.models.contract import Backbone

STEMS = ("imagenet", "cifar", "solo_cifar")
TORCHVISION_WIDTH = 64


class ResNet(Backbone, resnet.ResNet):
    """torchvision's ResNet without its classifier; parameter names are torchvision's.

    Args:
        block: torchvision's ``BasicBlock`` or ``Bottleneck``.
        depths: blocks in each of the four stages.
        stem: ``imagenet`` is torchvision's. ``cifar`` is a 3x3 convolution of stride 1 and padding
            1 without max-pooling, as in the official CIFAR notebook
            (https://github.com/facebookresearch/moco, branch colab-notebook), which also leaves
            that convolution at PyTorch's default initialisation. ``solo_cifar`` has padding 2, as
            in solo-learn: its feature maps are those of an image that is 2 px larger.
        width: channels of the stem, and of the first stage's blocks before expansion. The stages
            double it. torchvision's is 64.
        width_per_group: 128 makes the wide variants (arXiv 1605.07146).
        zero_init_residual: the last BatchNorm of every block starts with a scale of zero, so that
            the block is the identity (arXiv 1706.02677, section 5.1), as in MoCo v3.
        in_channels: bands of the images.

    Raises:
        InputError: there is no such stem.

    Source: arXiv 1512.03385.
    """

    def __init__(
        self,
        block: type[resnet.BasicBlock] | type[resnet.Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        stem: str = "imagenet",
        width: int = TORCHVISION_WIDTH,
        width_per_group: int = 64,
        zero_init_residual: bool = False,
        in_channels: int = 3,
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
        self.stem = stem
        self.feature_map_strides = (4, 8, 16, 32)
        if stem != "imagenet":
            padding = 1
            if stem == "solo_cifar":
                padding = 2
            self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=padding, bias=False)
            self.maxpool = nn.Identity()
            self.feature_map_strides = (1, 2, 4, 8)
        elif width != TORCHVISION_WIDTH or in_channels != 3:
            self.conv1 = nn.Conv2d(
                in_channels, width, kernel_size=7, stride=2, padding=3, bias=False
            )
            if width == TORCHVISION_WIDTH:  # initialised as torchvision does
                nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if width != TORCHVISION_WIDTH:
            self.bn1 = nn.BatchNorm2d(width)
        first_dim = width * block.expansion
        self.feature_map_dims = (first_dim, 2 * first_dim, 4 * first_dim, 8 * first_dim)
        self.feature_dim = self.feature_map_dims[-1]

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        """Build a stage of our width.

        This overrides a private method: torchvision has no public way to narrow the stages. Without
        it the widths of `test_every_backbone_keeps_the_contract` would be wrong.
        """
        if planes == TORCHVISION_WIDTH:  # the first stage
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // TORCHVISION_WIDTH, *args, **kwargs)

    def feature_and_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last stage's output averaged over its cells, and the four stages' outputs.

        With the stem ``solo_cifar`` the feature is the mean over the last stage's whole output,
        whose border lies outside the image. The maps are without that border.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for stage, stride in zip(stages, self.feature_map_strides, strict=True):
            x = stage(x)
            if self.stem == "solo_cifar":
                maps.append(without_border(x, images, stride))
            else:
                maps.append(x)
        return self.avgpool(x).flatten(1), maps


def without_border(feature_map: Tensor, images: Tensor, stride: int) -> Tensor:
    """Return the cells of a map that lie in the image: (N, C, ceil(H / stride), ceil(W / stride)).

    Args:
        feature_map: its cell number j is centred at pixel stride * j - 1.
        images: (N, B, H, W).
        stride: px.
    """
    first = 0
    if stride == 1:  # cell 0 is centred outside the image
        first = 1
    height = -(-images.shape[2] // stride)
    width = -(-images.shape[3] // stride)
    return feature_map[:, :, first : first + height, first : first + width]
