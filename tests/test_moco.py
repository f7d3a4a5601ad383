"""The whole method against a plain loop that knows nothing of Lightning, and against its own recorded past."""

import copy
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from moco.methods.batch_norm import split_batch_norm
from moco.train import build_data


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def plain_encode(encoder, images, dense_grid, predictor):
    """Normalised embeddings (N, C); of the cells of a dense encoder also embeddings, their mean, and features."""
    if not dense_grid:
        return [F.normalize(predictor(encoder(images)), dim=1)]
    last = F.adaptive_avg_pool2d(encoder.backbone.feature_maps(images)[-1], dense_grid)  # (N, D, S, S)
    first, _, second = encoder.dense_projector.layers
    features = last.permute(0, 2, 3, 1).flatten(1, 2)  # (N, S * S, D)
    hidden = (features @ first.weight[:, :, 0, 0].T + first.bias).relu()
    cells = hidden @ second.weight[:, :, 0, 0].T + second.bias
    embedding = predictor(encoder.projector(last.mean(dim=(2, 3))))
    return [F.normalize(part, dim=-1) for part in (embedding, cells, cells.mean(dim=1), features.detach())]


def plain_info_nce(query, key, queue, temperature):
    logits = torch.cat([torch.einsum("nc,nc->n", query, key)[:, None], query @ queue.clone()], dim=1)
    return F.cross_entropy(logits / temperature, torch.zeros(len(query), dtype=torch.long))


def plain_update(name, parameter, gradient, state, number, options, scale):
    """One step of SGD with momentum (arXiv 1911.05722) or AdamW (arXiv 1711.05101, algorithm 2) on one parameter."""
    decay = options.weight_decay if options.decay_all or parameter.ndim > 1 else 0.0
    lr = options.lr * scale
    if options.name == "sgd":
        state[name] = options.sgd_momentum * state.get(name, 0) + gradient + decay * parameter
        parameter -= lr * state[name]
        return
    mean, square = state.get(name, (0, 0))
    mean = options.beta1 * mean + (1 - options.beta1) * gradient
    square = options.beta2 * square + (1 - options.beta2) * gradient**2
    state[name] = (mean, square)
    mean, square = mean / (1 - options.beta1**number), square / (1 - options.beta2**number)
    parameter -= lr * mean / (square.sqrt() + options.eps) + lr * decay * parameter


def plain_loop(method, config, num_batches):
    """MoCo's algorithm 1 (arXiv 1911.05722) in its own order: momentum update, keys, queries, loss, step, enqueue.

    With MoBY's predictor and second queue (arXiv 2105.04553) and DenseCL's dense term (arXiv 2011.09157).
    """
    options = config.method
    query_encoder, key_encoder, predictor = (
        copy.deepcopy(module) for module in (method.query_encoder, method.key_encoder, method.predictor)
    )
    if options.batch_norm == "split":
        for module in (query_encoder, key_encoder, predictor):
            split_batch_norm(module, options.batch_norm_splits)
    trained = torch.nn.ModuleDict({"encoder": query_encoder, "predictor": predictor})
    # (C, K), as in the official code; queues[term][direction]
    names = [["queue", "reverse_queue"], ["dense_queue", "reverse_dense_queue"]][: 1 + (options.dense_weight > 0)]
    queues = [[getattr(method, name).keys.T.clone() for name in term[: options.num_queues]] for term in names]
    pointers, losses, state = [[0] * options.num_queues for _ in queues], [], {}
    dense_grid = options.dense_weight and 2  # of the digits, the last map has 2 x 2 cells
    accumulate = config.trainer.accumulate_grad_batches
    scale = config.data.batch_size / (config.optimizer.lr_for_batch_size or config.data.batch_size)
    for number, batch in zip(range(num_batches), build_data(config).train_dataloader(), strict=False):
        if number % accumulate == 0:
            gradient = {name: torch.zeros_like(p) for name, p in trained.named_parameters()}
            with torch.no_grad():
                for q, k in zip(query_encoder.parameters(), key_encoder.parameters(), strict=True):
                    k.copy_(k * options.key_momentum + q * (1 - options.key_momentum))
        terms, enqueued = [[], []], []
        first, second = batch.views
        for place, (query_view, key_view) in enumerate([(first, second), (second, first)][: 1 + options.symmetric]):
            with torch.no_grad():
                if options.batch_norm == "split":
                    order = torch.randperm(len(key_view))
                    key = plain_encode(key_encoder, key_view[order], dense_grid, torch.nn.Identity())
                    key = [part[order.argsort()] for part in key]
                else:
                    key = plain_encode(key_encoder, key_view, dense_grid, torch.nn.Identity())
            query = plain_encode(query_encoder, query_view, dense_grid, predictor)
            side = place % options.num_queues
            terms[0].append(plain_info_nce(query[0], key[0], queues[0][side], options.temperature))
            enqueued.append((0, side, key[0]))
            if dense_grid:
                match = torch.einsum("nsd,ntd->nst", query[3], key[3]).max(dim=2).indices
                positive = torch.stack([cells[row] for cells, row in zip(key[1], match, strict=True)])
                cells = (query[1].reshape(-1, query[1].shape[2]), positive.reshape(-1, query[1].shape[2]))
                terms[1].append(plain_info_nce(*cells, queues[1][side], options.temperature))
                enqueued.append((1, side, key[2]))
        per_direction = 2 if options.symmetric and options.symmetric_reduction == "mean" else 1
        weights = (1 - options.dense_weight, options.dense_weight)
        loss = sum(weight * sum(term) / per_direction for weight, term in zip(weights, terms, strict=True))
        losses.append(float(loss.detach()) / accumulate)
        paths, parameters = zip(*trained.named_parameters(), strict=True)
        for path, value in zip(paths, torch.autograd.grad(loss / accumulate, parameters), strict=True):
            gradient[path] += value
        for term, side, keys in enqueued:
            for key in keys:
                queues[term][side][:, pointers[term][side]] = key
                pointers[term][side] = (pointers[term][side] + 1) % options.queue_size
        if (number + 1) % accumulate == 0:
            with torch.no_grad():
                for path, parameter in trained.named_parameters():
                    plain_update(
                        path, parameter, gradient[path], state, 1 + number // accumulate, config.optimizer, scale
                    )
    expected = {
        name: (queue.T, pointer)
        for term in zip(names, queues, pointers, strict=True)
        for name, queue, pointer in zip(*term, strict=False)
    }
    return query_encoder, key_encoder, predictor, expected, losses


