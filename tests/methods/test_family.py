"""Every method of conf/method/ against a reference that is written from its paper.

The references know nothing of Lightning. Losses on fixed embeddings are compared with numpy, whole
steps with a plain loop in the order of the official codes.
"""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from moco.cli.build_pretraining import build_data, build_method
from moco.config.parsing import CONFIG_DIR
from moco.errors import InputError
from moco.methods.batch_norm import split_batch_norm
from moco.methods.momentum import key_momentum_at
from moco.models.encoder import BATCH_NORMS, Encoded
from moco.models.heads import Cells
from moco.training.distributed.collectives import all_gather
from tests.configs import composed
from tests.methods.test_losses import dense_reference, in_batch_reference, reference
from tests.processes import on_two

METHODS = sorted(path.stem for path in (CONFIG_DIR / "method").glob("*.yaml"))
SMALL = [
    "data=digits", "augmentation=digits", "data.image_size=16", "data.batch_size=32", "data.num_workers=0",
    "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.max_steps=3", "optimizer.warmup_epochs=0",
]  # fmt: skip


def run_of(name, *overrides):
    """A small run of the method, its queues of 48 keys."""
    size = ["method.queue_size=48"] if name != "moco_v3" else []
    return composed("train", f"method={name}", *SMALL, *size, *overrides)


def built(config):
    torch.manual_seed(0)
    return build_method(dataclasses.asdict(config))


PUBLISHED = {
    "moco_v1": {"temperature": 0.07, "projector": {"num_layers": 1}},
    "moco_v2": {"temperature": 0.2, "projector": {"num_layers": 2, "hidden_dim": None}},
    "moco_v2_plus": {
        "temperature": 0.2, "embedding_dim": 256, "projector": {"num_layers": 2, "hidden_dim": 2048},
        "key_momentum": 0.99, "key_momentum_schedule": "cosine", "key_momentum_end": 0.999,
        "symmetric": True, "symmetric_reduction": "mean",
    },
    "moco_v3": {
        "temperature": 1.0, "embedding_dim": 256, "negatives": "batch", "queue_size": None,
        "projector": {
            "num_layers": 2, "hidden_dim": 4096, "hidden_batch_norm": True, "last_batch_norm": True, "bias": False
        },
        "predictor": {"num_layers": 2, "hidden_dim": 4096, "hidden_batch_norm": True, "bias": False},
        "key_momentum": 0.99, "key_momentum_schedule": "cosine",
        "symmetric": True, "loss_times_2t": True, "batch_norm": "sync",
    },
    "moby": {
        "temperature": 0.2, "embedding_dim": 256, "queue_size": 4096, "num_queues": 2,
        "projector": {"num_layers": 2, "hidden_dim": 4096, "hidden_batch_norm": True},
        "predictor": {"num_layers": 2, "hidden_dim": 4096, "hidden_batch_norm": True},
        "key_momentum": 0.99, "key_momentum_schedule": "cosine", "symmetric": True, "batch_norm": "sync",
    },
    "densecl": {"temperature": 0.2, "projector": {"num_layers": 2, "hidden_dim": None}, "dense_weight": 0.5},
}  # fmt: skip
"""What differs from `SHARED` and `HEAD`."""
SHARED = {
    "negatives": "queue", "queue_size": 65536, "queue_start": "random", "num_queues": 1, "embedding_dim": 128,
    "key_momentum": 0.999, "key_momentum_schedule": "constant", "key_momentum_end": 1.0, "symmetric": False,
    "symmetric_reduction": "sum", "loss_times_2t": False, "batch_norm": "auto", "batch_norm_splits": 8,
    "dense_weight": 0.0, "dense_grid": 7, "dense_match": "feature", "local_crops": 0, "mask_own_group": False,
    "neighbours": 0, "neighbours_weight": 0.5, "neighbours_from_epoch": 0,
    "decoder": None, "decoder_channels": None,
}  # fmt: skip
HEAD = {"hidden_dim": None, "hidden_batch_norm": False, "last_batch_norm": False, "bias": True}


