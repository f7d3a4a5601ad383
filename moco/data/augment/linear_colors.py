"""The colour jitter as one matrix: an approximation, several times as fast as its four steps one after the other.

Two things differ. Hue is turned in the chroma plane of YIQ, which keeps the luma, where HSV keeps the largest and the
smallest channel. And values are cut off to their range once, after the last step, so that a step sees what an earlier one
drove out of it.
"""

import numpy as np
import torch
from torch import Tensor

TO_GRAY = np.array([[0.299, 0.587, 0.114]] * 3)  # ITU-R BT.601, as in Pillow
TO_YIQ = np.array([TO_GRAY[0], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])  # NTSC 1953
# A turn of hue by an angle is TO_GRAY + cos * CHROMA + sin * QUARTER_TURN: from red over yellow to green, as in HSV.
CHROMA = np.eye(3) - TO_GRAY
QUARTER_TURN = np.linalg.inv(TO_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ TO_YIQ


def jitter_matrix(factors: np.ndarray, order: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(3, 4): what the steps in that order do to a pixel (red, green, blue, 1).

    Args:
        factors: (4,), of brightness, contrast and saturation, and the shift of hue, a fraction of a turn.
        order: (4,), which step comes first, second, ...: 0 brightness, 1 contrast, 2 saturation, 3 hue.
        mean: (3,), of the image's pixels.
    """
    matrix = np.column_stack([np.eye(3), np.zeros(3)])
    for step in order:
        factor = factors[step]
        if step == 1:
            gray = TO_GRAY @ (matrix[:, :3] @ mean + matrix[:, 3])
            matrix *= factor
            matrix[:, 3] += (1 - factor) * gray
        elif step == 2:
            matrix = factor * matrix + (1 - factor) * (TO_GRAY @ matrix)
        elif step == 3:
            angle = 2 * np.pi * factor
            matrix = (TO_GRAY + np.cos(angle) * CHROMA + np.sin(angle) * QUARTER_TURN) @ matrix
        else:
            matrix *= factor
    return matrix


def jitter_matrices(factors: Tensor, order: Tensor, means: Tensor) -> Tensor:
    """The same of many images, (N, 3, 4), of (N, 4), (N, 4) and (N, 3)."""
    identity, to_gray, chroma, quarter = (
        torch.from_numpy(matrix).to(means, non_blocking=True)
        for matrix in (np.eye(3), TO_GRAY, CHROMA, QUARTER_TURN)
    )
    factors = factors.to(means)
    matrix = torch.cat([identity, torch.zeros_like(identity[:, :1])], 1).expand(len(means), 3, 4)
    angle = 2 * torch.pi * factors[:, 3, None, None]
    turn = to_gray + angle.cos() * chroma + angle.sin() * quarter
    for step in order.unbind(1):
        factor = factors.gather(1, step[:, None])[:, :, None]
        is_contrast, is_saturation, is_hue = (
            (step == number)[:, None, None].to(means) for number in (1, 2, 3)
        )
        blend = factor * identity + (1 - factor) * is_saturation * to_gray
        gray = to_gray @ (matrix[..., :3] @ means[..., None] + matrix[..., 3:])
        matrix = torch.lerp(blend, turn, is_hue) @ matrix
        matrix = torch.cat(
            [matrix[..., :3], matrix[..., 3:] + (1 - factor) * is_contrast * gray], 2
        )
    return matrix
