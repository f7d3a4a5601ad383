"""The plots: the right images and numbers in the right places, for any number of classes."""

import numpy as np
import pytest
from PIL import Image

from moco.evaluation.knn import confusion_matrix
from moco.evaluation.reports.plots import (
    LINE,
    MARGIN,
    NAMED_CLASSES,
    Tile,
    class_colors,
    confusion_plot,
    feature_maps_plot,
    map_plot,
    pixels,
    similarity_histogram,
    thumbnail,
    tile_plot,
)


def plain(color, side=20):
    return Image.new("RGB", (side, side), color)


def colors_of(image):
    return {color for _, color in image.convert("RGB").getcolors(2**24)}


def test_tiles_stand_in_rows_pixel_by_pixel_with_coloured_captions():
    tiles = [
        Tile(plain("black"), "3"),
        Tile(plain("blue"), "0.9", "green"),
        Tile(plain("yellow"), "0.5", "red"),
    ]
    image = Image.fromarray(pixels(tile_plot([tiles, tiles], gap=7)))
    assert image.size == (MARGIN + 3 * (20 + MARGIN) + 7, MARGIN + 2 * (20 + LINE + MARGIN))
    for row in range(2):
        top = MARGIN + row * (20 + LINE + MARGIN)
        lefts = [MARGIN, 20 + 2 * MARGIN + 7, 2 * 20 + 3 * MARGIN + 7]
        captions = []
        for left, color in zip(lefts, [(0, 0, 0), (0, 0, 255), (255, 255, 0)], strict=True):
            square = image.crop((left, top, left + 20, top + 20))
            assert colors_of(square) == {color}
            captions.append(image.crop((left, top + 20, left + 20, top + 20 + LINE)))
        assert any(green > red + 30 for red, green, _ in colors_of(captions[1]))
        assert any(red > green + 30 for red, green, _ in colors_of(captions[2]))


def test_thumbnails_are_the_middle_square_and_small_images_keep_their_pixels():
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste(plain("red", 30), (30, 0))
    assert all(red == 255 and green < 30 for red, green, _ in colors_of(thumbnail(wide, 10)))
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    assert colors_of(thumbnail(grey, 64)) == {(0, 0, 0), (255, 255, 255)}


def test_confusions_are_counted_by_true_and_predicted_class():
    labels = np.array([7, 7, 2, 9, 9])
    predicted = np.array([7, 2, 2, 9, 5])
    classes, counts = confusion_matrix(labels, predicted)
    assert classes.tolist() == [2, 5, 7, 9]
    for row, true in enumerate(classes):
        for column, said in enumerate(classes):
            assert counts[row, column] == ((labels == true) & (predicted == said)).sum()


def test_a_confusion_matrix_shows_shares_of_rows_and_names_every_class():
    counts = np.array([[3, 1], [0, 0]])
    axes = confusion_plot(np.array([3, 8]), counts).axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "3", (1, 0): "1"}
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["3", "8"]
    assert "75.0% of 4 queries right" in axes.get_title()


@pytest.mark.parametrize("number", [1, NAMED_CLASSES + 1, 1000])
def test_confusion_matrices_of_any_size_fit_and_are_dark_where_they_are_right(number):
    figure = confusion_plot(np.arange(number), np.eye(number, dtype=np.int64))
    drawn = pixels(figure)
    assert max(drawn.shape) <= 1200
    box = figure.axes[0].get_window_extent()
    left, right = int(box.x0), int(box.x1)
    top, bottom = drawn.shape[0] - int(box.y1), drawn.shape[0] - int(box.y0)
    red = drawn[top:bottom, left:right, 0][4:-4, 4:-4]
    assert red[:8, :8].min() < 130
    assert red[-8:, -8:].min() < 130
    assert len(figure.axes[0].get_yticks()) == min(number, 10)


def test_similarities_stand_at_their_cosines():
    axes = similarity_histogram(np.full(50, 0.99), np.full(900, -0.5)).axes[0]
    negative, positive = (patch.get_data() for patch in axes.patches)
    for stairs, cosine in ((negative, -0.5), (positive, 0.99)):
        place = int(stairs.values.argmax())
        assert stairs.edges[place] <= cosine <= stairs.edges[place + 1]
        assert stairs.values[place] == stairs.values.sum() == 1
    labels = [patch.get_label() for patch in axes.patches]
    assert labels == ["negative: 900 pairs, mean -0.500", "positive: 50 pairs, mean 0.990"]


@pytest.mark.parametrize("num_classes", [1, 2, 11, NAMED_CLASSES])
def test_points_have_the_colour_that_the_legend_gives_their_class(num_classes):
    num_points = max(2, num_classes)
    labels = np.arange(num_points) % num_classes
    points = np.stack([np.arange(num_points)] * 2, axis=1)
    figure = map_plot(points, labels, "a map")
    scatter, *entries = figure.axes[0].collections
    assert np.array_equal(scatter.get_offsets(), points)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        str(number) for number in range(num_classes)
    ]
    for color, label in zip(scatter.get_facecolors(), labels, strict=True):
        assert np.allclose(color[:3], entries[label].get_facecolor()[0, :3])
    assert len(np.unique(class_colors(num_classes), axis=0)) == num_classes


def test_a_thousand_classes_are_counted_instead_of_listed(generator):
    figure = map_plot(generator.normal(size=(2000, 2)), np.arange(2000) % 1000, "a map")
    assert figure.axes[0].get_title() == "a map (1,000 classes)"
    assert not figure.legends
    assert max(pixels(figure).shape) < 900


@pytest.mark.parametrize("number", [1, 5])
def test_each_image_stands_beside_its_own_maps(number):
    images = [plain((place, 0, 0), 16) for place in range(number)]
    colors = np.arange(number, dtype=np.uint8)[:, None, None, None]
    maps = {name: np.broadcast_to(colors, (number, 2, 2, 3)) for name in ("a", "b")}
    plot = Image.fromarray(pixels(feature_maps_plot(images, maps)))
    for place in range(number):
        left = MARGIN + place % 2 * 3 * (112 + MARGIN)
        top = MARGIN + place // 2 * (112 + LINE + MARGIN)
        assert plot.getpixel((left, top)) == (place, 0, 0)
        for column in (1, 2):
            assert plot.getpixel((left + column * (112 + MARGIN), top)) == (place,) * 3
