"""The losses of moco.segment against slow references from their papers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco.errors import InputError
from moco.segmentation.loss_check import LIBRARY_LOSSES, check_loss
from moco.segmentation.pixel_losses import (
    SegmentationLoss,
    balanced_class_weights,
    pixel_cross_entropy,
)
from tests.segmentation.test_decoders import hide_segmentation_models

NAMES = ("ce", "ce_dice", "dice", "focal", "lovasz")
WEIGHTS = [0.5, 2.0, 1.0, 7.0, 1.5]
IGNORED = 255


def softmax(rows):
    exponentials = np.exp(rows - rows.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def slow_ce(probabilities, truth, weights):
    total, weight = 0.0, 0.0
    for row, label in zip(probabilities, truth, strict=True):
        total -= weights[label] * math.log(row[label])
        weight += weights[label]
    return total / weight


def slow_focal(probabilities, truth, weights):
    total, weight = 0.0, 0.0
    for row, label in zip(probabilities, truth, strict=True):
        total -= weights[label] * (1 - row[label]) ** 2 * math.log(row[label])
        weight += weights[label]
    return total / weight


def slow_dice(probabilities, truth, weights):
    total, weight = 0.0, 0.0
    for label in set(truth.tolist()):
        is_class = truth == label
        found = probabilities[:, label]
        score = 2 * (found * is_class).sum() / (found.sum() + is_class.sum())
        total += weights[label] * (1 - score)
        weight += weights[label]
    return total / weight


def slow_lovasz(probabilities, truth, weights):
    """The Lovasz extension by its definition: increments of a function of sets."""

    def jaccard_loss(wrong, is_class):
        return len(wrong) / len(is_class | wrong) if wrong else 0.0

    losses = []
    for label in set(truth.tolist()):
        is_class = set(np.flatnonzero(truth == label).tolist())
        errors = np.abs((truth == label) - probabilities[:, label])
        wrong = set()
        loss = 0.0
        for pixel in np.argsort(-errors, kind="stable").tolist():
            before = jaccard_loss(wrong, is_class)
            wrong = wrong | {pixel}
            loss += errors[pixel] * (jaccard_loss(wrong, is_class) - before)
        losses.append(loss)
    return np.mean(losses)


def slow_loss(name, logits, classes, weights):
    """The loss of labelled pixels alone, in double precision."""
    rows = np.moveaxis(logits.double().numpy(), 1, -1).reshape(-1, logits.shape[1])
    truth = classes.numpy().ravel()
    rows, truth = rows[truth != IGNORED], truth[truth != IGNORED]
    functions = {"ce": slow_ce, "dice": slow_dice, "focal": slow_focal, "lovasz": slow_lovasz}
    if name == "ce_dice":
        return slow_ce(softmax(rows), truth, weights) + slow_dice(softmax(rows), truth, weights)
    return functions[name](softmax(rows), truth, weights)


def batch(seed=0):
    """Logits of five classes; one is in no mask, and a third of the pixels has no class."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 5, 6, 7, generator=generator)
    classes = torch.randint(0, 4, (2, 6, 7), generator=generator)
    classes[torch.rand(2, 6, 7, generator=generator) < 0.33] = IGNORED
    return logits, classes


def needs_library(name):
    if name in LIBRARY_LOSSES:
        pytest.importorskip("segmentation_models_pytorch")


# Lovász has no class weights.
WEIGHTED = [name for name in NAMES if name != "lovasz"]


@pytest.mark.parametrize(
    ("name", "weights"),
    [*((name, None) for name in NAMES), *((name, WEIGHTS) for name in WEIGHTED)],
)
def test_a_loss_equals_a_slow_reference(name, weights):
    needs_library(name)
    logits, classes = batch()
    loss = SegmentationLoss(name, IGNORED, weights)(logits, classes)
    expected = slow_loss(name, logits, classes, weights or [1.0] * 5)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_without_a_class_do_not_count(name):
    """Their logits change neither the loss nor get a gradient, and without others it is 0."""
    needs_library(name)
    weights = None if name == "lovasz" else WEIGHTS
    loss_of = SegmentationLoss(name, IGNORED, weights)
    logits, classes = batch()
    is_ignored = (classes == IGNORED).unsqueeze(1)
    changed = torch.where(is_ignored, 5 * torch.randn_like(logits), logits).requires_grad_()
    loss = loss_of(changed, classes)
    assert float(loss.detach()) == pytest.approx(float(loss_of(logits, classes)), rel=1e-6)
    loss.backward()
    assert not changed.grad[is_ignored.expand_as(logits)].any()
    assert changed.grad.any()

    changed.grad = None
    nothing = loss_of(changed, torch.full_like(classes, IGNORED))
    assert (nothing.shape, float(nothing.detach())) == ((), 0.0)
    nothing.backward()
    assert not changed.grad.any()  # and no NaN, which would be true


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_is_computed_in_float32(name, dtype):
    needs_library(name)
    logits, classes = batch()
    loss_of = SegmentationLoss(name, IGNORED)
    logits = (10 * logits).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(logits, classes)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(logits.float(), classes))


@pytest.mark.parametrize("name", NAMES)
def test_a_left_out_class_is_like_pixels_without_a_class(name):
    """data.ignore_index may be the number of a class."""
    needs_library(name)
    logits, classes = batch()
    as_number = classes.masked_fill(classes == 2, IGNORED)
    as_class = as_number.masked_fill(as_number == IGNORED, 2)
    loss = SegmentationLoss(name, 2)(logits, as_class)
    assert torch.allclose(loss, SegmentationLoss(name, IGNORED)(logits, as_number))


def test_weighted_cross_entropy_is_that_of_torch():
    logits, classes = batch()
    weights = torch.tensor(WEIGHTS)
    expected = F.cross_entropy(logits, classes, weight=weights, ignore_index=IGNORED)
    assert torch.allclose(pixel_cross_entropy(logits, classes, IGNORED, weights), expected)
    # Without weights the loss is what it has always been, to the last bit.
    losses = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="none")
    expected = losses.sum() / (classes != IGNORED).sum()
    assert torch.equal(SegmentationLoss("ce", IGNORED)(logits, classes), expected)


def test_weights_of_auto_are_those_of_enet():
    weights = balanced_class_weights([900, 99, 1, 0])
    shares = [0.9, 0.099, 0.001, 0]
    assert weights == pytest.approx([1 / math.log(1.02 + share) for share in shares])
    assert max(weights) == pytest.approx(50.5, abs=0.01)


def test_a_missing_library_and_weights_without_effect_are_named(monkeypatch):
    with pytest.raises(InputError, match="loss=lovasz has none, because it is a mean over"):
        check_loss("lovasz", "auto")
    hide_segmentation_models(monkeypatch)
    check_loss("ce", None)
    check_loss("focal", "auto")
    message = r"loss=dice: segmentation_models_pytorch is not installed: pip install .*segment\]"
    with pytest.raises(InputError, match=message):
        check_loss("dice", None)