def test_every_method_is_tested_here():
    assert set(METHODS) == set(PUBLISHED)


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_the_numbers_of_their_papers(name):
    expected = SHARED | PUBLISHED[name]
    expected["projector"] = HEAD | expected["projector"]
    expected["predictor"] = HEAD | expected.get("predictor", {"num_layers": 0})
    size = "null" if expected["queue_size"] is None else expected["queue_size"]
    assert dataclasses.asdict(run_of(name, f"method.queue_size={size}").method) == expected
    with initialize_config_dir(
        str(CONFIG_DIR), version_base="1.3"
    ):  # the number that `run_of` replaces
        assert (
            compose("train", [f"method={name}", "data=digits"]).method.queue_size
            == expected["queue_size"]
        )


# Loss and gradients on fixed embeddings. Every reference takes queries[direction], keys[direction]
# and queues[direction]. It returns the loss, and its gradients with respect to the queries.


def one_direction(queries, keys, queues, temperature):
    value, gradient = reference(queries[0], keys[0], queues[0], temperature)
    return value, [gradient]


def mean_of_two_directions(queries, keys, queues, temperature):
    """One queue for both."""
    sides = [
        reference(query, key, queues[0], temperature)
        for query, key in zip(queries, keys, strict=True)
    ]
    return np.mean([value for value, _ in sides]), [gradient / 2 for _, gradient in sides]


def sum_of_two_directions(queries, keys, queues, temperature):
    """Arxiv 2105.04553, section 3: each with a queue of its own."""
    sides = [reference(*rows, temperature) for rows in zip(queries, keys, queues, strict=True)]
    return sum(value for value, _ in sides), [gradient for _, gradient in sides]


def times_2t(queries, keys, queues, temperature):
    """Algorithm 1 of arXiv 2104.02057: the sum of both directions, each times 2T."""
    sides = [
        in_batch_reference(query, key, temperature)
        for query, key in zip(queries, keys, strict=True)
    ]
    return 2 * temperature * sum(value for value, _ in sides), [
        2 * temperature * gradient for _, gradient in sides
    ]


LOSSES = {
    "moco_v1": (one_direction, 0.07),
    "moco_v2": (one_direction, 0.2),
    "moco_v2_plus": (mean_of_two_directions, 0.2),
    "moco_v3": (times_2t, 1.0),
    "moby": (sum_of_two_directions, 0.2),
    "densecl": (one_direction, 0.2),
}


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def step_on(method, queries, keys):
    """A training step in which the encoders give these."""
    method.encode_queries = lambda views: queries[: len(views)]
    method.encode_keys = lambda views: keys[: len(views)]
    return method.training_step(SimpleNamespace(views=(None, None)), 0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("temperature", [None, 0.15], ids=["", "another T"])
def test_loss_and_gradients_equal_the_papers(name, temperature):
    config = run_of(
        name,
        "backbone=resnet_tiny",
        *([f"method.temperature={temperature}"] if temperature else []),
    )
    method, width = built(config), config.method.embedding_dim
    queries, keys = unit(2, 6, width), unit(2, 6, width)
    queues = [queue.negatives().double().numpy() for queue in method.queues]
    paper, published = LOSSES[name]
    value, gradients = paper(queries.numpy(), keys.numpy(), queues, temperature or published)
    leaves = [query.float().requires_grad_() for query in queries]
    if name == "densecl":
        cells, dense_value, dense_gradient = dense_step(method, width, temperature or published)
        value = (value + dense_value) / 2
        gradients = [gradients[0] / 2, dense_gradient / 2]
        outputs = step_on(
            method, [Encoded(leaves[0], cells[0])], [Encoded(keys[0].float(), cells[1])]
        )
        leaves = [leaves[0], cells[0].embeddings]
    else:
        outputs = step_on(method, list(map(Encoded, leaves)), list(map(Encoded, keys.float())))
        leaves = leaves[: 1 + config.method.symmetric]
    outputs["loss"].backward()
    assert float(outputs["loss"].detach()) == pytest.approx(value, rel=1e-5)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=1e-3, atol=1e-6)


