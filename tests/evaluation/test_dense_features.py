"""Segmentation by patch features: every step against a slow loop or another library."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from moco.errors import InputError
from moco.evaluation.dense_bank import knn_scores
from moco.evaluation.dense_features import (
    NotFinite,
    build_dense_set,
    dense_figures,
    encode_patches,
    join_maps,
    pixel_classes,
)
from moco.evaluation.dense_linear import fit_best
from moco.evaluation.features import EmbeddingStopped
from moco.models.backbones import build_backbone
from moco.segmentation.mask_batches import scaled_size
from tests.evaluation.dense_images import MeanColours, dense_set, draw_halves
from tests.evaluation.test_dense_bank import slow_shares
from tests.segmentation.shapes import save


def knn_confusion(images, backbone, num_neighbors=5, temperature=0.1):
    bank = images.bank(backbone, "cpu")
    scorer = partial(knn_scores, bank, num_neighbors, temperature, "cpu")
    return images.confusions({"knn": scorer}, backbone, "cpu")["knn"]


def knn_figures(images, backbone):
    confusion = knn_confusion(images, backbone)
    scores, ious = dense_figures(confusion, images.source.class_names, "knn")
    return scores | ious


def test_of_equal_scores_the_smaller_class_wins():
    scores = torch.randn(21, 5, 7)
    scores[4] = scores[13] = 9
    assert (pixel_classes(scores, 33, 50) == 4).all()


def test_joined_maps_have_the_same_norm_in_every_cell():
    maps = [torch.randn(2, 3, 8, 6) * 100, torch.randn(2, 5, 4, 3)]
    joined = join_maps(maps)
    assert joined.shape == (2, 8, 8, 6)
    torch.testing.assert_close(joined[:, :3].norm(dim=1), torch.ones(2, 8, 6))
    unit = maps[1] / maps[1].norm(dim=1, keepdim=True)
    for number in range(2):
        layer = Image.fromarray(unit[number, 2].numpy()).resize((6, 8), Image.Resampling.BILINEAR)
        torch.testing.assert_close(joined[number, 5], torch.from_numpy(np.array(layer)))


def mean_colours(pixels, stride):
    """The mean colour of each square, with unit norm: (rows, columns, 3)."""
    rows, columns = pixels.shape[0] // stride, pixels.shape[1] // stride
    means = pixels.reshape(rows, stride, columns, stride, 3).mean(axis=(1, 3))
    normalised = (means - 0.5) / 0.25
    return normalised / np.linalg.norm(normalised, axis=2, keepdims=True)


def slow_patches(root, part):
    """The features of patches of 4 px and the mask of each image of a part."""
    for path in sorted((root / "images" / part).iterdir()):
        image = Image.open(path)
        mask = np.array(Image.open(root / "masks" / part / path.name))
        height, width = scaled_size(*mask.shape, image_size=24, stride=8)
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR)) / 255
        yield mean_colours(pixels, 4), mask


def slow_knn_confusion(root, num_neighbors, temperature):
    """The confusion matrix of the held-out images, with all patches in the bank."""
    bank_features, bank_shares = [], []
    for cells, mask in slow_patches(root, "train"):
        shares = slow_shares(mask, cells.shape[:2], 3)
        labelled = shares.sum(axis=1) > 0
        bank_features.append(cells.reshape(-1, 3)[labelled])
        bank_shares.append(shares[labelled])
    bank_features, bank_shares = np.concatenate(bank_features), np.concatenate(bank_shares)

    confusion = np.zeros((3, 3), int)
    for cells, mask in slow_patches(root, "val"):
        scores = np.empty(cells.shape, np.float32)
        for row, column in np.ndindex(cells.shape[:2]):
            similarities = bank_features @ cells[row, column]
            nearest = np.argsort(-similarities, kind="stable")[:num_neighbors]
            weights = np.exp(similarities[nearest] / temperature)
            scores[row, column] = weights @ bank_shares[nearest] / weights.sum()
        layers = []
        for number in range(3):
            layer = Image.fromarray(scores[..., number])
            layers.append(layer.resize(mask.shape[::-1], Image.Resampling.BILINEAR))
        predicted = np.argmax([np.array(layer) for layer in layers], axis=0)
        for truth, found in zip(mask.ravel(), predicted.ravel(), strict=True):
            if truth != 255:
                confusion[truth, found] += 1
    return confusion


def test_knn_segmentation_equals_a_slow_loop_on_sizes_that_are_no_multiple_of_the_stride(tmp_path):
    sizes = [(24, 31), (29, 26), (50, 37), (33, 27), (27, 33), (24, 40)]
    draw_halves(tmp_path, sizes, num_val=2, ignored_rows=7)
    images = dense_set(tmp_path, bank_size=10_000)
    ours = knn_confusion(images, MeanColours(), num_neighbors=9, temperature=0.05).numpy()
    slow = slow_knn_confusion(tmp_path, num_neighbors=9, temperature=0.05)
    assert ours.sum() == slow.sum() == 17 * 31 + 22 * 26
    # Nearly equal scores may be rounded to either side.
    assert abs(ours - slow).sum() <= 0.01 * slow.sum()
    assert slow.diagonal().sum() / slow.sum() > 0.9


@pytest.mark.parametrize("maps", [[1], [1, 2]])
def test_an_untrained_backbone_tells_classes_apart_that_are_colours(tmp_path, maps):
    draw_halves(tmp_path, [(32, 40)] * 12)
    backbone = build_backbone("resnet_tiny", stem="cifar").eval()
    images = dense_set(tmp_path, image_size=32, maps=maps, bank_size=2000)
    assert knn_figures(images, backbone)["dense/knn_miou"] > 0.95
    head, _ = fit_best(images.bank(backbone, "cpu"))
    confusion = images.confusions({"linear": head.scores}, backbone, "cpu")["linear"]
    figures, _ = dense_figures(confusion, images.source.class_names, "linear")
    assert figures["dense/linear_miou"] > 0.95


@pytest.mark.parametrize("name", ["resnet_tiny", "swin_v2_tiny_patch2", "vit_tiny_patch4"])
def test_the_cells_of_every_backbone_cover_the_scaled_image(name):
    backbone = build_backbone(name).eval()
    height, width = scaled_size(37, 53, 64, backbone.feature_map_strides[-1])
    images = torch.randn(2, 3, height, width)
    for number, stride in enumerate(backbone.feature_map_strides, start=1):
        maps = encode_patches(backbone, images, [number])
        dim = backbone.feature_map_dims[number - 1]
        assert maps.shape == (2, dim, height / stride, width / stride)


def test_pixels_without_a_class_neither_teach_nor_count(tmp_path):
    draw_halves(tmp_path, [(32, 32)] * 9, ignored_rows=16)
    for path in (tmp_path / "images").rglob("*.png"):
        image = np.array(Image.open(path))
        image[:16] = np.roll(image[:16], 1, axis=2)  # other colours where there is no class
        save(path, image)
    images = dense_set(tmp_path, image_size=32)
    bank = images.bank(MeanColours(), "cpu")
    np.testing.assert_allclose(bank.shares.sum(axis=1), 1, rtol=1e-6)
    assert knn_figures(images, MeanColours())["dense/knn_pixel_accuracy"] > 0.9


def test_the_bank_has_its_size_and_is_the_same_for_every_batch_size(tmp_path):
    sizes = [(32, 40), (40, 32), (32, 32), (32, 40), (40, 32), (32, 40), (32, 32)]
    draw_halves(tmp_path, sizes)
    one_by_one = dense_set(tmp_path, bank_size=30, batch_size=1)
    all_at_once = dense_set(tmp_path, bank_size=30, batch_size=100)
    bank = one_by_one.bank(MeanColours(), "cpu")
    other_bank = all_at_once.bank(MeanColours(), "cpu")
    assert np.unique(bank.images, return_counts=True)[1].tolist() == [7, 8, 7, 8]
    for name in ("features", "shares", "weights", "images"):
        assert np.array_equal(getattr(bank, name), getattr(other_bank, name))
    assert knn_figures(one_by_one, MeanColours()) == knn_figures(all_at_once, MeanColours())


def test_another_seed_draws_other_patches(tmp_path):
    draw_halves(tmp_path, [(32, 40)] * 7)
    bank = dense_set(tmp_path, bank_size=30).bank(MeanColours(), "cpu")
    other_bank = dense_set(tmp_path, bank_size=30, seed=1).bank(MeanColours(), "cpu")
    assert not np.array_equal(bank.features, other_bank.features)


def test_a_few_of_many_images_are_spread_evenly(tmp_path):
    draw_halves(tmp_path, [(16, 16)] * 13)
    images = dense_set(tmp_path, num_images=5, image_size=16)
    assert images.indices(images.source.train) == [0, 2, 4, 6, 8]
    assert images.indices(images.source.validation) == [0, 1, 2]
    assert set(images.bank(MeanColours(), "cpu").images) == {0, 2, 4, 6, 8}


def test_measuring_in_blocks_changes_nothing(tmp_path, monkeypatch):
    draw_halves(tmp_path, [(32, 40), (40, 32)] * 4)
    before = knn_figures(dense_set(tmp_path), MeanColours())
    monkeypatch.setattr("moco.evaluation.dense_features.BLOCK_BYTES", 1)
    assert knn_figures(dense_set(tmp_path), MeanColours()) == before


def test_unreadable_images_are_named_and_skipped_up_to_a_limit(tmp_path, caplog):
    draw_halves(tmp_path, [(32, 32)] * 9)
    lenient = dense_set(tmp_path, max_bad_fraction=0.5)
    strict = dense_set(tmp_path)
    path = tmp_path / "images/train/05.png"
    path.write_bytes(path.read_bytes()[:400])  # after the files were checked
    assert 2 not in lenient.bank(MeanColours(), "cpu").images
    assert f"skipped 1 unreadable images: {path}" in caplog.text
    with pytest.raises(InputError, match=r"05\.png"):
        strict.bank(MeanColours(), "cpu")


class Broken(MeanColours):
    def feature_maps(self, images):
        return [part * torch.nan for part in super().feature_maps(images)]


def test_an_image_whose_features_are_not_finite_is_named(tmp_path):
    draw_halves(tmp_path, [(32, 32)] * 9)
    with pytest.raises(NotFinite, match=r"the features of .*train/03\.png are not finite"):
        dense_set(tmp_path).bank(Broken(), "cpu")


def test_it_stops_when_it_is_told_to(tmp_path):
    draw_halves(tmp_path, [(32, 32)] * 9)
    with pytest.raises(EmbeddingStopped):
        dense_set(tmp_path, should_stop=lambda: True).bank(MeanColours(), "cpu")


@pytest.mark.parametrize("maps", [[], [0], [5], [1, 1]])
def test_maps_that_no_backbone_has_are_refused(maps):
    message = r"evaluation.maps=.*: expected numbers from 1, the finest map, to 4"
    with pytest.raises(InputError, match=message):
        build_dense_set(
            "evaluation", "voc2012", None, maps=maps, mean=[], std=[], ignore_index=0,
            max_image_pixels=1,
        )  # fmt: skip
