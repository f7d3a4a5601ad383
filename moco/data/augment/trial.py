"""Try the user's own augmentations on one image before a run starts.

A mistake shows here in one line. In the run it would show as a traceback, or as wrong pixels.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.data.augment.operation import Drawn, defines
from moco.data.augment.operations import Step
from moco.data.augment.views import View, ViewPair, as_arrays, row_of
from moco.errors import InputError

log = logging.getLogger(__name__)

# Float32 sums leave 0..1 by less than this.
ROUNDING = 1e-3


def try_own_steps(augment: ViewPair, image: np.ndarray, index: int) -> None:
    """Apply every step of the user's to an image, in all views and of all their sizes.

    A step that gives two results for the same draws is logged as a warning.

    Args:
        image: (height, width, bands) of the pair's kind.
        index: number of the image in the dataset, on which its draws depend.

    Raises:
        InputError: a step fails, returns something else than images, or writes to its input. The
            message names its key.
    """
    for views in augment.views_of_size.values():
        for number, view in enumerate(views):
            if view.own_steps:
                try_view(view, image, augment.seed, index, number)


def try_view(view: View, image: np.ndarray, seed: int, index: int, number: int) -> None:
    """Apply the steps of a view one after the other, and check those of the user's."""
    indices = torch.tensor([index, index + 1])
    sizes = torch.tensor([image.shape[:2]] * 2)
    with user_errors_named(view.where, "draw"):
        numbers = view.draw(seed, 0, indices, number, sizes)
    for step, drawn in zip(view.steps, numbers, strict=True):
        before = image
        if step.is_own:
            check_draws(step, drawn)
            image = tried_on_image(step, image, drawn)
            if defines(type(step.operation), "on_batch"):
                try_on_batch(step, before, drawn)
        else:
            (arrays,) = row_of([as_arrays(drawn)], 0)
            image = step.on_image(image, arrays)


def check_draws(step: Step, drawn: Drawn) -> None:
    """Check that an operation's numbers have a row for each of two images."""
    for name, values in drawn.items():
        if not isinstance(values, Tensor) or values.ndim == 0 or len(values) != 2:
            raise InputError(
                f"{step.where}: draw returned {name}={values}; "
                "expected a tensor with a row for each image of the batch"
            )


def tried_on_image(step: Step, image: np.ndarray, drawn: Drawn) -> np.ndarray:
    """Return what a step makes of an image, after checks."""
    (arrays,) = row_of([as_arrays(drawn)], 0)
    kept = image.copy()
    with user_errors_named(step.where, "on_image"):
        changed = step.on_image(kept, arrays)
        again = step.on_image(kept, arrays)
    if not np.array_equal(kept, image):
        raise InputError(f"{step.where}: on_image writes to the image it gets; return a new one")
    if not np.array_equal(changed, again):
        log.warning(
            "%s gives other results for the same draws, so that a resumed run does not have the "
            "same bits; an operation takes its random numbers from draw, a pipeline from torch, "
            "random or np.random",
            step.where,
        )
    return changed


def try_on_batch(step: Step, image: np.ndarray, drawn: Drawn) -> None:
    """Check a step on a batch of two equal images."""
    images = torch.tensor(image).permute(2, 0, 1).expand(2, -1, -1, -1)
    if image.dtype == np.float32:
        images = images.clone()
    else:
        images = images / 255
    kept = images.clone()
    with user_errors_named(step.where, "on_batch"):
        changed = step.on_batch(kept, drawn)
    if not torch.equal(kept, images):
        raise InputError(f"{step.where}: on_batch writes to the images it gets; return new ones")
    low, high = float(changed.min()), float(changed.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN is outside, too
        raise InputError(
            f"{step.where}: on_batch returned values from {low:.3g} to {high:.3g}; "
            "expected 0..1: clamp them"
        )


@contextmanager
def user_errors_named(where: str, method: str) -> Iterator[Any]:
    """Turn any error inside into an InputError that names the step."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Whatever the user's code does.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{where}: {method} failed: {reason}") from error
