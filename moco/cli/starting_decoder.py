"""The decoder that fine-tuning starts from: a new one, or the one of the checkpoint."""

import logging
from typing import NamedTuple

from moco.cli.starting_backbone import StartingBackbone
from moco.config.segment import SegmentConfig
from moco.errors import InputError
from moco.segmentation.decoders import choose_decoder
from moco.weights.pretrained_decoder import PretrainedDecoder

log = logging.getLogger(__name__)


class StartingDecoder(NamedTuple):
    """How a decoder is built, and where its weights are from."""

    name: str
    """One of `moco.segmentation.decoders.DECODERS`."""
    channels: int | None = None
    """Its width; None: the decoder's own."""
    pretrained: PretrainedDecoder | None = None
    """The weights that it starts with; None: it is new."""


def find_decoder(config: SegmentConfig, start: StartingBackbone) -> StartingDecoder:
    """Return the decoder of the config; a pretrained one is taken over if the config allows it.

    Raises:
        InputError: a package is missing, or a pretrained decoder is asked for that is not there or
            has another width.
    """
    asked = config.decoder
    found = start.decoder
    if asked.from_checkpoint is False:
        found = None
    name = asked.name
    if name == "auto" and found is not None and not config.freeze_backbone:
        name = found.name
    name = choose_decoder(name, config.freeze_backbone)
    if found is None or found.name != name:
        if asked.from_checkpoint:
            raise InputError(f"decoder.from_checkpoint=true: {why_there_is_none(config, name)}")
        if found is not None:
            log.info("the checkpoint's pretrained %s is not used: decoder=%s", found.name, name)
        return StartingDecoder(name, asked.channels)
    if asked.channels not in (None, found.channels):
        raise InputError(
            f"decoder.channels={asked.channels}: the pretrained decoder of checkpoint="
            f"{config.checkpoint} has {found.channels}; leave decoder.channels out, or give "
            "decoder.from_checkpoint=false for a new decoder"
        )
    return StartingDecoder(name, found.channels, found)


def why_there_is_none(config: SegmentConfig, name: str) -> str:
    """Return why a decoder cannot be taken over.

    Args:
        config: the config of the run.
        name: the kind of decoder that is asked for.
    """
    if config.checkpoint is None:
        return "checkpoint=null has no decoder"
    return (
        f"checkpoint={config.checkpoint} holds no pretrained decoder of the kind {name}; a run of "
        "moco.train with method.dense_weight=0.5 method.decoder=fpn leaves one in its last.ckpt, "
        "not in backbone.pth"
    )
