"""Jitter of the stains of pathology: haematoxylin, eosin and DAB."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moco.data.augment.draws import seeded_uniforms, seeds_from
from moco.data.augment.operation import (
    Drawn,
    ImageKind,
    Numbers,
    Operation,
    about_one,
    between,
    check_rgb,
)

# The optical density of red, green and blue in a unit of haematoxylin, eosin and DAB (rows), as
# measured by Ruifrok & Johnston 2001, "Quantification of histochemical staining by color
# deconvolution", Anal. Quant. Cytol. Histol. 23(4).
DENSITY_OF_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
DARKEST = 1e-6  # has an optical density of 13.8; black would have infinity


@dataclass
class StainJitter(Operation):
    """Change the amount of each stain: stain * factor + shift (Tellez et al., arXiv 1902.06543).

    Stains are what colour deconvolution finds: the natural logarithm of the values, in the
    coordinates of haematoxylin, eosin and DAB. Only for RGB.

    Differs from the paper: there, 2 is added to the values before the logarithm, as scikit-image
    did until 0.18. So the same shift changes a value x by x / (x + 2) of what it does there.

    Args:
        factor: the factor is drawn from 1 - x to 1 + x, for each stain.
        shift: the shift is drawn from -x to x, for each stain, in units of optical density. Tissue
            has up to about 1.
    """

    factor: float = 0.2
    shift: float = 0.1
    num_draws: ClassVar[int] = 1
    limits: ClassVar = {"factor": (0, 1), "shift": (0, 1)}

    def check_kind(self, kind: ImageKind) -> None:
        check_rgb(kind, "stains need", "band_jitter")

    def draw(self, draws: Tensor, sizes: Tensor) -> Drawn:
        numbers = seeded_uniforms(seeds_from(draws[:, 0]), 6)
        return {
            "factors": about_one(self.factor, numbers[:, :3]),
            "shifts": between([-self.shift, self.shift], numbers[:, 3:]),
        }

    def on_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        # The way to the stains, the change and the way back are one matrix and one vector.
        to_density = torch.tensor(DENSITY_OF_STAINS, dtype=torch.float64)
        to_stains = torch.linalg.inv(to_density).to(images.device)
        to_density = to_density.to(images.device)
        matrix = (to_stains * drawn["factors"][:, None, :]) @ to_density  # (batch, 3, 3)
        added = drawn["shifts"][:, None, :] @ to_density  # (batch, 1, 3)
        log = images.clamp(min=DARKEST).log_().flatten(2)  # minus the optical density
        changed = matrix.mT.to(log.dtype) @ log - added.mT.to(log.dtype)
        return changed.exp_().clamp_(max=1).view_as(images)

    def describe(self, drawn: Numbers) -> str:
        factors = ", ".join(f"{factor:.2f}" for factor in drawn["factors"])
        shifts = ", ".join(f"{shift:+.3f}" for shift in drawn["shifts"])
        return f"factors {factors}; shifts {shifts}"
