"""Whether a loss can be computed here; without torch, so that a mistake shows at once."""

import importlib.util

from moco.errors import InputError
from moco.extras import install_command

LIBRARY_LOSSES = ("ce_dice", "dice", "lovasz")
"""Those that segmentation_models_pytorch computes."""


def check_loss(name: str, class_weights: object) -> None:
    """Check that a loss can be computed here, and that it takes the weights.

    Args:
        name: of the loss.
        class_weights: the setting; None: there are no weights.

    Raises:
        InputError: a package is missing, or the loss has no weights.
    """
    is_missing = importlib.util.find_spec("segmentation_models_pytorch") is None
    if name in LIBRARY_LOSSES and is_missing:
        raise InputError(
            f"loss={name}: segmentation_models_pytorch is not installed: "
            f"{install_command('segment')}; loss=ce and focal do not need it"
        )
    if name == "lovasz" and class_weights is not None:
        raise InputError(
            f"class_weights={class_weights}: loss=lovasz has none, because it is a mean over the "
            "classes already; expected null"
        )
