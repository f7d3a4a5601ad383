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
    if isinstance(backbone, Swin):
        layers = swin_layers(backbone)
    elif isinstance(backbone, VisionTransformer):
        layers = vit_layers(backbone)
    elif isinstance(backbone, ResNet):
        layers = resnet_layers(backbone)
    else:
        name = type(backbone).__name__
        raise InputError(f"optimizer.layer_decay: the layers of {name} are not known; set it to 1")
    depths = {}
    for depth, modules in enumerate(reversed(layers), start=1):
        for parameter in nn.ModuleList(modules).parameters():
            depths[parameter] = depth
    return depths


def swin_layers(backbone: Swin) -> list[list[nn.Module]]:
    """Return the layers of a Swin from the bottom to the top.

    The patch embedding is the lowest layer, and each block is a layer. A block has the patch
    merging before it, and the last block the last norm.
    """
    layers: list[list[nn.Module]] = [[backbone.features[0]]]
    for stage, blocks in enumerate(backbone.stages()):
        stage_layers: list[list[nn.Module]] = [[block] for block in blocks]
        if stage > 0:
            patch_merging = backbone.features[2 * stage]
            stage_layers[0].append(patch_merging)
        layers += stage_layers
    layers[-1].append(backbone.norm)
    return layers


def vit_layers(backbone: VisionTransformer) -> list[list[nn.Module]]:
    """Return the layers of a ViT from the bottom to the top.

    The lowest layer has the patch embedding, the class token and learned positions. Each block is a
    layer, and the last one has the last norm.
    """
    # These parameters belong to the ViT itself and to its encoder, and not to a layer of its own.
    tokens = nn.ParameterList()
    for name, parameter in backbone.named_parameters():
        if name.endswith(("class_token", "pos_embedding")):
            tokens.append(parameter)
    layers: list[list[nn.Module]] = [[backbone.conv_proj, tokens]]
    for block in backbone.blocks():
        layers.append([block])
    layers[-1].append(backbone.encoder["ln"])
    return layers


def resnet_layers(backbone: ResNet) -> list[list[nn.Module]]:
    """Return the layers of a ResNet from the bottom to the top: the stem and the stages."""
    return [
        [backbone.conv1, backbone.bn1],
        [backbone.layer1],
        [backbone.layer2],
        [backbone.layer3],
        [backbone.layer4],
    ]