def dense_step(method, width, temperature):
    """Cells of queries and keys, their dense loss, and its gradient for the queries' cells."""
    embeddings, features = unit(2, 6, 4, width), unit(2, 6, 4, 12)
    negatives = method.dense_queue.negatives().double().numpy()
    value, gradient = dense_reference(
        *embeddings.numpy(), *features.numpy(), negatives, temperature
    )
    query, key = (
        Cells(rows.float(), F.normalize(rows.float().mean(dim=1), dim=1), seen.float())
        for rows, seen in zip(embeddings, features, strict=True)
    )
    return (query._replace(embeddings=query.embeddings.requires_grad_()), key), value, gradient


@pytest.mark.parametrize(
    ("name", "overrides", "num_negatives", "expected"),
    [
        ("moco_v1", [], 48, math.log(49)),
        ("moco_v2_plus", [], 48, math.log(49)),
        ("moby", [], 48, 2 * math.log(49)),
        ("moco_v3", [], 31, 2 * 2 * math.log(32)),
        ("moco_v3", ["method.temperature=0.2"], 31, 2 * 0.4 * math.log(32)),
    ],
)
def test_loss_of_chance_is_the_loss_when_all_embeddings_are_equal(
    name, overrides, num_negatives, expected
):
    method = built(run_of(name, "backbone=resnet_tiny", *overrides))
    assert method.loss_of_chance(num_negatives) == pytest.approx(expected, rel=1e-6)
    same = F.normalize(torch.ones(32, method.hparams["embedding_dim"]), dim=1)
    for queue in method.queues:
        queue.keys.copy_(same[:1].expand_as(queue.keys))
    outputs = step_on(method, [Encoded(same)] * 2, [Encoded(same)] * 2)
    assert float(outputs["loss"]) == pytest.approx(expected, rel=1e-5)


# Whole steps.


def plain_encode(encoder, images, dense_grid, predictor):
    """Normalised embeddings (N, C); with a dense grid also the parts of `Cells`."""
    if not dense_grid:
        return [F.normalize(predictor(encoder.projector(encoder.backbone(images))), dim=1)]
    last = F.adaptive_avg_pool2d(
        encoder.backbone.feature_maps(images)[-1], dense_grid
    )  # (N, D, S, S)
    first, _, second = encoder.dense_projector.layers
    features = last.permute(0, 2, 3, 1).flatten(1, 2)  # (N, S * S, D)
    hidden = (features @ first.weight[:, :, 0, 0].T + first.bias).relu()
    cells = hidden @ second.weight[:, :, 0, 0].T + second.bias
    embedding = predictor(encoder.projector(last.mean(dim=(2, 3))))
    return [
        F.normalize(part, dim=-1)
        for part in (embedding, cells, cells.mean(dim=1), features.detach())
    ]


def plain_info_nce(query, key, queue, temperature):
    logits = torch.cat(
        [torch.einsum("nc,nc->n", query, key)[:, None], query @ queue.clone()], dim=1
    )
    return F.cross_entropy(logits / temperature, torch.zeros(len(query), dtype=torch.long))


def plain_in_batch_info_nce(query, keys, temperature):
    return F.cross_entropy(
        torch.einsum("nc,mc->nm", query, keys) / temperature, torch.arange(len(query))
    )


