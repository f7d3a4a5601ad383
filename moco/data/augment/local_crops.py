"""Small crops of the image beside the two views: constrained multi-crop.

Multi-crop is of SwAV (arXiv 2006.09882, section 3.2): some crops of a twentieth to a seventh of the
image, at 96 px where the views have 224. Van Gansbeke et al. (arXiv 2106.05967) constrain them: a
small crop has to share some of its area with the crop whose key it is to match.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moco.data.augment.operation import Drawn, defines
from moco.data.augment.operations import RandomResizedCrop, Step
from moco.errors import InputError

FIRST_LOCAL_VIEW = 3
"""The draws' number of the first local crop. 0 and 1 are the two views, and 2 is the draw of
`moco.data.sources.groups.KEY_IMAGE`."""
NUM_TRIES = 10  # corners, as many as the boxes that RandomResizedCrop tries
SIDE_MULTIPLE = 8
"""The side of a local crop is a multiple of this, px: 96 for 224."""


@dataclass(frozen=True)
class LocalCrops:
    """How many local crops an image has, and which."""

    count: int
    """Local crops of each image."""
    size: float = 0.43
    """Their side as a fraction of the views' side."""
    scale: Sequence[float] = (0.05, 0.14)
    """Smallest and largest area, as fractions of the image."""
    overlap: float = 0.2
    """The least share of a local crop's area that lies inside the crop of the key view."""
    in_both: bool = False
    """The same for the crop of the query view, if there is such a place: in a symmetric run both
    views are keys."""

    def side(self, view_side: int) -> int:
        """Return the side of the local crops beside views of `view_side`, px."""
        return max(1, round(self.size * view_side / SIDE_MULTIPLE)) * SIDE_MULTIPLE


@dataclass
class LocalCrop(RandomResizedCrop):
    """Cut out a random box that overlaps the crops of other views, and resize it.

    The box has the shape that `RandomResizedCrop` would draw. `constrained` chooses its place.
    """

    num_draws: ClassVar[int] = 20 + 2 * NUM_TRIES

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        drawn = super().draw(draws[:, :22], sizes)
        corners = draws[:, 20:].reshape(-1, NUM_TRIES, 2)  # top, left, in 0..1
        return drawn | {"corners": corners}


def constrained(drawn: Drawn, anchors: list[Tensor], overlap: float) -> Drawn:
    """Return the numbers of a `LocalCrop` with the box at a place that overlaps the anchors.

    It is the first of ten random places at which every anchor shares the given part of the box's
    area. If there is none, the first of them is moved by as little as puts it inside the last
    anchor. A box that is larger than the anchor is moved to cover it.

    Args:
        drawn: from `LocalCrop.draw`.
        anchors: (batch, 4) each: top, left, height, width, px, of the same images.
        overlap: the least part of the box's area, 0 to 1.
    """
    sizes = drawn["size"].double()[:, None]  # (batch, 1, 2), height and width
    shape = drawn["box"].double()[:, None, 2:]  # (batch, 1, 2)
    room = sizes - shape
    corners = torch.floor(drawn["corners"] * (room + 1))  # (batch, tries, 2)
    moved = moved_inside(corners[:, :1], shape, anchors[-1].double()[:, None])
    moved = torch.minimum(moved.clamp(min=0), room)
    candidates = torch.cat([corners, moved], dim=1)  # (batch, tries + 1, 2)

    fits = torch.ones_like(candidates[..., 0], dtype=torch.bool)
    for anchor in anchors:
        fits &= shared_part(candidates, shape, anchor.double()[:, None]) >= overlap
    fits[:, -1] = True
    # argmax takes the first of equal values.
    chosen = fits.to(torch.uint8).argmax(dim=1)
    corner = candidates[torch.arange(len(candidates), device=candidates.device), chosen]
    box = torch.cat([corner, shape[:, 0]], dim=1).long()
    return {"box": box, "size": drawn["size"], "applied": drawn["applied"]}


def moved_inside(corners: Tensor, shape: Tensor, anchor: Tensor) -> Tensor:
    """Return corners (batch, places, 2) moved by as little as puts a box inside its anchor.

    Args:
        corners: (batch, places, 2), top and left.
        shape: (batch, 1, 2), height and width of the boxes.
        anchor: (batch, 1, 4), top, left, height, width.
    """
    one_end = anchor[..., :2]
    other_end = one_end + anchor[..., 2:] - shape
    lowest = torch.minimum(one_end, other_end)
    highest = torch.maximum(one_end, other_end)
    return torch.minimum(torch.maximum(corners, lowest), highest)


def shared_part(corners: Tensor, shape: Tensor, anchor: Tensor) -> Tensor:
    """Return the part of each box's area that lies inside the anchor, (batch, places) in 0..1.

    The arguments are those of `moved_inside`.
    """
    start = torch.maximum(corners, anchor[..., :2])
    end = torch.minimum(corners + shape, anchor[..., :2] + anchor[..., 2:])
    shared = (end - start).clamp(min=0).prod(dim=2)
    return shared / shape.prod(dim=2)


def check_crop_comes_first(steps: list[Step], crop: int) -> None:
    """Raise InputError if a step before the crop may move pixels.

    The boxes of two views can be compared only if both are places of the image itself.

    Args:
        steps: of a view.
        crop: the number of the step that crops.
    """
    for step in steps[:crop]:
        if step.is_own or defines(type(step.operation), "source_map"):
            raise InputError(
                f"method.local_crops: {step.where} may move pixels before the crop; expected after "
                "random_resized_crop"
            )