# AdamW's large eps keeps rounding errors of gradients near zero (a bias before BatchNorm) from becoming whole steps.
MOBY = [
    "method.symmetric=true", "method.num_queues=2",
    "optimizer=adamw", "optimizer.warmup_epochs=0", "optimizer.lr=1e-3", "optimizer.lr_for_batch_size=8", "optimizer.eps=1",
    *[
        f"method.{head}.{setting}" for head in ("projector", "predictor")
        for setting in ("num_layers=2", "hidden_dim=24", "hidden_batch_norm=true")
    ],
]  # fmt: skip
DENSE = ["method.dense_weight=0.3", "method.projector.num_layers=2", "method.projector.hidden_dim=24"]


@pytest.mark.parametrize(
    "variant",
    [
        ["method.batch_norm=plain"],
        ["method.batch_norm=split"],
        ["method.batch_norm=split", "method.symmetric=true", "method.projector.num_layers=2"],
        ["method.batch_norm=split", "method.symmetric=true", "method.symmetric_reduction=mean"],
        ["method.batch_norm=plain", "trainer.accumulate_grad_batches=2"],
        ["method.batch_norm=split", *MOBY],
        ["method.batch_norm=split", *DENSE],
        ["method.batch_norm=plain", *MOBY, *DENSE],
    ],
    ids=lambda variant: " ".join(variant)[:60],
)
def test_two_steps_equal_a_plain_loop(runner, variant):
    config = runner.config(
        "trainer.max_steps=2", "optimizer.schedule=constant", "method.queue_start=random", "optimizer.lr=0.03", *variant
    )
    accumulate = config.trainer.accumulate_grad_batches
    expected = plain_loop(runner.method(config), config, 2 * accumulate)
    losses = Losses()
    method = runner.fit(config, [losses])
    query_encoder, key_encoder, predictor, queues, expected_losses = expected
    # The official order updates the key encoder before a step, this method after it: one more update brings it level.
    with torch.no_grad():
        for q, k in zip(query_encoder.parameters(), key_encoder.parameters(), strict=True):
            k.copy_(k * config.method.key_momentum + q * (1 - config.method.key_momentum))
    assert losses.values == pytest.approx(expected_losses, abs=1e-5)
    for ours, theirs in (
        (method.query_encoder, query_encoder),
        (method.key_encoder, key_encoder),
        (method.predictor, predictor),
    ):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert {name for name, _ in method.named_children() if name.endswith("queue")} == queues.keys()
    for name, (keys, pointer) in queues.items():
        torch.testing.assert_close(getattr(method, name).keys, keys, rtol=1e-4, atol=1e-5)
        assert int(getattr(method, name).pointer) == pointer


def test_updating_after_the_step_equals_the_official_order_to_the_last_bit():
    """Key weights that encode step t's keys: official, updated at the start of step t; ours, at the end of step t - 1."""
    queries = torch.randn(5, 100)  # the query weights before each step
    official = ours = queries[0].clone()
    for query in queries:
        official = official * 0.99 + query * 0.01
    for query in queries[1:]:
        ours = ours * 0.99 + query * 0.01
    first_update = queries[0] * 0.99 + queries[0] * 0.01
    assert (first_update - queries[0]).abs().max() < 1e-6  # the extra first update is a no-op up to rounding
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-6)


def test_momentum_update_happens_once_per_optimizer_step(runner, monkeypatch):
    import moco.methods.moco as module

    calls = []
    original = module.update_key_encoder
    monkeypatch.setattr(module, "update_key_encoder", lambda *args: (calls.append(args[2]), original(*args)))
    runner.fit(runner.config("trainer.accumulate_grad_batches=4", "trainer.max_steps=3"))
    assert calls == [0.99] * 3