def plain_update(name, parameter, gradient, state, number, options, lr):
    """A step on one parameter: SGD, AdamW (arXiv 1711.05101) or LARS (arXiv 1708.03888)."""
    of_positions = any(
        word in name for word in ("cpb_mlp", "logit_scale")
    )  # Swin V2's, which no decay is for
    decay = (
        options.weight_decay
        if (options.decay_all or parameter.ndim > 1) and not of_positions
        else 0.0
    )
    if options.name != "adamw":
        step = gradient + decay * parameter
        if options.name == "lars" and parameter.ndim > 1:
            ratio = (
                options.trust_coefficient
                * parameter.norm()
                / (gradient.norm() + decay * parameter.norm())
            )
            step = ratio * step
        state[name] = options.sgd_momentum * state.get(name, 0) + step
        parameter -= lr * state[name]
        return
    mean, square = state.get(name, (0, 0))
    mean = options.beta1 * mean + (1 - options.beta1) * gradient
    square = options.beta2 * square + (1 - options.beta2) * gradient**2
    state[name] = (mean, square)
    mean, square = mean / (1 - options.beta1**number), square / (1 - options.beta2**number)
    parameter -= lr * mean / (square.sqrt() + options.eps) + lr * decay * parameter


def half_cosine(step, num_steps):
    """From 1 to 0."""
    return (1 + math.cos(math.pi * step / num_steps)) / 2


