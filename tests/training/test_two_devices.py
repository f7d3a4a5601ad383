"""Training steps on two gloo processes against one process that plays both devices in plain loops.

The reference does not use `moco.training.distributed.collectives`. It takes the two halves of each
batch one after the other, shuffles keys by hand, and averages the gradients of both. It keeps a copy
of the encoders for each device, because BatchNorm's running statistics differ between devices.
Everything is in float64.
"""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from moco.methods.batch_norm import batch_norm_mode
from moco.methods.momentum import update_key_encoder
from tests.methods.test_family import plain_encode, plain_info_nce, plain_update, run_of
from tests.processes import on_two

SWIN = ["backbone=swin_v2_tiny_patch2", "backbone.stochastic_depth=0"]
ADAMW = [
    "optimizer=adamw",
    "optimizer.lr=0.05",
    "optimizer.eps=0.01",
    "optimizer.lr_for_batch_size=null",
]
LARS = [
    "optimizer=lars",
    "optimizer.lr=20",
    "optimizer.weight_decay=0.01",
    "optimizer.lr_for_batch_size=null",
]
HEADS = ["method.projector.hidden_dim=32", "method.predictor.hidden_dim=32"]
NO_NORM = [
    f"method.{head}.{setting}=false"
    for head in ("projector", "predictor")
    for setting in ("hidden_batch_norm", "last_batch_norm")
]
NORM = [
    "method.projector.num_layers=2",
    "method.projector.hidden_dim=32",
    "method.projector.hidden_batch_norm=true",
]
DENSE = ["method.dense_weight=0.3", "method.dense_grid=2"]
CASES = [
    ("moby", [*SWIN, *ADAMW, *HEADS]),
    ("moby", [*SWIN, *ADAMW, *HEADS, *NO_NORM]),
    # Cells of a Swin's map have strides that NCCL and gloo do not take.
    ("moby", [*SWIN, *ADAMW, *HEADS, *DENSE]),
    ("moco_v3", ["backbone=resnet_tiny", *LARS, *HEADS]),
    ("moco_v3", ["backbone=resnet_tiny", *LARS, *HEADS, *NO_NORM]),
    ("densecl", ["backbone=resnet_tiny", *DENSE]),
    ("densecl", [*SWIN, *NORM, *DENSE, "optimizer.decay_all=false"]),
    ("densecl", [*SWIN, *DENSE, "optimizer.decay_all=false"]),
]
N = 4  # images of one device at once


class Device:
    """What one device holds in the reference."""

    def __init__(self, method):
        self.query_encoder, self.key_encoder, self.predictor = (
            copy.deepcopy(module)
            for module in (method.query_encoder, method.key_encoder, method.predictor)
        )
        self.trained = torch.nn.ModuleDict(
            {"encoder": self.query_encoder, "predictor": self.predictor}
        )


class Reference:
    """Both devices, and the queues that they share: ``queues[term][direction]`` is (C, K)."""

    def __init__(self, method, config):
        self.options, self.optimizer = config.method, config.optimizer
        self.devices = [Device(method), Device(method)]
        self.lr = method.configure_optimizers().param_groups[0]["lr"]
        self.mode = method.batch_norm
        self.dense_grid = self.options.dense_weight and 2
        names = [["queue", "reverse_queue"], ["dense_queue", "reverse_dense_queue"]][
            : 1 + bool(self.dense_grid)
        ]
        self.names = [term[: self.options.num_queues] for term in names]
        self.queues = [[]]
        if self.options.negatives == "queue":
            self.queues = [
                [getattr(method, name).keys.T.clone() for name in term] for term in self.names
            ]
        self.states, self.number = [{}, {}], 0

    def keys_of(self, halves):
        """The parts of every image's key, of all devices together."""
        images = torch.cat(list(halves))
        order = torch.randperm(len(images)) if self.mode == "shuffle" else torch.arange(len(images))
        whole = None
        for device, places in zip(self.devices, order.chunk(2), strict=True):
            with torch.no_grad():
                parts = plain_encode(
                    device.key_encoder, images[places], self.dense_grid, torch.nn.Identity()
                )
            whole = whole or [part.new_empty(len(images), *part.shape[1:]) for part in parts]
            for rows, part in zip(whole, parts, strict=True):
                rows[places] = part
        return whole

    def step(self, first, second):
        """One training step on views (2 devices, N, 3, H, W); returns each device's loss."""
        options = self.options
        directions = [(first, second), (second, first)][: 1 + options.symmetric]
        queries = [
            [
                plain_encode(device.query_encoder, views[half], self.dense_grid, device.predictor)
                for views, _ in directions
            ]
            for half, device in enumerate(self.devices)
        ]
        # MoBY and MoCo v3 encode the first view's keys first, which are the second direction's.
        keys = [self.keys_of(halves) for _, halves in reversed(directions)][::-1]
        losses = [self.loss_of(queries[half], keys, half) for half in range(2)]
        gradients = [
            torch.autograd.grad(loss, list(device.trained.parameters()))
            for loss, device in zip(losses, self.devices, strict=True)
        ]
        self.number += 1
        for device, state in zip(self.devices, self.states, strict=True):
            with torch.no_grad():
                for (name, parameter), one, other in zip(
                    device.trained.named_parameters(), *gradients, strict=True
                ):
                    gradient = (one + other) / 2
                    plain_update(
                        name, parameter, gradient, state, self.number, self.optimizer, self.lr
                    )
                pairs = zip(
                    device.query_encoder.parameters(), device.key_encoder.parameters(), strict=True
                )
                for query, key in pairs:
                    key.copy_(0.9 * key + 0.1 * query)
        for place, key in enumerate(keys if options.negatives == "queue" else []):
            side = place % options.num_queues
            for term, rows in enumerate([key[0], key[2]] if self.dense_grid else [key[0]]):
                queue = self.queues[term][side]
                self.queues[term][side] = torch.cat([queue, rows.T], dim=1)
        return [float(loss.detach()) for loss in losses]

    def negatives(self, term, side, method_queue):
        """The newest keys in the places where a ring has them."""
        appended = self.queues[term][side]  # (C, K + all enqueued)
        size = len(method_queue.keys)
        ring = appended[:, :size].clone()
        for number in range(size, appended.shape[1]):
            ring[:, number % size] = appended[:, number]
        return ring

    def loss_of(self, queries, keys, half):
        options = self.options
        own = slice(half * N, (half + 1) * N)
        terms = [[], []]
        for place, (query, key) in enumerate(zip(queries, keys, strict=True)):
            side = place % options.num_queues
            if options.negatives == "batch":
                logits = torch.einsum("nc,mc->nm", query[0], key[0]) / options.temperature
                terms[0].append(F.cross_entropy(logits, torch.arange(N) + half * N))
                continue
            queue = self.queues[0][side][:, -options.queue_size :]
            terms[0].append(plain_info_nce(query[0], key[0][own], queue, options.temperature))
            if self.dense_grid:
                match = torch.einsum("nsd,ntd->nst", query[3], key[3][own]).max(dim=2).indices
                positive = torch.stack(
                    [cells[row] for cells, row in zip(key[1][own], match, strict=True)]
                )
                rows = [part.reshape(-1, part.shape[2]) for part in (query[1], positive)]
                queue = self.queues[1][side][:, -options.queue_size :]
                terms[1].append(plain_info_nce(*rows, queue, options.temperature))
        weights = (1 - options.dense_weight, options.dense_weight)
        loss = sum(weight * sum(term) for weight, term in zip(weights, terms, strict=True))
        return loss * (2 * options.temperature if options.loss_times_2t else 1)


