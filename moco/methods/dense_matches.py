"""Which cell of the key is the positive of each cell of the query, in the dense term.

``feature`` is DenseCL's rule (arXiv 2011.09157): the most similar cell. ``location`` is the cell at
the same place of the image, where the two crops overlap. ``both`` is the mean of the two losses.

Shapes use N for the images and S for the cells of a view, row by row.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moco.errors import InputError
from moco.methods.losses import most_similar_cells
from moco.models.heads import Cells

RULES = ("both", "feature", "location")


class CellMatches(NamedTuple):
    """The positives of a query's cells by one rule."""

    cells: Tensor
    """(N, S) int64, the number of the key's cell."""
    has_match: Tensor | None = None
    """(N, S) bool; None: every cell has a match."""

    @property
    def weights(self) -> Tensor | None:
        """The weight of each cell in the loss, (N * S,) float32; None: all count the same."""
        if self.has_match is None:
            return None
        return self.has_match.flatten().float()


def match_cells(
    rule: str, query: Cells, key: Cells, placements: tuple[Tensor, Tensor] | None
) -> list[CellMatches]:
    """Return the positives by a rule of `RULES`; both rules in the order of the words.

    Args:
        rule: ``feature``, ``location`` or ``both``.
        query, key: the two views, cell by cell.
        placements: of the query views and the key views, (N, 2, 3) each; None for ``feature``.
    """
    matches = []
    if rule in ("feature", "both"):
        matches.append(CellMatches(most_similar_cells(query.features, key.features)))
    if rule in ("location", "both"):
        assert placements is not None
        side = side_of_grid(query.features.shape[1])
        matches.append(cells_at_the_same_place(*placements, side, side))
    return matches


@torch.no_grad()
def cells_at_the_same_place(
    query_placements: Tensor, key_placements: Tensor, rows: int, columns: int
) -> CellMatches:
    """Return for each cell of a query the cell of its key that the middle of it lies in.

    That is the nearest cell of the key, with distances measured in cells of the key. A cell whose
    middle lies outside of the key's crop has no match: nothing of the key is within half a cell of
    it. Images whose crops do not overlap have no match at all.

    Differs from VICRegL (arXiv 2210.01571, section 3), which takes the nearest cell of every cell
    and then the 20 nearest pairs (4 of small crops), however far they are apart. Differs from
    PixPro (arXiv 2011.10043, section 3.1), for which every cell within 0.7 diagonals of the larger
    of the two cells is a positive: here a query has one positive, as InfoNCE with a queue needs it.

    Args:
        query_placements, key_placements: (N, 2, 3), where the views are in their image, see
            `moco.data.augment.placements`.
        rows, columns: of the grid of cells, the same in both views.
    """
    with torch.autocast(query_placements.device.type, enabled=False):
        query_to_image = query_placements.double()
        key_to_image = key_placements.double()
        middles = middles_of_cells(rows, columns, query_to_image.device)  # (S, 2)
        in_image = middles @ query_to_image[:, :, :2].mT + query_to_image[:, None, :, 2]
        to_key = inverse_2x2(key_to_image[:, :, :2])
        in_key = (in_image - key_to_image[:, None, :, 2]) @ to_key.mT  # (N, S, 2)
        has_match = ((in_key >= 0) & (in_key < 1)).all(dim=2)
        column, row = in_key.unbind(2)
        column = (column * columns).floor().clamp(0, columns - 1)
        row = (row * rows).floor().clamp(0, rows - 1)
        cells = (row * columns + column).long()
    return CellMatches(cells, has_match)


def middles_of_cells(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return x and y of the middle of each cell, as fractions of the view, (rows * columns, 2)."""
    y = (torch.arange(rows, dtype=torch.float64, device=device) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float64, device=device) + 0.5) / columns
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)


def inverse_2x2(matrices: Tensor) -> Tensor:
    """Return the inverses of matrices (N, 2, 2), without a solver, which would wait for a GPU."""
    (a, b), (c, d) = (row.unbind(1) for row in matrices.unbind(1))
    adjugates = torch.stack([torch.stack([d, -b], dim=1), torch.stack([-c, a], dim=1)], dim=1)
    return adjugates / (a * d - b * c)[:, None, None]


def side_of_grid(num_cells: int) -> int:
    """Return the side of a square grid of cells.

    Raises:
        InputError: the grid is not square.
    """
    side = math.isqrt(num_cells)
    if side**2 != num_cells:
        raise InputError(
            f"method.dense_match=location: the backbone's last feature map has {num_cells} cells, "
            "which are no square; expected square maps of square images"
        )
    return side


def placements_of(batch: Any, rule: str) -> tuple[Tensor, Tensor] | None:
    """Return where the two views of a batch are in their images, (N, 2, 3) each.

    Returns:
        None for the rule ``feature``, which does not need them.

    Raises:
        InputError: the batch has none.
    """
    if rule == "feature":
        return None
    placements = getattr(batch, "placements", None)
    if placements is None:
        raise InputError(
            f"method.dense_match={rule}: the batches do not say where the views are in the image; "
            "a batch of your own has a field placements, (2, N, 2, 3), from "
            "moco.ViewPair.placements"
        )
    return placements[0], placements[1]


def check_rule(rule: str, dense_weight: float) -> None:
    """Raise InputError if there is no such rule, or no dense term that it is for."""
    if rule not in RULES:
        raise InputError(f"method.dense_match={rule}: expected {', '.join(RULES)}")
    if rule != "feature" and dense_weight == 0:
        raise InputError(
            f"method.dense_match={rule}: there is no dense term, since method.dense_weight=0; "
            "expected above 0, such as 0.5"
        )