def plain_loop(method, config):
    """MoCo's algorithm 1 (arXiv 1911.05722) in the order of the official codes.

    Queries, momentum update with m(t), keys, loss, step, enqueue. With one queue for both views
    the official notebook encodes view 2 before view 1, and enqueues the keys of view 1 before those
    of view 2; MoBY and v3 encode view 1 first. With MoBY's predictor and second queue
    (arXiv 2105.04553), DenseCL's dense term (arXiv 2011.09157), and the negatives, factor 2T and
    schedule of m of MoCo v3 (arXiv 2104.02057).
    """
    options, num_steps = config.method, config.trainer.max_steps
    query_encoder, key_encoder, predictor = (
        copy.deepcopy(module).double()
        for module in (method.query_encoder, method.key_encoder, method.predictor)
    )
    has_norm = any(isinstance(layer, BATCH_NORMS) for layer in key_encoder.modules())
    shuffled = has_norm and options.negatives == "queue" and options.batch_norm in ("auto", "split")
    if shuffled:
        for module in (query_encoder, key_encoder, predictor):
            split_batch_norm(module, options.batch_norm_splits)
    trained = torch.nn.ModuleDict({"encoder": query_encoder, "predictor": predictor})
    # (C, K), as in the official code; queues[term][direction]
    names = [["queue", "reverse_queue"], ["dense_queue", "reverse_dense_queue"]][
        : 1 + (options.dense_weight > 0)
    ]
    names = [term[: options.num_queues] for term in names] if options.negatives == "queue" else [[]]
    queues = [[getattr(method, name).keys.T.double() for name in term] for term in names]
    pointers, state, losses, rates = [[0] * len(term) for term in names], {}, [], []
    dense_grid = options.dense_weight and 2  # of the digits, the last map has 2 x 2 cells
    accumulate = config.trainer.accumulate_grad_batches
    scale = config.data.batch_size / (config.optimizer.lr_for_batch_size or config.data.batch_size)

    def update_keys(step):
        """With m at this step."""
        rise = 1 - half_cosine(step, num_steps) if options.key_momentum_schedule == "cosine" else 0
        momentum = options.key_momentum + (options.key_momentum_end - options.key_momentum) * rise
        with torch.no_grad():
            for q, k in zip(query_encoder.parameters(), key_encoder.parameters(), strict=True):
                k.copy_(k * momentum + q * (1 - momentum))

    def encode_key(view):
        order = torch.randperm(len(view)) if shuffled else torch.arange(len(view))
        with torch.no_grad():
            parts = plain_encode(key_encoder, view[order], dense_grid, torch.nn.Identity())
        return [part[order.argsort()] for part in parts]

    data = build_data(config)
    loader = data.train_dataloader()
    for number, batch in zip(range(num_steps * accumulate), loader, strict=False):
        step = number // accumulate
        first, second = (view.double() for view in data.on_after_batch_transfer(batch, 0).views)
        directions = [(first, second), (second, first)][: 1 + options.symmetric]
        queries = [
            plain_encode(query_encoder, view, dense_grid, predictor) for view, _ in directions
        ]
        if number % accumulate == 0:
            gradient = {name: torch.zeros_like(p) for name, p in trained.named_parameters()}
            update_keys(step)
        if options.symmetric and len(names[0]) != 1:  # MoBY, v3
            key_of_first = encode_key(first)
            keys = [encode_key(second), key_of_first]
        else:
            keys = [encode_key(view) for _, view in directions]
        terms, enqueued = [[], []], []
        for place, (query, key) in enumerate(zip(queries, keys, strict=True)):
            side = place % options.num_queues
            if options.negatives == "batch":
                terms[0].append(plain_in_batch_info_nce(query[0], key[0], options.temperature))
                continue
            terms[0].append(plain_info_nce(query[0], key[0], queues[0][side], options.temperature))
            enqueued.append((0, side, key[0]))
            if dense_grid:
                match = torch.einsum("nsd,ntd->nst", query[3], key[3]).max(dim=2).indices
                positive = torch.stack(
                    [cells[row] for cells, row in zip(key[1], match, strict=True)]
                )
                cells = (
                    query[1].reshape(-1, query[1].shape[2]),
                    positive.reshape(-1, query[1].shape[2]),
                )
                terms[1].append(plain_info_nce(*cells, queues[1][side], options.temperature))
                enqueued.append((1, side, key[2]))
        per_direction = 2 if options.symmetric and options.symmetric_reduction == "mean" else 1
        weights = (1 - options.dense_weight, options.dense_weight)
        loss = sum(
            weight * sum(term) / per_direction for weight, term in zip(weights, terms, strict=True)
        )
        loss = loss * (2 * options.temperature if options.loss_times_2t else 1)
        losses.append(float(loss.detach()) / accumulate)
        paths, parameters = zip(*trained.named_parameters(), strict=True)
        for path, value in zip(
            paths, torch.autograd.grad(loss / accumulate, parameters), strict=True
        ):
            gradient[path] += value
        for term, side, rows in reversed(enqueued):
            for row in rows:
                queues[term][side][:, pointers[term][side]] = row
                pointers[term][side] = (pointers[term][side] + 1) % options.queue_size
        if (number + 1) % accumulate == 0:
            rates.append(config.optimizer.lr * scale * half_cosine(step, num_steps))
            with torch.no_grad():
                for path, parameter in trained.named_parameters():
                    plain_update(
                        path,
                        parameter,
                        gradient[path],
                        state,
                        1 + step,
                        config.optimizer,
                        rates[-1],
                    )
    update_keys(num_steps)  # with which the next step would begin
    expected = {
        name: (queue.T, pointer)
        for term in zip(names, queues, pointers, strict=True)
        for name, queue, pointer in zip(*term, strict=True)
    }
    return query_encoder, key_encoder, predictor, expected, losses, rates


# The order of the two views' keys, as the official codes have it. Each function is that part of
# their forward pass, and returns what it leaves in the queues (C, K).


def notebook_step(encode, queues, first, second):
    """facebookresearch/moco, branch colab-notebook, with --symmetric."""
    key_2 = encode(second)  # of contrastive_loss(im1, im2)
    key_1 = encode(first)  # of contrastive_loss(im2, im1)
    keys = torch.cat([key_1, key_2], dim=0)
    return [torch.cat([keys.T, queues[0][:, len(keys) :]], dim=1)]


def moby_step(encode, queues, first, second):
    """SwinTransformer/Transformer-SSL: queue1 holds view 1's keys; ours calls it reverse_queue."""
    key_1 = encode(first)
    key_2 = encode(second)
    queue_2, queue_1 = queues
    of_view_1 = torch.cat([key_1.T, queue_1[:, len(key_1) :]], dim=1)
    of_view_2 = torch.cat([key_2.T, queue_2[:, len(key_2) :]], dim=1)
    return [of_view_2, of_view_1]


