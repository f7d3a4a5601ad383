"""The encoders of a checkpoint, for the programs that work with what training has made."""

from typing import TYPE_CHECKING, Any

from moco.errors import InputError

if TYPE_CHECKING:
    from moco.models.encoder import Encoder


def load_encoder(checkpoint: dict[str, Any], which: str, path: str) -> "Encoder":
    """The query or the key encoder of a checkpoint, in eval mode.

    Args:
        checkpoint: of `moco.training.checkpoints.read_checkpoint`.
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
