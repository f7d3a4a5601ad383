import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moco.methods import losses
from moco.methods.losses import dense_info_nce, in_batch_info_nce, info_nce, most_similar_cells


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def reference(query, key, negatives, temperature):
    """Equation 1 of arXiv 1911.05722, one query at a time in numpy; value and gradient with respect to the queries."""
    losses, gradients = [], []
    for q, k in zip(query, key, strict=True):
        candidates = np.vstack([k, negatives])
        weights = np.exp(candidates @ q / temperature)
        softmax = weights / weights.sum()
        losses.append(-np.log(softmax[0]))
        gradients.append((softmax @ candidates - k) / temperature)
    return np.mean(losses), np.array(gradients) / len(query)


@pytest.mark.parametrize("temperature", [0.024, 0.026, 0.07, 0.2, 1.0])
def test_value_and_gradient_equal_the_papers_equation(temperature):
    query, key, negatives = unit(6, 16), unit(6, 16), unit(50, 16)
    value, gradient = reference(query.numpy(), key.numpy(), negatives.numpy(), temperature)
    query = query.float().requires_grad_()
    loss = info_nce(query, key.float(), negatives.float(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(query.grad.numpy(), gradient, rtol=1e-3, atol=1e-5)


def plain(query, key, negatives, temperature):
    """The same from all logits at once."""
    logits = (
        torch.cat([(query * key).sum(dim=1, keepdim=True), query @ negatives.T], dim=1)
        / temperature
    )
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def both(query, key, negatives, temperature):
    """Value and gradient of `info_nce`, and of the plain form in float64."""
    results = []
    for function, dtype in ((info_nce, torch.float32), (plain, torch.float64)):
        leaf = query.to(dtype).requires_grad_()
        value = function(leaf, key.to(dtype), negatives.to(dtype), temperature)
        (3 * value).backward()
        results.append((value.detach().double(), leaf.grad.double() / 3))
    return results


@pytest.mark.parametrize(("rows", "block"), [(1024, 2**20), (1024, 64), (4, 50), (1, 7), (3, 3)])
def test_blocks_of_any_size_give_the_plain_forms_value_and_gradient(rows, block, monkeypatch):
    monkeypatch.setattr(losses, "ROWS", rows)
    monkeypatch.setattr(losses, "BLOCK", {"cpu": block})
    ours, expected = both(unit(7, 16), unit(7, 16), unit(50, 16), 0.2)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-2])