def moco_v3_step(encode, queues, first, second):
    """facebookresearch/moco-v3: k1 before k2, and no queue."""
    encode(first)
    encode(second)
    return []


@pytest.mark.parametrize(
    ("name", "overrides", "official_step"),
    [
        ("moco_v1", ["method.symmetric=true", "method.batch_norm=plain"], notebook_step),
        ("moco_v2_plus", ["method.batch_norm=plain"], notebook_step),
        # As solo-learn has it, with a queue for each view.
        ("moco_v2_plus", ["method.batch_norm=plain", "method.num_queues=2"], moby_step),
        ("moby", [], moby_step),
        ("moco_v3", [], moco_v3_step),
    ],
)
def test_keys_come_in_the_order_of_the_official_codes(name, overrides, official_step):
    narrow = ["method.projector.hidden_dim=32", "method.predictor.hidden_dim=32"]
    method = built(run_of(name, "backbone=resnet_tiny", *narrow, *overrides)).train()
    encoder = copy.deepcopy(method.key_encoder)

    @torch.no_grad()
    def encode(view):
        return F.normalize(encoder.projector(encoder.backbone(view)), dim=1)

    names = ["queue", "reverse_queue"][: len(set(method.queues))]
    before = [getattr(method, name).keys.T.clone() for name in names]
    # Views of unlike means: which one was seen last shows in the running statistics.
    views = (torch.rand(8, 3, 16, 16), torch.rand(8, 3, 16, 16) * 3 + 2)
    expected = official_step(encode, before, *views)
    method.training_step(SimpleNamespace(views=views), 0)
    for name, queue in zip(names, expected, strict=True):
        torch.testing.assert_close(getattr(method, name).keys, queue.T, rtol=0, atol=1e-6)
    ours = dict(method.key_encoder.named_buffers())
    theirs = dict(encoder.named_buffers())
    assert len([key for key in ours if key.endswith("running_mean")]) > 5
    for key, statistics in theirs.items():
        torch.testing.assert_close(ours[key], statistics, rtol=1e-5, atol=1e-6, msg=key)


class Watch(pl.Callback):
    """Losses and learning rates as they are used."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


SGD = [
    "backbone=resnet_tiny",
    "optimizer=sgd",
    "optimizer.schedule=cosine",
    "optimizer.schedule_interval=step",
]
# A large eps: AdamW would else make whole steps of rounding errors, as of a bias before BatchNorm.
ADAMW = [
    "backbone=swin_v2_tiny_patch2", "backbone.stochastic_depth=0", "optimizer=adamw", "optimizer.lr=0.1",
    "optimizer.lr_for_batch_size=64", "optimizer.eps=0.01", "optimizer.final_lr=0", "optimizer.weight_decay=0.5",
]  # fmt: skip
LARS = ["backbone=resnet_tiny", "optimizer=lars", "optimizer.lr=20", "optimizer.weight_decay=0.01"]
ACCUMULATED = "trainer.accumulate_grad_batches=2"


def slow(*values):
    """A case that is left to the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


