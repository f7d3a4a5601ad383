"""The encoders of a checkpoint, for the programs that work with what training has made."""

import logging
from typing import TYPE_CHECKING, Any

from moco.errors import InputError

if TYPE_CHECKING:
    from moco.models.encoder import Encoder

log = logging.getLogger(__name__)


def load_encoder(checkpoint: dict[str, Any], which: str, path: str) -> "Encoder":
    """The query or the key encoder of a checkpoint, in eval mode.

    Args:
        checkpoint: of `moco.training.checkpoint_files.read_checkpoint`.
        which: ``query`` or ``key``.
        path: of the checkpoint, for the error.

    Raises:
        InputError: it is not of pretraining, or its weights do not fit the model that its hyperparameters describe.
    """
    from moco.methods.moco import MoCo  # here: what only names this function starts in a moment

    if "decoder" in checkpoint["hyper_parameters"]:
        raise InputError(f"checkpoint={path}: written by moco.segment, and expected is one of moco.train")
    try:
        method = MoCo(**checkpoint["hyper_parameters"])
        method.load_state_dict(checkpoint["state_dict"])
    except (TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint={path}: its weights do not fit its own hyperparameters ({error})") from error
    encoder: Any = method.query_encoder if which == "query" else method.key_encoder
    return encoder.eval()


def load_encoder_for(checkpoint: dict[str, Any], which: str, path: str, window_size: Any, image_size: int) -> "Encoder":
    """`load_encoder`, to look at images of a certain size.

    Args:
        window_size: attention windows to change to, see `moco.models.swin.rewindow`. None: those of pretraining, and where
            others would suit images of another size better, the log says so.
        image_size: px.

    Raises:
        InputError: as `load_encoder` and `rewindow`.
    """
    from moco.models.swin import rewindow, window_advice

    encoder = load_encoder(checkpoint, which, path)
    if window_size is not None:
        rewindow(encoder.backbone, window_size)
    elif advice := window_advice(encoder.backbone, image_size, checkpoint["config"]["data"]["image_size"]):
        log.info(advice)
    return encoder