def test_a_low_temperature_overflows_nowhere(temperature):
    query, key, negatives = unit(7, 16), unit(7, 16), unit(50, 16)
    negatives[20], negatives[40] = query[0], -query[1]
    ours, expected = both(query, key, negatives, temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_makes_the_loss_nan_as_in_the_plain_form(where, bad):
    tensors = [unit(7, 16), unit(7, 16), unit(50, 16)]
    tensors[where][3, 2] = bad
    (value, gradient), (expected, _) = both(*tensors, 0.2)
    assert not expected.isfinite()
    assert not value.isfinite()
    assert not gradient.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not function.is_view:
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize(
    ("num_queries", "num_negatives"), [(300, 20_000), (2_000, 3_000), (4, 400_000)]
)
def test_no_tensor_is_made_that_holds_more_than_a_block_of_logits(num_queries, num_negatives):
    query, key, negatives = (
        unit(count, 4).float() for count in (num_queries, num_queries, num_negatives)
    )
    with LargestTensor() as made:
        info_nce(query.requires_grad_(), key, negatives, 0.2).backward()
    assert made.elements <= losses.BLOCK["cpu"]


def test_without_a_gradient_the_value_is_the_same():
    query, key, negatives = (unit(count, 16).float() for count in (7, 7, 50))
    with torch.no_grad():
        value = info_nce(query.clone().requires_grad_(), key, negatives, 0.2)
    with_gradient = info_nce(query.clone().requires_grad_(), key, negatives, 0.2)
    assert torch.equal(value, with_gradient.detach())
    assert not value.requires_grad
    assert with_gradient.requires_grad


def test_a_second_derivative_is_refused():
    query = unit(4, 8).float().requires_grad_()
    (gradient,) = torch.autograd.grad(
        info_nce(query, unit(4, 8).float(), unit(9, 8).float(), 0.2), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_it_can_be_compiled_as_a_whole():
    query, key, negatives = (unit(count, 16).float() for count in (7, 7, 50))
    leaves = [query.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(info_nce, backend="aot_eager", fullgraph=True)
    for function, leaf in zip((info_nce, compiled), leaves, strict=True):
        function(leaf, key, negatives, 0.2).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


def test_equal_similarities_give_log_of_one_plus_k():
    rows = F.normalize(torch.ones(4, 8), dim=1)
    assert info_nce(rows, rows, rows.repeat(25, 1), 0.07).item() == pytest.approx(
        math.log(101), rel=1e-6
    )


def test_perfect_match_at_low_temperature_gives_zero():
    query = torch.eye(4)
    assert info_nce(query, query, -query, 0.01).item() == pytest.approx(0.0, abs=1e-6)


def test_no_negatives_give_zero():
    query = unit(4, 8).float()
    assert info_nce(query, unit(4, 8).float(), torch.empty(0, 8), 0.2).item() == 0.0


def test_autocast_does_not_lower_the_precision():
    query, key, negatives = (unit(n, 32).float() for n in (8, 8, 64))
    expected = info_nce(query, key, negatives, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(query, key, negatives, 0.07), expected)
    expected = in_batch_info_nce(query, key, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(in_batch_info_nce(query, key, 0.07), expected)


def in_batch_reference(query, keys, temperature, first=0):
    """Algorithm 1 of arXiv 2104.02057, one query at a time in numpy; query i's own key is row first + i. As `reference`."""
    losses, gradients = [], []
    for own, q in enumerate(query, start=first):
        weights = np.exp(keys @ q / temperature)
        softmax = weights / weights.sum()
        losses.append(-np.log(softmax[own]))
        gradients.append((softmax @ keys - keys[own]) / temperature)
    return np.mean(losses), np.array(gradients) / len(query)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_in_batch_value_and_gradient_equal_the_papers_algorithm(temperature, rank):
    query, keys = unit(5, 16), unit(15, 16)
    value, gradient = in_batch_reference(query.numpy(), keys.numpy(), temperature, first=5 * rank)
    query = query.float().requires_grad_()
    loss = in_batch_info_nce(query, keys.float(), temperature, rank)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(query.grad.numpy(), gradient, rtol=1e-3, atol=1e-6)


def test_in_batch_loss_of_one_pair_is_zero_and_of_equal_ones_log_m():
    rows = F.normalize(torch.ones(8, 4), dim=1)
    assert in_batch_info_nce(rows[:1], rows[:1], 0.2).item() == 0.0
    assert in_batch_info_nce(rows[:4], rows, 0.2, rank=1).item() == pytest.approx(
        math.log(8), rel=1e-6
    )


def dense_reference(query, key, query_features, key_features, negatives, temperature):
    """DenseCL (arXiv 2011.09157, section 3), image by image and cell by cell; value and gradient of the query cells."""
    losses, gradient = [], np.zeros_like(query)
    for image in range(len(query)):
        for cell in range(query.shape[1]):
            similarities = [
                f
                @ query_features[image, cell]
                / np.linalg.norm(f)
                / np.linalg.norm(query_features[image, cell])
                for f in key_features[image]
            ]
            positive = key[image, int(np.argmax(similarities))]
            value, slope = reference(
                query[image, cell][None], positive[None], negatives, temperature
            )
            losses.append(value)
            gradient[image, cell] = slope[0]
    return np.mean(losses), gradient / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.2])
def test_dense_value_and_gradient_equal_the_papers_equations(temperature):
    query, key, negatives = unit(3, 6, 16), unit(3, 6, 16), unit(20, 16)
    features = [torch.randn(3, 6, 8, dtype=torch.float64) for _ in range(2)]
    arrays = [tensor.numpy() for tensor in (query, key, *features, negatives)]
    value, gradient = dense_reference(*arrays, temperature)
    query = query.float().requires_grad_()
    matches = most_similar_cells(*(F.normalize(feature, dim=-1).float() for feature in features))
    assert matches.shape == (3, 6)
    assert len(matches.unique()) > 2
    loss = dense_info_nce(query, key.float(), matches, negatives.float(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(query.grad.numpy(), gradient, rtol=1e-3, atol=1e-6)


def test_dense_loss_of_one_cell_is_the_loss_of_images():
    query, key, negatives = (unit(*shape).float() for shape in ((6, 16), (6, 16), (50, 16)))
    matches = torch.zeros(6, 1, dtype=torch.long)
    dense = dense_info_nce(query[:, None], key[:, None], matches, negatives, 0.2)
    assert torch.equal(dense, info_nce(query, key, negatives, 0.2))


def test_cells_that_moved_are_found_again():
    features = unit(2, 9, 32)
    moved = torch.stack([torch.randperm(9), torch.randperm(9)])
    key_features = torch.stack([cells[order] for cells, order in zip(features, moved, strict=True)])
    matches = most_similar_cells(features, key_features)
    assert torch.equal(matches.gather(1, moved), torch.arange(9).expand(2, 9))