def as_one_device(rank, cases):
    # What is done in fp32 whatever the precision is done in float64 here.
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        compare_steps(rank, cases)


def compare_steps(rank, cases):
    from moco.training.distributed.collectives import all_gather

    for name, overrides in cases:
        config = run_of(name, "data.batch_size=8", "method.batch_norm=auto", *overrides)
        torch.manual_seed(0)
        method = built_in_double(config)
        method.install_batch_norm(
            batch_norm_mode("auto", method.key_encoder, 2, "cpu", config.method.negatives)
        )
        reference, optimizer = Reference(method, config), method.configure_optimizers()
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        start = [parameter.detach().clone() for parameter in trained]
        for step in range(3):
            torch.manual_seed(100 + step)
            views = torch.randn(2, 2, N, 3, 64, 64, dtype=torch.float64)
            # Only rank 0's order counts.
            torch.manual_seed(step + 10 * rank)
            loss = method.training_step(SimpleNamespace(views=tuple(views[:, rank])), step)["loss"]
            loss.backward()
            for parameter in trained:
                parameter.grad = all_gather(parameter.grad[None]).mean(dim=0)
            optimizer.step()
            optimizer.zero_grad()
            update_key_encoder(method.key_encoder, method.query_encoder, 0.9)
            torch.manual_seed(step)
            expected = reference.step(*views)[rank]
            assert float(loss.detach()) == pytest.approx(expected, rel=1e-9), (
                name,
                overrides,
                step,
            )
        device = reference.devices[rank]
        for path in ("query_encoder", "key_encoder", "predictor"):
            here, there = getattr(method, path).state_dict(), getattr(device, path).state_dict()
            for key, value in there.items():
                case = f"{name} {overrides} {path}.{key}"
                torch.testing.assert_close(here[key], value, rtol=1e-6, atol=1e-7, msg=case)
        if config.method.negatives == "queue":
            for term, names in enumerate(reference.names):
                for side, queue in enumerate(names):
                    ring = reference.negatives(term, side, getattr(method, queue))
                    torch.testing.assert_close(
                        getattr(method, queue).keys, ring.T, rtol=0, atol=1e-9
                    )
        moved = max(
            float((now.detach() - before).abs().max())
            for now, before in zip(trained, start, strict=True)
        )
        assert moved > 1e-3, (name, overrides)


def built_in_double(config):
    from tests.methods.test_family import built

    method = built(config).double().train()
    for parameter in method.key_encoder.parameters():
        parameter += torch.randn_like(parameter) / 10
    return method


@pytest.mark.slow
def test_dense_steps_on_two_processes_are_those_of_one_that_plays_both():
    on_two(as_one_device, [CASES[2]])


@pytest.mark.slow
def test_all_steps_on_two_processes_are_those_of_one_that_plays_both():
    on_two(as_one_device, CASES)
