"""What TensorBoard gets of the kNN monitor's features."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moco.callbacks.feature_plots import FeaturePlots
from moco.data.sources.source import ArrayImages, Labelled
from moco.evaluation.reports.cards import FRAME, TILE_CAPTION, VIEW_SIDES
from moco.evaluation.reports.embedded import GAP, SPACE, THUMBNAIL, Embedded, neighbors_plot
from moco.evaluation.reports.plots import MARGIN, pixels

SIDE = VIEW_SIDES[0]
FIRST_NEIGHBOR = MARGIN + THUMBNAIL + SPACE + GAP


@pytest.fixture
def embedded(generator):
    """39 images of one grey level each, whose feature is an angle that grows with the level.

    They are of a dataset of 40 images, the third of which cannot be read.
    """
    levels = np.linspace(0, 255, 40).astype(np.uint8)
    images = ArrayImages(np.repeat(levels, 64).reshape(40, 8, 8), "greys")
    rows = np.delete(np.arange(40), 2)
    angles = levels[rows] / 255
    features = 5 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.arange(40) // 20
    return Embedded(features, labels[rows], Labelled(images, labels), rows)


def test_neighbors_are_shown_with_their_own_images_also_after_an_unreadable_one(embedded):
    shown, rows = np.array([5]), np.array([[5, 20]])
    figure = neighbors_plot(embedded, embedded, shown, np.array([[1.0, 0.9]]), rows)
    captions = [(text.get_text(), text.get_color()) for text in figure.texts]
    assert captions == [
        ("class 0", "black"),
        ("1.00 class 0", "#007a3d"),
        ("0.90 class 1", "#be1e1e"),
    ]
    named = embedded._replace(
        labelled=replace(embedded.labelled, class_names=("a$b", "tailor bird"))
    )
    figure = neighbors_plot(named, named, shown, np.array([[1.0, 0.9]]), rows)
    assert [text.get_text() for text in figure.texts] == [r"a\$b", r"1.00 a\$b", "0.90 tailor b…"]
    drawn = pixels(figure)
    level = int(embedded.labelled.images[6][0, 0, 0])
    assert drawn[MARGIN, MARGIN, 0] == drawn[MARGIN, FIRST_NEIGHBOR, 0] == level


def test_images_without_labels_have_their_names_below(embedded, monkeypatch):
    none = embedded._replace(labels=np.full(39, -1))
    figure = neighbors_plot(
        none, none, np.array([5]), np.array([[0.9991, 0.5]]), np.array([[5, 20]])
    )
    captions = [text.get_text() for text in figure.texts]
    assert captions == ["query\ngreys[6]", "0.999\ngreys[6]", "0.500\ngreys[21]"]
    names = {6: "a/Größe $1 20260101_120000.jpg", 21: "b/写真.jpg"}
    monkeypatch.setattr(ArrayImages, "name", lambda images, index: names[index])
    assert none.shown_name(5) == "…101_120000.jpg"
    assert none.shown_name(20) == "image 21"
    names[6] = "a/Größe $1.jpg"
    assert none.shown_name(5) == r"Größe \$1.jpg"


def test_plots_come_every_so_many_epochs_wherever_the_measurements_are():
    plots = FeaturePlots(10, 0)
    due = [epoch for epoch in range(4, 45, 4) if plots.is_due(epoch, epoch - 4)]
    assert due == [12, 20, 32, 40]
    assert plots.is_due(3, 2, is_last=True)
    assert not FeaturePlots(None, 0).is_due(10, 9, is_last=True)


class Experiment:
    """Stands for a ``SummaryWriter``."""

    def __init__(self):
        self.images = {}

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC"
        assert image.dtype == np.uint8
        self.images[tag] = image


def test_a_measurement_is_drawn_as_neighbors_and_confusions(embedded):
    experiment = Experiment()
    FeaturePlots(1, 0).draw(experiment, 3, embedded, embedded, num_neighbors=1, temperature=0.1)
    assert set(experiment.images) == {"1_main/7_knn/neighbors", "1_main/8_knn/confusion"}
    shown = experiment.images["1_main/7_knn/neighbors"]
    for column in range(10):
        # Each image is its own nearest neighbour.
        left = MARGIN + column * (SIDE + MARGIN)
        below = MARGIN + SIDE + TILE_CAPTION + MARGIN
        assert (shown[MARGIN, left] == shown[below + FRAME, left + FRAME]).all()


def test_the_projector_has_one_copy_of_at_most_so_many_images(embedded, tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    class_names = ("night", "bright\tday")
    embedded = embedded._replace(labelled=replace(embedded.labelled, class_names=class_names))
    # Twice, as when a run resumes.
    for _ in range(2):
        writer = SummaryWriter(str(tmp_path))
        FeaturePlots(1, 10).project(writer, embedded)
        writer.close()
    assert "warning" not in capsys.readouterr().out
    folder = tmp_path / "00000" / "features"
    tensors = np.loadtxt(folder / "tensors.tsv")
    # Of two dimensions, so all others are 0.
    assert tensors.shape == (10, 64)
    assert not tensors[:, 2:].any()
    np.testing.assert_allclose(np.linalg.norm(tensors, axis=1), 1, atol=1e-3)
    metadata = (folder / "metadata.tsv").read_text().splitlines()
    assert metadata == ["night"] * 5 + [r"bright\tday"] * 5
    with Image.open(folder / "sprite.png") as sprite:
        assert sprite.size == (4 * 32, 4 * 32)
    assert (tmp_path / "projector_config.pbtxt").read_text().count("tensor_path") == 1
