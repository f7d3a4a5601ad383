"""What the plots for TensorBoard's cards show."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from moco.data.sources.source import ArrayImages, Labelled
from moco.evaluation.neighbors import nearest_by_block
from moco.evaluation.reports.cards import (
    CAPTION,
    COMPARISON_WIDTH,
    FRAME,
    NUM_ROWS,
    SIDE_NAME,
    TILE_CAPTION,
    VIEW_SIDES,
    comparison_card,
    confusion_card,
    neighbors_card,
    rows_of_classes,
    shown_name,
    view_pairs_card,
)
from moco.evaluation.reports.embedded import Embedded
from moco.evaluation.reports.plots import MARGIN, pixels

SIDE = VIEW_SIDES[0]


@pytest.mark.parametrize(("side", "shown"), [(16, 96), (40, 120), (100, 100), (224, 128)])
def test_eight_queries_stand_above_their_keys(side, shown):
    queries = np.full((9, side, side, 3), np.arange(9, dtype=np.uint8)[:, None, None, None])
    figure = view_pairs_card(queries, 100 + queries)
    plot = pixels(figure)
    assert plot.shape[:2] == (MARGIN + 2 * (shown + MARGIN), SIDE_NAME + 8 * (shown + MARGIN))
    for column in range(8):
        left = SIDE_NAME + column * (shown + MARGIN)
        below = MARGIN + shown + MARGIN
        assert (plot[MARGIN : MARGIN + shown, left : left + shown] == column).all()
        assert (plot[below : below + shown, left : left + shown] == 100 + column).all()
    assert [text.get_text() for text in figure.texts] == ["query", "key"]


@pytest.fixture
def sides(generator):
    """A bank and queries of six classes, one grey level an image. The last class is rare."""
    labels = np.array([*np.arange(5).repeat(8), 5])
    images = ArrayImages(
        np.repeat(np.arange(41, dtype=np.uint8) * 6, 64).reshape(41, 8, 8), "greys"
    )
    features = generator.normal(size=(41, 5)).astype(np.float32)
    names = ("a$b", "automobile", "[red]", "c", "写真", "rare")
    side = Embedded(features, labels, Labelled(images, labels, names), np.arange(41))
    return side, side._replace(features=generator.normal(size=(41, 5)).astype(np.float32))


def test_every_class_has_a_query_and_below_it_its_neighbours(sides):
    bank, queries = sides
    figure = neighbors_card(bank, queries, partial(nearest_by_block, bank.features))
    drawn = pixels(figure)
    assert drawn.shape[1] > 1.5 * drawn.shape[0]
    captions = [text.get_text() for text in figure.texts]
    assert len(captions) == 10 * (1 + NUM_ROWS)
    # No letters for the fifth name are in the font, so that its number stands there.
    names = [r"a\$b", "automo…", "[red]", "c", "class 4", "rare"]
    assert set(captions[:10]) == set(names)
    chosen = rows_of_classes(queries.labels, 10)
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank[0], queries[0])]
    for column, query in enumerate(chosen):
        left = MARGIN + column * (SIDE + MARGIN)
        assert drawn[MARGIN, left, 0] == 6 * query
        nearest = np.argsort(-(units[0] @ units[1][query]))[:NUM_ROWS]
        for place, row in enumerate(nearest, 1):
            top = MARGIN + place * (SIDE + TILE_CAPTION + MARGIN)
            assert (drawn[top + FRAME :, left + FRAME :][:8, :8] == 6 * row).all()
            is_right = bank.labels[row] == queries.labels[query]
            caption = figure.texts[10 * place + column].get_text()
            assert (caption == "✓") == is_right
            assert is_right or caption == names[bank.labels[row]]
            red, green, _ = drawn[top, left].tolist()
            assert (green > red) == is_right


def test_classes_without_names_and_few_images_are_shown_as_well(sides):
    bank, _ = sides
    few = bank.chosen(np.arange(41) % 14 == 0)
    few = few._replace(labelled=replace(few.labelled, class_names=None))
    figure = neighbors_card(few, few, partial(nearest_by_block, few.features))
    captions = [text.get_text() for text in figure.texts]
    assert captions[:3] == ["class 0", "class 1", "class 3"]
    assert captions[3:6] == ["✓"] * 3


def test_rows_are_chosen_from_every_class():
    labels = np.array([5] * 30 + [1, 1, 9])
    assert rows_of_classes(labels, 3).tolist() == [30, 0, 32]
    assert labels[rows_of_classes(labels, 10)].tolist() == [1, 1, *[5] * 7, 9]
    assert rows_of_classes(np.array([3, 1, 2]), 10).tolist() == [1, 2, 0]
    assert rows_of_classes(np.arange(1000), 3).tolist() == [0, 499, 999]


@pytest.mark.parametrize("num_classes", [1, 2, 12, 30, 200])
def test_a_confusion_matrix_has_names_and_percents_as_far_as_they_are_legible(num_classes):
    counts = np.eye(num_classes, dtype=np.int64) * 1_000_000
    counts[0, -1] += 3_000_000 if num_classes > 1 else 0
    names = [f"name {number}" for number in range(num_classes)]
    figure = confusion_card(names, counts, "pixels")
    axes = figure.axes[0]
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert (ticks == names) == (num_classes <= 30)
    assert ticks[-1] == names[-1]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert bool(written) == (num_classes <= 12)
    if 1 < num_classes <= 12:
        assert (written[(0, 0)], written[(num_classes - 1, 0)]) == ("25", "75")
    assert f"of {counts.sum():,} pixels right" in figure.get_suptitle()
    assert max(pixels(figure).shape) <= 1100


@pytest.mark.parametrize(("width", "scale"), [(34, 19), (1500, 1)])
def test_a_comparison_names_its_parts_and_its_classes(width, scale):
    panels = np.zeros((10, width, 3), np.uint8)
    panels[:, :10] = 200
    classes = [(shown_name("a$b", 1), (255, 0, 0)), (shown_name("写真", 5), (0, 0, 255))]
    figure = comparison_card(panels, classes)
    drawn = pixels(figure)
    assert drawn.shape[1] == width * scale
    top = round(CAPTION * width * scale / COMPARISON_WIDTH)
    assert (drawn[top : top + 10 * scale, : 10 * scale] == 200).all()
    assert [text.get_text() for text in figure.texts] == [
        "image", "truth", "prediction", "■", r"a\$b", "■", "class 5",
    ]  # fmt: skip
