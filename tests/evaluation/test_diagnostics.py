"""The label-free figures against closed forms, other libraries and slow loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import linalg, special
from torch import nn

from moco.evaluation.diagnostics import (
    alignment,
    embedding_std,
    encoder_distances,
    evenly_spaced,
    gradient_norms,
    in_batch_negative_similarity,
    label_free_figures,
    lidar,
    negative_similarity,
    pair_similarities,
    positive_similarity,
    rank_me,
    stage_of,
    uniformity,
)
from moco.models.backbones import build_backbone


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_similarities_equal_the_mean_over_all_pairs():
    query, key, negatives = unit(10, 16), unit(10, 16), unit(50, 16)
    positive = float((query @ key.T).diagonal().mean())
    negative = float((query @ negatives.T).mean())
    assert float(positive_similarity(query, key)) == pytest.approx(positive, abs=1e-6)
    assert float(negative_similarity(query, negatives)) == pytest.approx(negative, abs=1e-6)


def test_a_querys_own_key_is_none_of_its_negatives_in_the_batch():
    # The keys of three devices; the queries are those of the second.
    query, keys = unit(10, 16), unit(30, 16)
    others = [float(query[i] @ keys[j]) for i in range(10) for j in range(30) if j != 10 + i]
    ours = in_batch_negative_similarity(query, keys[10:20], keys)
    assert float(ours) == pytest.approx(sum(others) / len(others), abs=1e-6)


def test_embedding_std_is_zero_when_collapsed_and_one_over_root_c_when_spread():
    assert float(embedding_std(unit(1, 64).expand(100, 64))) == pytest.approx(0.0, abs=1e-7)
    assert float(embedding_std(unit(20000, 64))) == pytest.approx(1 / math.sqrt(64), rel=1e-2)


def test_alignment_is_zero_for_equal_views_two_for_orthogonal_ones_and_four_for_opposite_ones():
    rows = torch.eye(8)
    assert float(alignment(rows, rows)) == 0
    assert float(alignment(rows, rows.roll(1, 0))) == 2
    assert float(alignment(rows, -rows)) == 4


def test_uniformity_is_zero_for_equal_rows_and_that_of_the_sphere_for_spread_ones():
    assert float(uniformity(unit(1, 16).expand(50, 16))) == pytest.approx(0, abs=1e-6)
    # The mean of exp(4 cos) over a sphere is the confluent hypergeometric limit function.
    for dim in (2, 16, 128):
        expected = -4 + math.log(special.hyp0f1(dim / 2, 4.0))
        assert float(uniformity(unit(3000, dim))) == pytest.approx(expected, abs=0.02)


def test_uniformity_counts_every_pair_once():
    rows = unit(9, 4)
    pairs = [
        math.exp(-2 * float((rows[i] - rows[j]).square().sum())) for i in range(9) for j in range(i)
    ]
    assert float(uniformity(rows)) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_rank_of_rows_spread_evenly_over_some_directions_is_their_number(rank):
    directions = torch.linalg.qr(torch.randn(32, 32)).Q[:rank]
    rows = directions.repeat(40, 1)  # every direction as often
    assert rank_me(rows) == pytest.approx(rank, rel=1e-3)
    assert rank_me(7 * rows) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("shape", [(500, 24), (24, 500)])
def test_rank_is_the_entropy_of_the_singular_values(shape):
    rows = torch.randn(*shape) @ torch.diag(torch.logspace(0, -3, shape[1]))
    singular_values = linalg.svdvals(rows.double().numpy())
    shares = singular_values / singular_values.sum() + 1e-7
    assert rank_me(rows) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_rank_of_nothing_is_one_and_of_what_is_not_finite_is_not_a_number():
    assert rank_me(torch.zeros(10, 4)) == pytest.approx(1, abs=1e-4)
    assert math.isnan(rank_me(torch.tensor([[1.0, float("nan")]])))


def test_lidar_equals_the_formula_with_scipys_matrix_root():
    views = (
        torch.randn(40, 1, 6) * torch.tensor([3, 2, 1, 0.5, 0.1, 0]) + 0.2 * torch.randn(40, 3, 6)
    ).double()
    means = views.mean(dim=1).numpy()
    centre = means.mean(axis=0)
    between = sum(np.outer(mean - centre, mean - centre) for mean in means) / 40
    within = np.zeros((6, 6))
    for image, mean in zip(views.numpy(), means, strict=True):
        for view in image:
            within += np.outer(view - mean, view - mean) / (40 * 3)
    root = linalg.inv(linalg.sqrtm(within + 1e-4 * np.eye(6)).real)
    eigenvalues = linalg.eigvalsh(root @ between @ root)
    shares = eigenvalues / eigenvalues.sum() + 1e-7
    assert lidar(views) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_lidar_takes_no_notice_of_directions_in_which_only_the_views_differ():
    # The images differ in four directions.
    images = torch.cat([torch.eye(4), -torch.eye(4)]).repeat(20, 1)
    informative = images[:, None].expand(-1, 5, -1)
    # The views differ in four others, around the same mean.
    noise = torch.randn(160, 5, 4)
    noise = 10 * (noise - noise.mean(dim=1, keepdim=True))
    assert lidar(torch.cat([informative, noise], dim=2)) == pytest.approx(4, rel=0.05)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"conv1": nn.Linear(3, 4), "layer1": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))}
        )
        self.projector = nn.Linear(2, 2)

    def forward(self, x):
        return self.projector(self.backbone["layer1"](self.backbone["conv1"](x)))


def test_gradient_norms_are_those_of_each_stage_by_itself():
    net = Small()
    net.projector.requires_grad_(False)
    net(torch.randn(5, 3)).square().sum().backward()
    norms = gradient_norms(net)
    assert list(norms) == ["backbone.conv1", "backbone.layer1"]
    layer1 = [parameter.grad.flatten() for parameter in net.backbone["layer1"].parameters()]
    assert norms["backbone.layer1"] == pytest.approx(float(torch.cat(layer1).norm()), rel=1e-6)


def test_an_encoder_without_gradients_has_no_norms():
    assert gradient_norms(Small()) == {}


def test_distance_of_the_encoders_is_relative_and_zero_for_equal_ones():
    net, other = Small(), Small()
    other.load_state_dict(net.state_dict())
    assert set(encoder_distances(other, net).values()) == {0.0}
    with torch.no_grad():
        for parameter in other.backbone["layer1"].parameters():
            parameter.mul_(1.25)
    distances = encoder_distances(other, net)
    assert distances["backbone.layer1"] == pytest.approx(0.25, rel=1e-5)
    assert distances["projector"] == distances["backbone.conv1"] == 0


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet_tiny", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ("swin_v2_tiny_patch2", [*(f"features.{place}" for place in range(8)), "norm"]),
        ("vit_tiny_patch4", ["class_token", "conv_proj", *(f"encoder.layers.encoder_layer_{n}" for n in range(4)), "encoder.ln"]),
    ],
)  # fmt: skip
def test_every_backbone_falls_into_its_stages(name, stages):
    found = [
        stage_of(f"backbone.{parameter}")
        for parameter, _ in build_backbone(name).named_parameters()
    ]
    assert list(dict.fromkeys(found)) == [f"backbone.{stage}" for stage in stages]
    assert stage_of("projector.0.weight") == "projector"
    assert stage_of("dense_projector.layers.0.weight") == "dense_projector"


def test_similarities_are_of_all_pairs_but_the_own_ones():
    query, keys = unit(4, 8), unit(12, 8)
    similarities = pair_similarities(query, keys[4:8], keys)
    others = [float(query[i] @ keys[j]) for i in range(4) for j in range(12) if j != 4 + i]
    torch.testing.assert_close(similarities["negative"], torch.tensor(others))
    torch.testing.assert_close(
        similarities["positive"], torch.stack([query[i] @ keys[4 + i] for i in range(4)])
    )
    # The first of the three rows is one query's own key.
    few = pair_similarities(query, keys[:4], keys, most_negatives=3)
    assert len(few["negative"]) == 3 * 4 - 1


def test_evenly_spaced_rows_reach_from_the_first_to_the_last():
    assert evenly_spaced(np.arange(11), 3).tolist() == [0, 5, 10]
    assert evenly_spaced(torch.arange(3), 9).tolist() == [0, 1, 2]


def test_figures_of_arrays_are_those_of_their_parts(generator):
    features, embeddings = (
        generator.normal(size=(30, 12)),
        generator.normal(size=(30, 6)).astype(np.float32),
    )
    views = generator.normal(size=(20, 3, 6)).astype(np.float32)
    figures = label_free_figures(features, 5 * embeddings, views)
    units, unit_views = (
        F.normalize(torch.from_numpy(embeddings), dim=1),
        F.normalize(torch.from_numpy(views), dim=2),
    )
    assert figures["label_free/rank_me"] == pytest.approx(rank_me(units), rel=1e-5)
    assert figures["label_free/feature_rank_me"] == pytest.approx(
        rank_me(torch.from_numpy(features)), rel=1e-5
    )
    assert figures["label_free/uniformity"] == pytest.approx(float(uniformity(units)), rel=1e-5)
    assert figures["label_free/alignment"] == pytest.approx(
        float(alignment(unit_views[:, 0], unit_views[:, 1])), rel=1e-5
    )
    assert figures["label_free/lidar"] == pytest.approx(lidar(unit_views), rel=1e-5)
    assert "label_free/lidar" not in label_free_figures(features, embeddings)
