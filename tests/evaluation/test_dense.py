"""Segmentation by patch features: every step against a slow loop or another library."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from moco.data.augment.views import Normalized
from moco.errors import InputError
from moco.evaluation.dense_bank import (
    Bank,
    class_shares,
    drawn,
    joined_maps,
    knn_scores,
    patches_stood_for,
    pixel_classes,
)
from moco.evaluation.dense_features import DenseSet, NotFinite, check_maps, encoded, figures_of
from moco.evaluation.dense_linear import USUAL, WEIGHT_DECAYS, fit, fit_best
from moco.evaluation.features import EmbeddingStopped
from moco.models.backbones import build_backbone
from moco.segmentation.mask_sources import build_segmentation_source
from moco.segmentation.scaled_images import LONGEST, scaled_size
from tests.segmentation.shapes import save

COLOURS = np.array([(90, 90, 90), (220, 40, 40), (40, 40, 220)], np.uint8)
PLAIN = Normalized([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])


class MeanColours(nn.Module):
    """A backbone whose maps are the mean colours of squares of 2, 4, 4 and 8 px."""

    feature_map_strides = (2, 4, 4, 8)

    def feature_maps(self, images):
        return [F.avg_pool2d(images, stride) for stride in self.feature_map_strides]


def draw_quarters(root, sizes, num_val=3, ignored_rows=0):
    """Images (height, width) of coloured halves, left and right of a column of its own, colours by turns."""
    generator = np.random.default_rng(1)
    for number, (height, width) in enumerate(sizes):
        part = "val" if number < num_val else "train"
        mask = np.zeros((height, width), np.uint8)
        column = generator.integers(width // 4, 3 * width // 4)
        mask[:, :column], mask[:, column:] = number % 3, (number + 1) % 3
        noise = generator.integers(-9, 10, (height, width, 3))
        image = (COLOURS[mask].astype(int) + noise).astype(np.uint8)
        mask[:ignored_rows] = 255
        save(root / "images" / part / f"{number:02}.png", image)
        save(root / "masks" / part / f"{number:02}.png", mask)
    return root


def dense_set(root, **settings):
    usual = {
        "image_size": 24,
        "maps": [2],
        "bank_size": 300,
        "sampling": "balanced",
        "seed": 0,
        "batch_size": 4,
    }
    return DenseSet(
        build_segmentation_source("segmentation_folder", str(root)), PLAIN, **usual | settings
    )


def knn_figures(images, backbone, k=5, temperature=0.1):
    bank = images.bank(backbone, "cpu")
    scorer = partial(knn_scores, bank, k, temperature, "cpu")
    return figures_of(
        images.confusions({"knn": scorer}, backbone, "cpu")["knn"], images.source.class_names, "knn"
    )


@pytest.mark.parametrize(("size", "grid"), [((8, 12), (2, 3)), ((11, 7), (3, 2)), ((3, 5), (4, 4))])
def test_shares_count_the_labelled_pixels_of_each_patch(size, grid, generator):
    classes = generator.choice([0, 1, 2, 255], size)
    shares = class_shares(classes, grid, 3, 255)
    for row, column in np.ndindex(grid):
        held = [
            classes[y, x]
            for y, x in np.ndindex(size)
            if y * grid[0] // size[0] == row
            and x * grid[1] // size[1] == column
            and classes[y, x] != 255
        ]
        expected = [held.count(number) / len(held) if held else 0 for number in range(3)]
        np.testing.assert_allclose(shares[row * grid[1] + column], expected, rtol=1e-6)


def test_balanced_patches_take_turns_until_a_class_has_none_left(generator):
    labels = np.repeat([0, 3, 4], [50, 2, 20])
    rows = drawn(labels, 12, "balanced", generator)
    assert len(set(rows)) == 12
    assert np.bincount(labels[rows], minlength=5).tolist() == [5, 0, 0, 2, 5]
    assert sorted(drawn(labels, 100, "balanced", generator)) == list(range(72))


def test_uniform_patches_come_as_often_as_they_are(generator):
    labels = np.repeat([0, 1], [90, 10])
    share = np.mean([labels[drawn(labels, 20, "uniform", generator)].mean() for _ in range(400)])
    assert share == pytest.approx(0.1, abs=0.01)


def test_drawn_patches_together_stand_for_all_of_their_classes(generator):
    labels = generator.choice(5, 200, p=[0.6, 0.2, 0.1, 0.1, 0])
    rows = drawn(labels, 17, "balanced", generator)
    weights = patches_stood_for(labels, rows)
    np.testing.assert_allclose(
        np.bincount(labels[rows], weights, 5), np.bincount(labels, minlength=5), rtol=1e-6
    )


def test_knn_scores_are_those_of_a_slow_loop(generator):
    features, queries = (generator.normal(size=(count, 6)).astype(np.float32) for count in (40, 9))
    shares = generator.dirichlet(np.ones(4), 40).astype(np.float32)
    bank = Bank(features, shares, np.ones(40, np.float32), np.zeros(40, np.int64))
    found = knn_scores(bank, 7, 0.05, "cpu", queries)
    for query, scores in zip(queries.astype(float), found, strict=True):
        similarities = [
            float(query @ row / np.linalg.norm(query) / np.linalg.norm(row))
            for row in features.astype(float)
        ]
        nearest = sorted(range(40), key=lambda row: -similarities[row])[:7]
        weights = np.array([np.exp(similarities[row] / 0.05) for row in nearest])
        expected = sum(
            weight * shares[row]
            for weight, row in zip(weights / weights.sum(), nearest, strict=True)
        )
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_classes_in_parts_are_the_argmax_of_all_at_once():
    scores = torch.randn(21, 5, 7)
    scores[13] = scores[4]  # of equal ones the smaller counts
    whole = F.interpolate(scores[None], (33, 50), mode="bilinear")[0]
    assert torch.equal(pixel_classes(scores, (33, 50)), whole.argmax(dim=0))


def test_joined_maps_weigh_the_same_in_every_cell():
    maps = [torch.randn(2, 3, 8, 6) * 100, torch.randn(2, 5, 4, 3)]
    joined = joined_maps(maps)
    assert joined.shape == (2, 8, 8, 6)
    torch.testing.assert_close(joined[:, :3].norm(dim=1), torch.ones(2, 8, 6))
    unit = maps[1] / maps[1].norm(dim=1, keepdim=True)
    for number in range(2):  # against Pillow
        layer = Image.fromarray(unit[number, 2].numpy()).resize((6, 8), Image.Resampling.BILINEAR)
        torch.testing.assert_close(joined[number, 5], torch.from_numpy(np.array(layer)))


@pytest.mark.parametrize("size", [(375, 500), (333, 500), (1, 100_000), (40, 30)])
def test_images_are_scaled_to_whole_cells(size):
    height, width = scaled_size(size, 224, 32)
    assert height % 32 == width % 32 == 0
    assert 32 <= min(height, width) <= 224
    assert max(height, width) <= LONGEST * 224
    if max(size) < 2 * min(size):
        assert height / width == pytest.approx(size[0] / size[1], rel=0.1)


def test_the_linear_head_is_scikit_learns_logistic_regression(generator):
    from sklearn.linear_model import LogisticRegression

    features = generator.normal(3, [1, 5, 0.1, 2], (300, 4)).astype(np.float32)
    labels = (features[:, 0] + features[:, 1] / 5 + generator.normal(size=300) > 3.6).astype(
        int
    ) + (features[:, 2] > 3.1)
    weights = generator.uniform(0.5, 2, 300).astype(np.float32)
    head = fit(
        torch.from_numpy(features),
        F.one_hot(torch.from_numpy(labels)).float(),
        torch.from_numpy(weights),
        0.01,
    )
    standardised = (features - features.mean(0)) / features.std(0)
    other = LogisticRegression(C=1 / (0.01 * weights.sum()), tol=1e-8, max_iter=1000)
    other.fit(standardised, labels, weights)
    ours = torch.from_numpy(head.scores(features)).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, other.predict_proba(standardised), atol=2e-3)


def test_the_weight_decay_is_chosen_by_images_that_were_not_learned_from(generator):
    features = generator.normal(size=(600, 200)).astype(np.float32)
    noise = np.eye(2, dtype=np.float32)[generator.integers(0, 2, 600)]
    signal = np.eye(2, dtype=np.float32)[(features[:, 0] > 0).astype(int)]
    images, ones = np.arange(600) // 60 * 7, np.ones(600, np.float32)
    assert fit_best(Bank(features, noise, ones, images))[1] == max(WEIGHT_DECAYS)
    assert fit_best(Bank(features[:, :1], signal, ones, images))[1] == min(WEIGHT_DECAYS)
    assert fit_best(Bank(features, noise, ones, np.zeros(600, np.int64)))[1] == USUAL


def slow_knn_segmentation(root, k, temperature):
    """The confusion of the held-out images by all patches of 4 px, one loop inside the other."""

    def patches(part):
        for path in sorted((root / "images" / part).iterdir()):
            image, mask = Image.open(path), np.array(Image.open(root / "masks" / part / path.name))
            height, width = scaled_size(mask.shape, 24, 8)
            pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR)) / 255
            grid = height // 4, width // 4
            cells = np.empty((*grid, 3))
            for row, column in np.ndindex(grid):
                square = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                mean = (square.mean((0, 1)) - 0.5) / 0.25
                cells[row, column] = mean / np.linalg.norm(mean)
            yield cells, mask

    bank = []
    for cells, mask in patches("train"):
        for row, column in np.ndindex(cells.shape[:2]):
            inside = [
                mask[y, x]
                for y, x in np.ndindex(mask.shape)
                if (y * cells.shape[0] // mask.shape[0], x * cells.shape[1] // mask.shape[1])
                == (row, column)
            ]
            known = [number for number in inside if number != 255]
            if known:
                bank.append(
                    (cells[row, column], [known.count(number) / len(known) for number in range(3)])
                )
    confusion = np.zeros((3, 3), int)
    for cells, mask in patches("val"):
        scores = np.empty((*cells.shape[:2], 3), np.float32)
        for row, column in np.ndindex(cells.shape[:2]):
            nearest = sorted(
                bank, key=lambda held, row=row, column=column: -float(held[0] @ cells[row, column])
            )[:k]
            weights = np.array(
                [np.exp(float(held[0] @ cells[row, column]) / temperature) for held in nearest]
            )
            shares = [held[1] for held in nearest]
            scores[row, column] = (weights[:, None] * shares).sum(0) / weights.sum()
        size = mask.shape[::-1]
        layers = [
            np.array(Image.fromarray(scores[..., number]).resize(size, Image.Resampling.BILINEAR))
            for number in range(3)
        ]
        for y, x in np.ndindex(mask.shape):
            if mask[y, x] != 255:
                confusion[mask[y, x], int(np.argmax([layer[y, x] for layer in layers]))] += 1
    return confusion


def test_knn_segmentation_is_that_of_a_slow_loop_on_sizes_that_are_no_multiple_of_the_stride(
    tmp_path,
):
    draw_quarters(
        tmp_path,
        [(24, 31), (29, 26), (50, 37), (33, 27), (27, 33), (24, 40)],
        num_val=2,
        ignored_rows=7,
    )
    images = dense_set(tmp_path, bank_size=10_000)
    bank = images.bank(MeanColours(), "cpu")
    scorer = partial(knn_scores, bank, 9, 0.05, "cpu")
    ours = images.confusions({"knn": scorer}, MeanColours(), "cpu")["knn"].numpy()
    slow = slow_knn_segmentation(tmp_path, 9, 0.05)
    assert ours.sum() == slow.sum() == 17 * 31 + 22 * 26
    assert (
        abs(ours - slow).sum() <= 0.01 * slow.sum()
    )  # nearly equal scores may be rounded to either side
    assert (slow.diagonal().sum() / slow.sum()) > 0.9


@pytest.mark.parametrize("maps", [[1], [1, 2]])
def test_classes_that_are_colours_are_told_apart_by_an_untrained_backbone(tmp_path, maps):
    draw_quarters(tmp_path, [(32, 40)] * 12)
    backbone = build_backbone("resnet_tiny", stem="cifar").eval()
    images = dense_set(tmp_path, image_size=32, maps=maps, bank_size=2000)
    assert knn_figures(images, backbone)["dense/knn_miou"] > 0.95
    head, _ = fit_best(images.bank(backbone, "cpu"))
    confusion = images.confusions({"linear": head.scores}, backbone, "cpu")["linear"]
    assert figures_of(confusion, images.source.class_names, "linear")["dense/linear_miou"] > 0.95


@pytest.mark.parametrize("name", ["resnet_tiny", "swin_v2_tiny_patch2", "vit_tiny_patch4"])
def test_the_cells_of_every_backbone_cover_the_scaled_image(name):
    backbone = build_backbone(name).eval()
    height, width = scaled_size((37, 53), 64, backbone.feature_map_strides[-1])
    for number, stride in enumerate(backbone.feature_map_strides, start=1):
        maps = encoded(backbone, torch.randn(2, 3, height, width), [number])
        assert maps.shape == (
            2,
            backbone.feature_map_dims[number - 1],
            height / stride,
            width / stride,
        )


def test_pixels_without_a_class_neither_teach_nor_count(tmp_path):
    draw_quarters(tmp_path, [(32, 32)] * 9, ignored_rows=16)
    for path in [*(tmp_path / "images").rglob("*.png")]:
        image = np.array(Image.open(path))
        image[:16] = np.roll(image[:16], 1, axis=2)  # other colours where there is no class
        save(path, image)
    images = dense_set(tmp_path, image_size=32)
    bank = images.bank(MeanColours(), "cpu")
    np.testing.assert_allclose(bank.shares.sum(axis=1), 1, rtol=1e-6)
    figures = knn_figures(images, MeanColours())
    assert figures["dense/knn_pixel_accuracy"] > 0.9


def test_the_bank_has_its_size_and_is_the_same_for_every_batch_size(tmp_path):
    draw_quarters(tmp_path, [(32, 40), (40, 32), (32, 32), (32, 40), (40, 32), (32, 40), (32, 32)])
    one, all_at_once = (dense_set(tmp_path, bank_size=30, batch_size=size) for size in (1, 100))
    banks = [images.bank(MeanColours(), "cpu") for images in (one, all_at_once)]
    assert np.unique(banks[0].images, return_counts=True)[1].tolist() == [7, 8, 7, 8]
    for name in ("features", "shares", "weights", "images"):
        assert np.array_equal(*(getattr(bank, name) for bank in banks))
    other = dense_set(tmp_path, bank_size=30, seed=1).bank(MeanColours(), "cpu")
    assert not np.array_equal(other.features, banks[0].features)
    assert knn_figures(one, MeanColours()) == knn_figures(all_at_once, MeanColours())


def test_a_few_of_many_images_are_spread_evenly(tmp_path):
    draw_quarters(tmp_path, [(16, 16)] * 13)
    images = dense_set(tmp_path, num_images=5, image_size=16)
    assert images.rows(images.source.train) == [0, 2, 4, 6, 8]
    assert images.rows(images.source.validation) == [0, 1, 2]
    assert set(images.bank(MeanColours(), "cpu").images) == {0, 2, 4, 6, 8}


def test_measuring_in_blocks_changes_nothing(tmp_path, monkeypatch):
    import moco.evaluation.dense_features as module

    draw_quarters(tmp_path, [(32, 40), (40, 32)] * 4)
    before = knn_figures(dense_set(tmp_path), MeanColours())
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    assert knn_figures(dense_set(tmp_path), MeanColours()) == before


def test_unreadable_images_are_named_and_left_out_up_to_a_limit(tmp_path, caplog):
    draw_quarters(tmp_path, [(32, 32)] * 9)
    path = tmp_path / "images/train/05.png"
    images = dense_set(tmp_path, max_bad_fraction=0.5)
    path.write_bytes(path.read_bytes()[:400])  # after the files were checked
    assert 2 not in images.bank(MeanColours(), "cpu").images
    assert f"skipped 1 unreadable images: {path}" in caplog.text
    with pytest.raises(InputError, match=r"05\.png"):
        list(dense_set(tmp_path).patches(images.source.train, MeanColours(), "cpu"))


def test_an_image_whose_features_are_not_finite_is_named(tmp_path):
    class Broken(MeanColours):
        def feature_maps(self, images):
            return [part * torch.nan for part in super().feature_maps(images)]

    draw_quarters(tmp_path, [(32, 32)] * 9)
    with pytest.raises(NotFinite, match=r"the features of .*train/03\.png are not finite"):
        dense_set(tmp_path).bank(Broken(), "cpu")


def test_it_stops_when_told_to(tmp_path):
    draw_quarters(tmp_path, [(32, 32)] * 9)
    with pytest.raises(EmbeddingStopped):
        dense_set(tmp_path).bank(MeanColours(), "cpu", should_stop=lambda: True)


@pytest.mark.parametrize("maps", [[], [0], [5], [1, 1]])
def test_maps_that_no_backbone_has_are_refused(maps):
    with pytest.raises(
        InputError, match=r"evaluation.maps=.*: expected numbers from 1, the finest map, to 4"
    ):
        check_maps(maps, "evaluation.maps")
