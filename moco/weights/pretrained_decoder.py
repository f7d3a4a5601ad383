"""The decoder in a checkpoint of moco.train, which `moco.segment` can start from.

It is there if the run had ``method.decoder=fpn``. Programs that need the encoder alone leave it
out, so that they do not need the package that the decoder is from.
"""

from typing import Any, NamedTuple

from torch import nn

from moco.errors import InputError
from moco.methods.dense_decoder import DENSE_DECODERS
from moco.models.pyramid import DEFAULT_CHANNELS, HEAD
from moco.weights.architecture import misfit
from moco.weights.library_names import Weights
from moco.weights.other_projects import (
    DECODER,
    DENSE_PROJECTOR,
    KEY_DECODER,
    KEY_DENSE_PROJECTOR,
)
from moco.weights.weight_files import WeightFile, part_of

# The parts of a method that are of no use without its decoder.
DENSE_PARTS = (
    DECODER,
    DENSE_PROJECTOR,
    KEY_DECODER,
    KEY_DENSE_PROJECTOR,
    "dense_queue.",
    "reverse_dense_queue.",
)


class PretrainedDecoder(NamedTuple):
    """A decoder without its head, and how it is built."""

    name: str
    """``fpn``."""
    channels: int
    """Its width."""
    weights: Weights
    """Under the names of `PyramidDecoder`."""


def decoder_in(file: WeightFile, which: str) -> PretrainedDecoder | None:
    """Return the decoder that was pretrained with an encoder, or None if there is none.

    Args:
        file: any file of weights.
        which: ``query`` or ``key``.
    """
    method = file.hyper_parameters or {}
    name = method.get("decoder")
    channels = method.get("decoder_channels") or DEFAULT_CHANNELS
    # The file may be of anyone.
    if name not in DENSE_DECODERS or not isinstance(channels, int):
        return None
    return PretrainedDecoder(name, channels, part_of(file.weights, f"{which}_encoder.decoder."))


def without_decoder(file: WeightFile) -> tuple[dict[str, Any], Weights]:
    """Return the arguments of `MoCo` and its weights without a decoder, and without the dense term.

    They are the file's own if it has no decoder.

    Args:
        file: a checkpoint of moco.train.
    """
    method = file.hyper_parameters
    assert method is not None
    if method.get("decoder") is None:
        return method, file.weights
    weights = {}
    for name, tensor in file.weights.items():
        if not name.startswith(DENSE_PARTS):
            weights[name] = tensor
    return method | {"decoder": None, "decoder_channels": None, "dense_weight": 0.0}, weights


def load_pretrained_decoder(decoder: nn.Module, pretrained: PretrainedDecoder) -> None:
    """Load a pretrained decoder into a new one. The new one's head stays as it is.

    Raises:
        InputError: it does not fit, because it was pretrained on the maps of another backbone.
    """
    state = decoder.state_dict()
    own = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    problem = misfit(pretrained.weights, own)
    if problem is not None:
        raise InputError(
            f"its pretrained decoder does not fit the backbone ({problem}); "
            "decoder.from_checkpoint=false starts with a new one"
        )
    decoder.load_state_dict(state | pretrained.weights)
