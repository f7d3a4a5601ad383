"""Measure networks of timm as backbones beside the bare modules of timm."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import Peers
from benchmarks.turns import Case, LeftOut, Turn, timed
from moco.errors import InputError
from moco.models.backbones import build_backbone


class Family(NamedTuple):
    """A small network of a family, and the images of a step."""

    model: str
    image_size: int
    """Side, px."""
    batch_size: int


FAMILIES = (
    Family("convnext_atto", 96, 8),
    Family("convnextv2_atto", 64, 4),
    Family("efficientnet_lite0", 96, 16),
    Family("regnety_002", 96, 32),
    Family("vit_tiny_patch16_224", 96, 16),
    Family("deit3_small_patch16_224", 64, 16),
    Family("swinv2_cr_tiny_ns_224", 64, 4),
    Family("maxvit_rmlp_pico_rw_256", 64, 8),
    Family("mobilenetv4_conv_small", 96, 32),
    Family("resnetv2_50", 64, 8),
    Family("hiera_tiny_224", 64, 8),
    Family("resnet18", 64, 16),
)
"""A step should take 50 to 300 ms on two cores."""
BARE = "timm alone"
OURS = "ours"
OURS_DENSE = "ours, with feature maps"


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--calls", type=int, default=3, help="steps in a turn")


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    """Yield a case for each family: forward and backward passes in training mode."""
    families = FAMILIES[:1] if arguments.tiny else FAMILIES
    device = torch.device(arguments.device)
    for family in families:
        contenders = {}
        for contender in (BARE, OURS, OURS_DENSE):
            contenders[contender] = partial(step_turn, contender, family, device, arguments.calls)
        name = f"{family.model}, {family.image_size} px"
        yield Case(name, contenders, (BARE,), warm_ups=2)


def step_turn(contender: str, family: Family, device: torch.device, calls: int) -> Turn:
    """Return a turn of one contender.

    Raises:
        LeftOut: timm is missing, or has no such network.
    """
    torch.manual_seed(0)
    try:
        backbone = build_backbone("timm", model=family.model, image_size=family.image_size)
    except InputError as error:
        raise LeftOut(error) from error
    backbone.to(device).train()
    net = backbone.net
    size = family.image_size
    images = torch.randn(family.batch_size, 3, size, size, device=device)

    def outputs() -> list[Tensor]:
        if contender == OURS:
            return [backbone(images)]
        if contender == OURS_DENSE:
            # The dense term of the loss reads the last map.
            feature, maps = backbone.feature_and_maps(images)
            return [feature, maps[-1]]
        return [net.forward_head(net.forward_features(images), pre_logits=True)]

    def step() -> None:
        backbone.zero_grad(set_to_none=True)
        losses = [output.square().mean() for output in outputs()]
        torch.stack(losses).sum().backward()

    return timed(step, device, images=family.batch_size, calls=calls)
