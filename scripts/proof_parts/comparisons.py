"""The statistics of the proof: paired comparisons of two rows, and rank correlations."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """How much better one row is than another, in mIoU from 0 to 1."""

    difference: float
    """Mean over the seeds of the difference in the dataset's mIoU."""
    interval: tuple[float, float] | None
    """95 % of the paired t distribution over the seeds. None: there is one seed."""
    p_of_seeds: float | None
    """Of the paired t test over the seeds. None: there is one seed, or no spread."""
    p_of_images: float
    """Of Wilcoxon's signed-rank test over the images, each with its mean over the seeds."""
    seeds: int
    images: int


def compare(
    ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]
) -> Comparison | None:
    """Compare two rows of one dataset, way of fine-tuning and label fraction, by paired tests.

    Args:
        ours, theirs: a line of the results for each seed. The seeds that only one row has are left
            out.

    Returns:
        None if no seed is in both.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    differences = []
    image_differences = []
    for seed in seeds:
        differences.append(ours[seed]["miou"] - theirs[seed]["miou"])
        of_images = np.subtract(ours[seed]["images"]["miou"], theirs[seed]["images"]["miou"])
        image_differences.append(of_images)
    interval, p_of_seeds = over_seeds(differences)
    of_image = np.mean(image_differences, axis=0)  # (images,)
    return Comparison(
        difference=float(np.mean(differences)),
        interval=interval,
        p_of_seeds=p_of_seeds,
        p_of_images=over_images(of_image),
        seeds=len(seeds),
        images=len(of_image),
    )


def over_seeds(differences: Sequence[float]) -> tuple[tuple[float, float] | None, float | None]:
    """Return the interval of the mean difference and the p of the paired t test."""
    if len(differences) < 2:
        return None, None
    if np.ptp(differences) == 0:
        return (differences[0], differences[0]), None
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(CONFIDENCE)
    return (float(interval.low), float(interval.high)), float(found.pvalue)


def over_images(differences: np.ndarray) -> float:
    """Return the p of Wilcoxon's signed-rank test, 1 if no image differs.

    Args:
        differences: (images,); NaN where an image has no labelled pixel.
    """
    differences = differences[np.isfinite(differences)]
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, None if it is not defined."""
    if len(x) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = stats.spearmanr(x, y).statistic
    return None if np.isnan(found) else float(found)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation of the sample; None for a single value."""
    deviation = None
    if len(values) > 1:
        deviation = float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation
