"""What evaluation draws: the right images in the right places, and TensorBoard's files."""

import numpy as np
import pytest
from PIL import Image

from moco.callbacks.feature_plots import Embedded, FeaturePlots, neighbor_row, projected, spaced
from moco.data.sources.source import ArrayImages, Labelled
from moco.evaluation.reports.drawing import (
    LINE,
    MARGIN,
    Neighbor,
    NeighborRow,
    confusion_counts,
    confusion_plot,
    neighbors_plot,
    similarity_histogram,
    thumbnail,
)


def plain(color, side=20):
    return Image.new("RGB", (side, side), color)


def colors_of(image):
    return {color for _, color in image.convert("RGB").getcolors(2**24)}


def test_a_query_stands_left_of_its_neighbors_whose_words_are_green_or_red():
    neighbors = [
        Neighbor(plain("blue"), 0.9, "3", True),
        Neighbor(plain("yellow"), 0.5, "4", False),
    ]
    image = neighbors_plot([NeighborRow(plain("black"), "3", neighbors)] * 2)
    step = 20 + MARGIN
    for line in range(2):
        top = MARGIN + line * (20 + LINE + MARGIN)
        assert image.getpixel((MARGIN, top)) == (0, 0, 0)
        assert image.getpixel((3 * MARGIN + step, top)) == (0, 0, 255)
        assert image.getpixel((3 * MARGIN + 2 * step, top)) == (255, 255, 0)
        words = [
            image.crop(
                (
                    3 * MARGIN + step * place,
                    top + 20,
                    3 * MARGIN + step * place + 20,
                    top + 20 + LINE,
                )
            )
            for place in (1, 2)
        ]
        assert any(green > red + 30 for red, green, _ in colors_of(words[0]))
        assert any(red > green + 30 for red, green, _ in colors_of(words[1]))
        assert not any(green > red + 30 for red, green, _ in colors_of(words[1]))


def test_thumbnails_are_the_middle_square_and_small_ones_keep_their_pixels():
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste(plain("red", 30), (30, 0))
    assert all(red == 255 and green < 30 for red, green, _ in colors_of(thumbnail(wide, 10)))
    chess = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    assert colors_of(thumbnail(chess, 64)) == {(0, 0, 0), (255, 255, 255)}


def test_confusions_are_counted_by_true_and_predicted_class():
    labels, predicted = np.array([7, 7, 2, 9, 9]), np.array([7, 2, 2, 9, 5])
    counts, classes = confusion_counts(labels, predicted)
    assert classes.tolist() == [2, 5, 7, 9]
    slow = [
        [int(((labels == true) & (predicted == said)).sum()) for said in classes]
        for true in classes
    ]
    assert counts.tolist() == slow


@pytest.mark.parametrize("number", [1, 3, 30, 1000])
def test_confusion_matrices_of_any_size_are_dark_where_they_are_right(number):
    image = confusion_plot(
        np.eye(number, dtype=np.int64), [f"class {place}" for place in range(number)]
    )
    assert max(image.size) <= 1200
    corner = (image.width - MARGIN - 1, image.height - MARGIN - 1)
    assert image.getpixel(corner) == (8, 48, 107)


def test_similarities_stand_at_their_cosines():
    image = similarity_histogram(np.full(50, 0.99), np.full(900, -0.5))
    middle = MARGIN + LINE + 120
    row = [image.getpixel((MARGIN + place, middle)) for place in range(640)]
    filled = [place for place, color in enumerate(row) if color != (255, 255, 255)]
    assert [place // 8 for place in sorted({place - place % 8 for place in filled})] == [20, 79]


@pytest.fixture
def embedded(generator):
    """40 images of one grey level each, whose feature is an angle that grows with it; the third cannot be read."""
    levels = np.linspace(0, 255, 40).astype(np.uint8)
    images = ArrayImages(np.repeat(levels, 64).reshape(40, 8, 8), "greys")
    rows = np.delete(np.arange(40), 2)
    angles = levels[rows] / 255
    features = 5 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.arange(40) // 20
    return Embedded(features, labels[rows], Labelled(images, labels), rows)


def test_neighbors_are_shown_with_their_own_images_also_after_an_unreadable_one(embedded):
    row = neighbor_row(embedded, embedded, 5, np.array([1.0, 0.9]), np.array([5, 20]))
    level = embedded.labelled.images[6].getpixel((0, 0))
    assert row.query.getpixel((0, 0)) == row.neighbors[0].image.getpixel((0, 0)) == level
    assert [neighbor.is_same for neighbor in row.neighbors] == [True, False]
    assert (row.label, row.neighbors[1].label, row.neighbors[1].similarity) == ("0", "1", 0.9)


def test_images_come_every_so_many_epochs_wherever_the_measurements_are():
    images = FeaturePlots(10, 0)
    measured = range(4, 45, 4)
    assert [epoch for epoch in measured if images.is_due(epoch, epoch - 4)] == [12, 20, 32, 40]
    assert not any(FeaturePlots(None, 0).is_due(epoch, epoch - 4) for epoch in measured)


class Experiment:
    """Stands for a ``SummaryWriter``."""

    def __init__(self):
        self.images = {}

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC"
        self.images[tag] = Image.fromarray(image)


def test_a_measurement_is_drawn_as_neighbors_and_confusions(embedded):
    experiment = Experiment()
    FeaturePlots(1, 0).draw(experiment, 3, embedded, embedded, num_neighbors=1, temperature=0.1)
    assert set(experiment.images) == {"knn/neighbors", "knn/confusion"}
    shown = experiment.images["knn/neighbors"]
    for line in range(16):  # each image is its own nearest neighbour
        top = MARGIN + line * (64 + LINE + MARGIN)
        assert shown.getpixel((MARGIN, top)) == shown.getpixel((3 * MARGIN + 64 + MARGIN, top))
    assert shown.getpixel((MARGIN, MARGIN)) == (0, 0, 0)
    assert shown.getpixel((MARGIN, MARGIN + 15 * (64 + LINE + MARGIN))) == (
        255,
        255,
        255,
    )  # from the first to the last
    assert experiment.images["knn/confusion"].getpixel((20, 60)) is not None


def test_rows_keep_their_inner_products_in_fewer_dimensions(generator):
    rows = (generator.normal(size=(60, 5)) @ generator.normal(size=(5, 40))).astype(
        np.float32
    )  # of rank 5
    fewer = projected(rows, 8)
    assert fewer.shape == (60, 8)
    np.testing.assert_allclose(fewer @ fewer.T, rows @ rows.T, atol=1e-3)
    assert (fewer.var(axis=0)[:5] > 1e-3).all()
    assert projected(rows, 40).shape == (60, 40)


def test_the_projector_has_one_copy_of_at_most_so_many_images(embedded, tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    for _ in range(2):  # as when a run goes on
        writer = SummaryWriter(str(tmp_path))
        FeaturePlots(1, 10).project(writer, embedded)
        writer.close()
    assert "warning" not in capsys.readouterr().out
    folder = tmp_path / "00000" / "features"
    tensors = np.loadtxt(folder / "tensors.tsv")
    assert tensors.shape == (10, 2)
    np.testing.assert_allclose(np.linalg.norm(tensors, axis=1), 1, atol=1e-3)
    assert (folder / "metadata.tsv").read_text().split() == ["0"] * 5 + ["1"] * 5
    with Image.open(folder / "sprite.png") as sprite:
        assert sprite.size == (4 * 32, 4 * 32)
    assert (tmp_path / "projector_config.pbtxt").read_text().count("tensor_path") == 1


def test_chosen_rows_are_spread_over_all():
    assert spaced(360, 16)[[0, -1]].tolist() == [0, 359]
    assert spaced(5, 16).tolist() == [0, 1, 2, 3, 4]
