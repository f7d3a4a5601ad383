"""Which layer of a backbone each parameter is in, for learning rates that fall with the depth."""

from torch import nn
from torchvision.models.resnet import ResNet

from moco.errors import InputError
from moco.models.swin.backbone import Swin
from moco.models.vit import VisionTransformer


def depths_from_the_top(backbone: nn.Module) -> dict[nn.Parameter, int]:
    """Return how many layers below the decoder each of the backbone's parameters is, from 1.

    Raises:
        InputError: the layers of the backbone are not known.
    """
    layers = layers_above_the_lowest(backbone)
    # The lowest layer has what is in no other: the patch embedding and the tokens, or the stem.
    depths = dict.fromkeys(backbone.parameters(), len(layers) + 1)
    for depth, modules in enumerate(reversed(layers), start=1):
        for parameter in nn.ModuleList(modules).parameters():
            depths[parameter] = depth
    return depths


def layers_above_the_lowest(backbone: nn.Module) -> list[list[nn.Module]]:
    """Return the layers of a backbone from the bottom to the top.

    Each block of a transformer is a layer, and each stage of a ResNet. The last block has the last
    norm, and the first block of a Swin's stage the patch merging before it.

    Raises:
        InputError: the layers of the backbone are not known.
    """
    layers: list[list[nn.Module]] = []
    if isinstance(backbone, Swin):
        for stage, blocks in enumerate(backbone.stages()):
            first = len(layers)
            layers += [[block] for block in blocks]
            if stage > 0:
                layers[first].append(backbone.features[2 * stage])
        layers[-1].append(backbone.norm)
    elif isinstance(backbone, VisionTransformer):
        layers += [[block] for block in backbone.blocks()]
        layers[-1].append(backbone.encoder["ln"])
    elif isinstance(backbone, ResNet):
        layers += [[backbone.layer1], [backbone.layer2], [backbone.layer3], [backbone.layer4]]
    else:
        name = type(backbone).__name__
        raise InputError(f"optimizer.layer_decay: the layers of {name} are not known; set it to 1")
    return layers