NARROW = ["method.projector.hidden_dim=64", "method.predictor.hidden_dim=64"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        slow("moco_v1", SGD),
        slow("moco_v2", SGD),
        ("moco_v2_plus", SGD),
        slow("moco_v3", [*SGD, *NARROW]),
        slow("moco_v3", [*LARS, *NARROW]),
        slow(
            "moco_v3",
            [
                *ADAMW,
                *NARROW,
                "method.projector.num_layers=3",
                "method.predictor.last_batch_norm=true",
            ],
        ),
        slow("moby", [*ADAMW, *NARROW]),
        slow("densecl", SGD),
        slow("moco_v1", [*SGD, "method.batch_norm=plain", ACCUMULATED]),
        slow("moco_v3", [*SGD, *NARROW, ACCUMULATED]),
        slow("moby", [*ADAMW, *NARROW, "method.batch_norm=auto"]),
        slow("moby", [*SGD, *NARROW, "method.dense_weight=0.3"]),
        slow("moco_v2_plus", [*ADAMW, "method.dense_weight=0.3", "method.symmetric_reduction=sum"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2] + value[-2:]),
)
def test_three_steps_equal_a_plain_loop_in_the_official_order(name, overrides, runner, monkeypatch):
    if "optimizer=lars" in overrides:
        pytest.importorskip("timm")
    monkeypatch.setattr(
        torch.Tensor, "float", torch.Tensor.double
    )  # what is done in fp32 whatever the precision
    config, watch = run_of(name, *overrides), Watch()
    expected = plain_loop(built(config), config)
    method = runner.fit(config, [watch], precision="64-true")
    query_encoder, key_encoder, predictor, queues, losses, rates = expected
    assert watch.losses == pytest.approx(losses, rel=1e-6)
    assert watch.rates == pytest.approx(rates, rel=1e-12)
    moved = 0.0
    for path, module in (
        ("query_encoder", query_encoder),
        ("key_encoder", key_encoder),
        ("predictor", predictor),
    ):
        start, now = (getattr(each, path).state_dict() for each in (built(config), method))
        for key, value in module.state_dict().items():
            torch.testing.assert_close(now[key], value, rtol=1e-6, atol=1e-6, msg=f"{path}.{key}")
            moved = max(moved, float((value - start[key]).abs().max()) if "weight" in key else 0)
    assert moved > 1e-3
    assert {key for key, _ in method.named_children() if key.endswith("queue")} == queues.keys()
    for key, (rows, pointer) in queues.items():
        torch.testing.assert_close(getattr(method, key).keys, rows, rtol=0, atol=1e-6)
        assert int(getattr(method, key).pointer) == pointer


def test_the_key_encoder_of_each_step_is_the_official_one_to_the_last_bit(runner):
    """The official codes update at the start of step t, ours at the end of step t - 1."""
    official, equal = [], []

    def weights(encoder):
        return [parameter.detach().clone() for parameter in encoder.parameters()]

    class Compare(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                official.extend(weights(pl_module.key_encoder))
            momentum = key_momentum_at(batch_idx, 4, 0.99, 1.0, "cosine")
            for key, query in zip(official, weights(pl_module.query_encoder), strict=True):
                key.lerp_(query, 1 - momentum)
            equal.append(all(map(torch.equal, weights(pl_module.key_encoder), official)))

    runner.fit(run_of("moco_v3", *SGD, *NARROW, "trainer.max_steps=4"), [Compare()])
    assert equal == [True] * 4


# One pass through each encoder where BatchNorm lets it.


def passes(method, *paths):
    """The sizes of the batches that go through each module in a step of 8 pairs."""
    seen = {path: [] for path in paths}
    for path, lengths in seen.items():
        method.get_submodule(path).register_forward_hook(
            lambda _, inputs, __, lengths=lengths: lengths.append(len(inputs[0]))
        )
    method.train().training_step(SimpleNamespace(views=tuple(torch.randn(2, 8, 3, 16, 16))), 0)
    return list(seen.values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("moco_v2", "moby") else [pytest.mark.slow])
        for name in METHODS
    ],
)
@pytest.mark.slow
def test_each_encoder_takes_both_views_in_one_pass_unless_it_has_batch_norm(name):
    stems = ["query_encoder.backbone.conv1", "key_encoder.backbone.conv1"]
    apart = [8, 8] if run_of(name).method.symmetric else [8]
    assert passes(built(run_of(name, "backbone=resnet_tiny")), *stems) == [apart, apart]
    together = [sum(apart)]
    method = built(run_of(name, "backbone=swin_v2_tiny_patch2"))
    (stem,) = [
        path
        for path, layer in method.query_encoder.backbone.named_modules()
        if isinstance(layer, torch.nn.Conv2d)
    ]
    stems = [f"{encoder}.backbone.{stem}" for encoder in ("query_encoder", "key_encoder")]
    heads = ["query_encoder.projector", "key_encoder.projector", "predictor"]
    in_heads = apart if name in ("moby", "moco_v3") else together  # those have BatchNorm
    assert passes(method, *stems, *heads) == [together, together, in_heads, in_heads, in_heads]


