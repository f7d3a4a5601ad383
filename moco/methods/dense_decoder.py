"""The decoder under the dense term: an FPN that is pretrained together with the backbone.

The idea is that of DeCon (arXiv 2503.17526). Differs from it: the encoder's loss is MoCo's on whole
images and the decoder's loss is DenseCL's; one level of the decoder has a loss; nothing drops
channels.
"""

from torch import nn

from moco.errors import InputError, unknown_name
from moco.models.contract import check_feature_maps
from moco.models.pyramid import (
    DEFAULT_CHANNELS,
    PyramidDecoder,
    check_fpn_width,
    check_pyramid,
    check_pyramid_library,
)

DENSE_DECODERS = ("fpn",)
"""Decoders without BatchNorm, which would tell a query's cells its key."""


def build_dense_decoder(
    name: str | None, channels: int | None, backbone: nn.Module, dense_weight: float
) -> PyramidDecoder | None:
    """Return a freshly initialised decoder for the dense term, or None if none is asked for.

    It has no head and no dropout, because dropped channels would blur which cells are similar. The
    FPN has GroupNorm and, for Swin and ViT, LayerNorm, so that no mode of BatchNorm concerns it.

    Args:
        name: one of `DENSE_DECODERS`, or None.
        channels: its width; None: `DEFAULT_CHANNELS`. A cell has half as many features.
        backbone: under the backbone contract, with feature maps.
        dense_weight: weight of the dense term.

    Raises:
        InputError: there is no such decoder, no dense term, no such width, the backbone has other
            maps, or segmentation_models_pytorch is missing.
    """
    if name is None:
        if channels is not None:
            raise InputError(
                f"method.decoder_channels={channels}: without method.decoder=fpn it has no effect"
            )
        return None
    setting = f"method.decoder={name}"
    if name not in DENSE_DECODERS:
        raise InputError(f"method.decoder: {unknown_name('decoder', name, DENSE_DECODERS)}")
    if dense_weight == 0:
        raise InputError(
            f"{setting}: the decoder is trained by the dense term; add method.dense_weight=0.5"
        )
    check_pyramid_library(setting)
    check_feature_maps(backbone, setting)
    check_pyramid(backbone, "fpn", setting)
    if channels is None:
        channels = DEFAULT_CHANNELS
    check_fpn_width(channels, "method.decoder_channels")
    return PyramidDecoder(name, backbone, None, channels, dropout=0.0)