def test_a_positive_is_never_among_its_own_negatives(runner, monkeypatch):
    import moco.methods.moco as module

    seen = []
    original = module.info_nce
    monkeypatch.setattr(
        module, "info_nce", lambda q, k, n, t: (seen.append((k.clone(), n.clone())), original(q, k, n, t))[1]
    )
    runner.fit(runner.config("method.symmetric=true", "method.queue_size=1024"))
    assert len(seen) == 6
    for key, negatives in seen:
        if len(negatives):
            assert (key @ negatives.T).max() < 1.0 - 1e-6


def test_key_encoder_starts_equal_and_gets_no_gradient(runner):
    method = runner.method(runner.config())
    for q, k in zip(method.query_encoder.parameters(), method.key_encoder.parameters(), strict=True):
        assert torch.equal(q, k)
        assert not k.requires_grad
    trained = runner.fit(runner.config())
    assert all(parameter.grad is None for parameter in trained.key_encoder.parameters())
    assert all(parameter.grad is not None for parameter in trained.query_encoder.parameters())


def test_a_checkpoint_without_switches_holds_the_names_of_the_first_version(runner):
    names = runner.method(runner.config()).state_dict()
    assert {name.split(".")[0] for name in names} == {"query_encoder", "key_encoder", "queue"}
    assert {"query_encoder.projector.weight", "queue.keys", "queue.pointer", "queue.filled"} <= names.keys()


def test_the_predictor_is_of_queries_alone_and_evaluation_looks_at_the_projector(runner):
    method = runner.method(runner.config(*MOBY)).eval()
    assert "predictor.0.weight" in method.state_dict()
    assert not [name for name in method.state_dict() if "encoder" in name and "predictor" in name]
    images = torch.randn(4, 3, 16, 16)
    projected = method.query_encoder.projector(method.query_encoder.backbone(images))
    assert torch.equal(method.query_encoder.encode(images, "embedding"), projected)
    torch.testing.assert_close(method.encode_key(images).embedding, F.normalize(projected, dim=1))
    torch.testing.assert_close(method.encode_query(images).embedding, F.normalize(method.predictor(projected), dim=1))


def test_the_dense_term_costs_no_second_pass_through_the_backbone(runner):
    method = runner.method(runner.config(*DENSE))
    passes = []
    method.query_encoder.backbone.layer4.register_forward_hook(lambda *_: passes.append(1))
    images = torch.randn(4, 3, 16, 16)
    method.encode_query(images)
    assert passes == [1]
    plain = F.normalize(method.query_encoder(images), dim=1)
    torch.testing.assert_close(method.encode_query(images).embedding, plain)


def test_shuffled_keys_come_back_in_order_cell_by_cell(runner):
    method = runner.method(runner.config(*DENSE)).eval()  # in eval mode company does not matter
    images = torch.randn(8, 3, 16, 16)
    in_order = method.encode_key(images)
    method.batch_norm = "shuffle"
    shuffled = method.encode_key(images)
    torch.testing.assert_close(shuffled.embedding, in_order.embedding)
    for ours, expected in zip(shuffled.cells, in_order.cells, strict=True):
        torch.testing.assert_close(ours, expected)


def test_key_encoder_goes_without_stochastic_depth():
    from moco.methods.moco import MoCo

    backbone = {"name": "swin_v2_tiny_patch2", "window_size": 4, "stochastic_depth": 0.5}
    method = MoCo(backbone, {}, {"num_layers": 1}, {"num_layers": 0}, queue_size=8).train()
    images = torch.randn(4, 3, 16, 16)
    for norm in (module for module in method.modules() if "norm" in type(module).__name__.lower()):
        torch.nn.init.ones_(norm.weight)  # they start at zero, where a branch that is left out makes no difference
    assert torch.equal(method.encode_key(images).embedding, method.encode_key(images).embedding)
    assert not torch.equal(method.encode_query(images).embedding, method.encode_query(images).embedding)
    method.eval()
    torch.testing.assert_close(method.encode_key(images), method.encode_query(images))


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 2 * math.log(49)), ("mean", math.log(49))])
def test_loss_of_chance_counts_the_directions(reduction, expected, runner):
    method = runner.method(runner.config("method.symmetric=true", f"method.symmetric_reduction={reduction}"))
    assert method.loss_of_chance(48) == pytest.approx(expected)


def test_learning_rate_and_key_momentum_follow_their_schedules(runner):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    config = runner.config("optimizer.lr=0.1", "trainer.max_steps=4", "method.key_momentum_schedule=cosine")
    method = runner.fit(config, [Watch()])
    assert rates == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    assert [method.key_momentum_at(step) for step in (0, 2, 4)] == pytest.approx([0.99, 0.995, 1.0])


def test_three_losses_of_a_seeded_run_stay_as_recorded(runner):
    """To record again after a wanted change: print(losses.values) here."""
    losses = Losses()
    runner.fit(runner.config("method.queue_start=random", "optimizer.lr=0.06"), [losses])
    assert losses.values == pytest.approx(RECORDED, rel=1e-3)


RECORDED = [0.0624097, 3.734364, 3.908170]