def test_views_that_go_through_together_come_out_apart():
    method = built(
        run_of("moco_v2_plus", "backbone=swin_v2_tiny_patch2", "method.dense_weight=0.5")
    ).train()
    views = list(torch.randn(2, 8, 3, 16, 16))
    for ours, view in zip(method.query_encoder.embed(views), views, strict=True):
        (alone,) = method.query_encoder.embed([view])
        torch.testing.assert_close((ours.embedding, *ours.cells), (alone.embedding, *alone.cells))


# Negatives of the batch.


def on_half_a_batch(rank):
    """Two processes, half of the batch each: losses and gradients average to the whole's."""
    heads = [
        f"method.{head}.{setting}" for head in ("projector", "predictor")
        for setting in ("hidden_dim=32", "hidden_batch_norm=false", "last_batch_norm=false")
    ]  # fmt: skip
    backbone = [
        "backbone=swin_v2_tiny_patch2",
        "backbone.stochastic_depth=0",
        "method.temperature=0.2",
    ]
    method = built(run_of("moco_v3", *backbone, *heads)).double().train()
    for parameter in method.key_encoder.parameters():
        parameter += torch.randn_like(parameter) / 10
    views = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    outputs = method.training_step(
        SimpleNamespace(views=tuple(views[:, 4 * rank : 4 * rank + 4])), 0
    )
    outputs["loss"].backward()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    ours = [all_gather(parameter.grad[None]).mean(dim=0) for parameter in trained]

    queries = [F.normalize(method.predictor(method.query_encoder(view)), dim=1) for view in views]
    keys = [F.normalize(method.key_encoder(view), dim=1) for view in views]
    loss = (
        2
        * 0.2
        * sum(plain_in_batch_info_nce(q, k, 0.2) for q, k in zip(queries, keys[::-1], strict=True))
    )
    expected = torch.autograd.grad(loss, trained)
    assert float(all_gather(outputs["loss"][None]).mean()) == pytest.approx(
        float(loss.detach()), rel=1e-6
    )
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-2
    for gradient, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-5, atol=1e-7)
    assert outputs["negatives"].shape == (8, 256)


@pytest.mark.slow
def test_in_batch_loss_and_gradients_of_two_processes_are_those_of_one_with_the_double_batch():
    on_two(on_half_a_batch)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("moco_v3", ["method.queue_size=4096"], "method.negatives=batch has no queue: method.queue_size=4096, method.num_queues=1, method.dense_weight=0.0; expected null, 1 and 0,"),
        ("moco_v3", ["method.num_queues=2"], "method.negatives=batch has no queue: method.queue_size=None, method.num_queues=2, method.dense_weight=0.0; expected null, 1 and 0,"),
        ("moco_v3", ["method.dense_weight=0.5"], "method.negatives=batch has no queue: method.queue_size=None, method.num_queues=1, method.dense_weight=0.5; expected null, 1 and 0,"),
        ("moby", ["method.negatives=batch"], "method.negatives=batch has no queue: method.queue_size="),
        ("moco_v2", ["method.queue_size=null"], "method.queue_size=null: method.negatives=queue needs a size"),
        ("moco_v2", ["method.num_queues=2"], "method.num_queues=2: the second queue is for the second direction"),
    ],
)  # fmt: skip
def test_switches_that_contradict_each_other_are_named(name, overrides, expected):
    with pytest.raises(InputError) as error:
        built(run_of(name, "backbone=resnet_tiny", *overrides))
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
