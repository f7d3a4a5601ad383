"""Load a model of ``moco.segment`` from its checkpoint, without Hydra."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moco.errors import InputError, unknown_name
from moco.models.swin.window_change import rewindow
from moco.runs.checkpoint_files import read_checkpoint
from moco.runs.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT
from moco.segmentation.image_segmenter import ImageSegmenter, said_in_python
from moco.segmentation.pixel_classifier import LARGEST_FORWARD, Inference
from moco.segmentation.segmenter import Segmenter
from moco.targets import check_named
from moco.weights.weight_files import is_segmenter

log = logging.getLogger(__name__)


class FineTuned(NamedTuple):
    """A model of moco.segment, and what is known of its run."""

    segmenter: Segmenter
    """On the CPU, with the windows that were asked for."""
    learned: dict[str, Any]
    """The arguments of `Segmenter`."""
    config: dict[str, Any]
    """Of the run, as plain data."""
    epoch: int
    step: int


def load_segmenter(
    path: str | Path,
    *,
    inference: str | None = None,
    image_size: int | None = None,
    tta: bool = False,
    tta_scales: Sequence[float] = (0.75, 1.0, 1.25),
    tta_flip: bool = True,
    batch_size: int = 1,
    max_forward_pixels: int = LARGEST_FORWARD,
    window_size: Any = None,
    value_range: Any = None,
    target: str | None = None,
    trust_targets: bool = False,
) -> ImageSegmenter:
    """Return a fine-tuned model as a function from an image to the classes of its pixels.

    Args:
        path: a checkpoint of `moco.segment`, or the folder of its run, which stands for its last
            checkpoint.
        inference: ``whole`` or ``slide``; None: as in the run.
        image_size: side of sliding windows, px; None: as in the run.
        tta: average over scaled and mirrored copies of each image.
        tta_scales, tta_flip: these copies.
        batch_size: windows in a forward pass.
        max_forward_pixels: an image with more pixels is predicted by windows.
        window_size: other attention windows of a Swin, cells.
        value_range: ``(low, high)``, the values of an image that become 0 and 1, or such a pair for
            each band; None: as in the run, which is 0 to 255 for 8-bit images.
        target: the function that makes a backbone of your own, as the checkpoint names it.
        trust_targets: import that function without its being named here. It runs then.

    Raises:
        InputError: the file cannot be read, holds no model of moco.segment, or an argument has no
            such value.

    Example:
        >>> segment = moco.load_segmenter("runs/segment/TIME")
        >>> classes = segment(image)  # (H, W, bands) to (H, W)
        >>> probabilities = segment.probabilities(image)  # (classes, H, W)
    """
    if inference not in (None, "slide", "whole"):
        choices = ("slide", "whole")
        raise InputError(f"inference: {unknown_name('value', inference, choices)}")
    if not tta_scales or min(tta_scales) <= 0:
        raise InputError(f"tta_scales={[*tta_scales]}: expected numbers above 0")
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / LAST_CHECKPOINT
    with said_in_python():
        tuned = load_fine_tuned(
            str(path), window_size=window_size, target=target, trust_targets=trust_targets
        )
    data = dict(tuned.config["data"])
    if value_range is not None:
        data["value_range"] = value_range
    how = inference_of(
        tuned,
        inference=inference,
        image_size=image_size,
        tta_scales=tuple(tta_scales) if tta else (1.0,),
        tta_flip=tta and tta_flip,
        batch_size=batch_size,
        max_forward_pixels=max_forward_pixels,
    )
    return ImageSegmenter(tuned.segmenter, data, how)


def load_fine_tuned(
    path: str,
    *,
    window_size: Any = None,
    target: str | None = None,
    trust_targets: bool = False,
    purpose: str = "load_segmenter loads",
    advice: str = "python -m moco.segment makes one",
) -> FineTuned:
    """Return the model in a checkpoint of moco.segment.

    Args:
        window_size, target, trust_targets: see `load_segmenter`.
        purpose: who does what with the model, for messages.
        advice: what to do with a checkpoint of another program, for messages.

    Raises:
        InputError: the file cannot be read, or holds no such model.
    """
    expected = f"{purpose} a model of moco.segment"
    try:
        content = read_checkpoint(path)
    except InputError as error:
        raise InputError(f"{error}; {expected}") from error
    learned = content["hyper_parameters"]
    if not is_segmenter(learned):
        raise InputError(
            f"checkpoint={path}: {expected}, and this one is of another program; {advice}"
        )
    named = learned["backbone"].get("target")
    try:
        check_named(named, target, "backbone.target", trust_targets=trust_targets)
        segmenter = rebuilt_segmenter(learned, content["state_dict"])
    except InputError as error:
        raise InputError(f"checkpoint={path}: {error}") from error
    if window_size is not None:
        rewindow(segmenter.model.backbone, window_size)
    epoch = content["figures"].get("epoch", 0)
    tell_of_best(path, epoch)
    return FineTuned(segmenter.eval(), learned, content["config"], epoch, content["global_step"])


def tell_of_best(path: str, epoch: int) -> None:
    """Log that a run has a best checkpoint, if its last one is loaded."""
    best = best_beside(path)
    if best is not None:
        name = Path(path).name
        log.info("the model is %s of epoch %d; the best one is %s", name, epoch, best)


def best_beside(path: str) -> Path | None:
    """Return the best checkpoint of a run if `path` is its last one, and not its best one."""
    last = Path(path)
    best = last.with_name(BEST_CHECKPOINT.name)
    if last.name == LAST_CHECKPOINT.name and best.is_file():
        return best
    return None


def inference_of(
    tuned: FineTuned,
    *,
    inference: str | None,
    image_size: int | None,
    tta_scales: tuple[float, ...] = (1.0,),
    tta_flip: bool = False,
    blend: bool = True,
    batch_size: int = 1,
    max_forward_pixels: int = LARGEST_FORWARD,
) -> Inference:
    """Return how images are predicted, with what is not given as in the run.

    Args:
        tuned: the model.
        inference: ``whole``, ``slide`` or None.
        image_size: side of sliding windows, px, or None.
    """
    return Inference(
        mode=inference or tuned.config["inference"],
        window=image_size or tuned.learned["image_size"],
        blend=blend,
        scales=tta_scales,
        flip=tta_flip,
        batch_size=batch_size,
        max_forward_pixels=max_forward_pixels,
    )


def rebuilt_segmenter(hyper_parameters: dict[str, Any], state: dict[str, Any]) -> Segmenter:
    """Return the model of a checkpoint of moco.segment.

    Raises:
        InputError: its weights do not fit its own hyperparameters.
    """
    try:
        segmenter = Segmenter(**hyper_parameters)
        segmenter.load_state_dict(state)
    except (TypeError, RuntimeError, KeyError) as error:
        raise InputError(f"its weights do not fit its own hyperparameters ({error})") from error
    return segmenter
