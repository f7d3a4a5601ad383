"""Momentum Contrast: arXiv 1911.05722 (v1), 2003.04297 (v2) and 2104.02057 (v3), as one algorithm with a few switches.

Letters: N batch, M batch of all devices, C embedding width, D feature width, K queue size, S cells of the dense grid,
H W pixels.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.errors import InputError
from moco.methods.batch_norm import (
    batch_norm_mode,
    in_batch_order,
    log_batch_norm,
    sorted_by_group,
    split_batch_norm,
)
from moco.methods.key_queue import KeyQueue
from moco.methods.losses import dense_info_nce, in_batch_info_nce, info_nce, most_similar_cells
from moco.methods.momentum import key_momentum_at, update_key_encoder
from moco.models.backbones import build_backbone
from moco.models.encoder import (
    Encoded,
    Encoder,
    is_channels_last,
    per_view,
    switch_off_stochastic_depth,
)
from moco.models.heads import DenseProjector, build_head
from moco.training import trainer
from moco.training.distributed.collectives import Shuffle, all_gather, rank
from moco.training.optimizers import build_optimizer, learning_rate_at


class MoCo(pl.LightningModule):
    """Query encoder, momentum key encoder, negative keys from a queue or from the batch, InfoNCE.

    The arguments are plain numbers, strings and dicts: they are the checkpoint's hyperparameters and rebuild the module.

    Args:
        backbone: arguments of `build_backbone`.
        optimizer: the fields of ``OptimizerConfig``, learning rates as they are to be used.
        projector: arguments of `build_head`; it ends in embeddings, and the key encoder has a copy.
        predictor: arguments of `build_head`; from embedding to embedding, of queries only, as in MoBY (arXiv 2105.04553).
        embedding_dim: C.
        negatives: ``queue``, or ``batch`` for the other keys of the step, on all devices, as in MoCo v3.
        queue_size, queue_start: K and its start, see `KeyQueue`. K is None without a queue.
        num_queues: 1 takes all keys; 2 are one for each view's keys, as in MoBY: a query meets only negatives that were
            augmented as its own key was. Two need the symmetric loss.
        temperature: T.
        key_momentum, key_momentum_schedule, key_momentum_end: m, see `key_momentum_at`.
        symmetric: each view serves as query and as key; both views' keys are enqueued.
        symmetric_reduction: ``sum`` or ``mean`` of the two directions' losses.
        loss_times_2t: multiply the loss by 2T, as MoCo v3 does: its gradient then keeps its size whatever T is.
        batch_norm, batch_norm_splits: see `moco.methods.batch_norm`.
        dense_weight: w of DenseCL (arXiv 2011.09157): the loss is (1 - w) * global + w * dense, 0 is MoCo. The dense term
            has its own projector, as wide as the other, and for each queue a queue of its own; the predictor is not for it.
        dense_grid: side of its grid, cells, see `DenseProjector`.

    Raises:
        InputError: switches that contradict each other, or an unknown backbone.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        optimizer: dict[str, Any],
        projector: dict[str, Any],
        predictor: dict[str, Any],
        embedding_dim: int = 128,
        negatives: str = "queue",
        queue_size: int | None = 65536,
        queue_start: str = "random",
        num_queues: int = 1,
        temperature: float = 0.2,
        key_momentum: float = 0.999,
        key_momentum_schedule: str = "constant",
        key_momentum_end: float = 1.0,
        symmetric: bool = False,
        symmetric_reduction: str = "sum",
        loss_times_2t: bool = False,
        batch_norm: str = "auto",
        batch_norm_splits: int = 8,
        dense_weight: float = 0.0,
        dense_grid: int = 7,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        check_switches(negatives, queue_size, num_queues, symmetric, dense_weight)
        net = build_backbone(**backbone)
        self.query_encoder = Encoder(net, build_head(net.feature_dim, embedding_dim, **projector))
        if dense_weight:
            dense_head = DenseProjector(
                net.feature_dim, embedding_dim, projector.get("hidden_dim"), dense_grid
            )
            self.query_encoder.dense_projector = dense_head
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        switch_off_stochastic_depth(self.key_encoder)
        self.predictor = build_head(embedding_dim, embedding_dim, **predictor)

        def new_queue(is_wanted: bool = True) -> KeyQueue | None:
            return (
                KeyQueue(queue_size, embedding_dim, queue_start)
                if is_wanted and queue_size is not None
                else None
            )

        self.queue = new_queue()
        self.reverse_queue = new_queue(num_queues == 2)
        self.dense_queue = new_queue(dense_weight > 0)
        self.reverse_dense_queue = new_queue(dense_weight > 0 and num_queues == 2)
        self.temperature = temperature
        self.symmetric = symmetric
        self.reduce_directions = torch.sum if symmetric_reduction == "sum" else torch.mean
        self.loss_factor = 2 * temperature if loss_times_2t else 1.0
        self.dense_weight = dense_weight
        self.batch_norm = "plain"
        self.in_blocks = False  # split BatchNorm takes batches that are sorted by group

    def setup(self, stage: str) -> None:
        """Put the batch-norm mode in force; before this (so for evaluation) BatchNorm is PyTorch's own."""
        devices, negatives = self.trainer.world_size, self.hparams["negatives"]
        device_type = self.trainer.strategy.root_device.type
        mode = batch_norm_mode(
            self.hparams["batch_norm"], self.key_encoder, devices, device_type, negatives
        )
        log_batch_norm(mode, self.key_encoder, devices, negatives)
        self.put_in_force(mode)

    def put_in_force(self, batch_norm: str) -> None:
        """Let the encoders have that mode from now on, in the memory format that they are in."""
        self.batch_norm = batch_norm
        if batch_norm == "split":
            splits, self.in_blocks = (
                self.hparams["batch_norm_splits"],
                is_channels_last(self.query_encoder.parameters()),
            )
            for encoder in (self.query_encoder, self.key_encoder):
                split_batch_norm(encoder, splits, self.in_blocks)
            split_batch_norm(self.predictor, splits)
        elif batch_norm == "sync":
            for module in (self.query_encoder, self.key_encoder, self.predictor):
                nn.SyncBatchNorm.convert_sync_batchnorm(module)

    @property
    def has_one_view_per_encoder(self) -> bool:
        """Whether a step takes one view through each encoder, and nothing but the embedding from it."""
        return not self.symmetric and not self.dense_weight

    def compile_encoders(self, options: dict[str, Any]) -> None:
        """Let training run its nets by torch.compile.

        The loss is left out: by hand it takes less time than its two matrix products, see docs/performance.md.

        Args:
            options: of the compiler.
        """
        for encoder in (self.query_encoder, self.key_encoder):
            encoder.compile_training(options)
        self.predictor.compile(dynamic=False, options=options)

    @property
    def queues(self) -> list[KeyQueue]:
        """For each direction, the queue that holds its negatives and takes its keys; none without a queue."""
        return [] if self.queue is None else [self.queue, self.reverse_queue or self.queue]

    @property
    def dense_queues(self) -> list[KeyQueue]:
        """The same for the dense term."""
        assert self.dense_queue is not None
        return [self.dense_queue, self.reverse_dense_queue or self.dense_queue]

    def embed(self, encoder: Encoder, views: Sequence[Tensor]) -> list[Encoded]:
        """`Encoder.embed`, in the order that split BatchNorm takes."""
        if not self.in_blocks:
            return encoder.embed(views)
        splits = self.hparams["batch_norm_splits"]
        encoded = encoder.embed([sorted_by_group(view, splits) for view in views])
        return [view.map(partial(in_batch_order, splits=splits)) for view in encoded]

    def encode_queries(self, views: Sequence[Tensor]) -> list[Encoded]:
        """For each view (N, 3, H, W) its embeddings (N, C), and with the dense term cells; all of unit norm."""
        encoded = self.embed(self.query_encoder, views)
        predicted = per_view(self.predictor, [view.embedding for view in encoded])
        return [
            view._replace(embedding=embedding).map(unit_norm)
            for view, embedding in zip(encoded, predicted, strict=True)
        ]

    @property
    def keys_follow_the_views(self) -> bool:
        """Whether the key encoder sees the first view before the second one.

        The order decides how BatchNorm's running statistics move. MoBY and solo-learn's v2+, which
        have two queues, and MoCo v3, which has none, encode the first view's keys first. The
        official notebook has one queue and encodes the second view's keys first.
        """
        return self.symmetric and (self.queue is None or self.reverse_queue is not None)

    @torch.no_grad()
    def encode_keys(self, views: Sequence[Tensor]) -> list[Encoded]:
        """Embed the keys of each direction, without gradient and predictor.

        They are shuffled on the way where BatchNorm would leak.

        Args:
            views: (N, 3, H, W) of each direction. The first direction's are the second view.
                `keys_follow_the_views` says in which order the encoder sees them.
        """
        if self.keys_follow_the_views:
            return self.encode_keys_in_order(views[::-1])[::-1]
        return self.encode_keys_in_order(views)

    def encode_keys_in_order(self, views: Sequence[Tensor]) -> list[Encoded]:
        """`encode_keys` of views in the order in which the encoder is to see them."""
        if self.batch_norm not in ("shuffle", "split"):
            return [view.map(unit_norm) for view in self.embed(self.key_encoder, views)]
        shuffles = [Shuffle(len(view), view.device) for view in views]
        shuffled = [shuffle.shuffled(view) for shuffle, view in zip(shuffles, views, strict=True)]
        encoded = self.embed(self.key_encoder, shuffled)
        return [
            view.map(unit_norm).map(shuffle.unshuffled)
            for shuffle, view in zip(shuffles, encoded, strict=True)
        ]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One batch of view pairs; returns the loss, and for the monitors what it was made of, of the last direction.

        The negatives of a queue come as a function that gives them (K, C), until the next step: to keep them is dear.
        """
        first, second = batch.views  # (N, 3, H, W) each
        queries = self.encode_queries(
            [first, second] if self.symmetric else [first]
        )  # (N, C) unit norm each
        keys = self.encode_keys(
            [second, first] if self.symmetric else [second]
        )  # (N, C) unit norm each, no gradient
        contrast: Callable[..., tuple[list[Tensor], Any]] = (
            self.against_batch if self.queue is None else self.against_queue
        )
        losses, negatives = contrast(queries, keys)
        query, key = queries[-1].embedding.detach(), keys[-1].embedding
        outputs = {"loss": self.total(losses), "query": query, "key": key, "negatives": negatives}
        return self.with_dense_term(outputs, queries, keys) if self.dense_weight else outputs

    def against_queue(
        self, queries: list[Encoded], keys: list[Encoded]
    ) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """Each direction's loss, and what gives the last one's negatives (K, C); advances the queues."""
        losses = []
        for query, key, queue in zip(queries, keys, self.queues, strict=False):
            negatives = queue.negatives()  # (K, C) unit norm
            losses.append(info_nce(query.embedding, key.embedding, negatives, self.temperature))
        negatives_given_last = queue.negatives_given_last
        # After the losses: a positive is never its own negative. The last direction's keys are of
        # the first view. They go first, as in the official notebook's one queue.
        for key, queue in reversed(list(zip(keys, self.queues, strict=False))):
            queue.enqueue(all_gather(key.embedding))
        return losses, negatives_given_last

    def against_batch(
        self, queries: list[Encoded], keys: list[Encoded]
    ) -> tuple[list[Tensor], Tensor]:
        """Each direction's loss, and the last one's keys of all devices (M, C), each query's own among them."""
        losses = []
        for query, key in zip(queries, keys, strict=True):
            everyone = all_gather(key.embedding)  # (M, C) unit norm
            losses.append(in_batch_info_nce(query.embedding, everyone, self.temperature, rank()))
        return losses, everyone

    def total(self, losses: list[Tensor]) -> Tensor:
        """The loss of a step from those of its directions."""
        return self.loss_factor * self.reduce_directions(torch.stack(losses))

    def with_dense_term(
        self, outputs: dict[str, Any], queries: list[Encoded], keys: list[Encoded]
    ) -> dict[str, Any]:
        """A step's outputs with DenseCL's loss for MoCo's (arXiv 2011.09157, section 3), and both of its terms.

        Each cell of a query is to find the most similar cell of its own key; negatives are other images' mean embeddings.
        Advances the dense queues.
        """
        losses, pooled = [], []
        for query, key, queue in zip(queries, keys, self.dense_queues, strict=False):
            assert query.cells is not None
            assert key.cells is not None
            matches = most_similar_cells(query.cells.features, key.cells.features)  # (N, S)
            rows = (query.cells.embeddings, key.cells.embeddings)  # (N, S, C) unit norm each
            losses.append(dense_info_nce(*rows, matches, queue.negatives(), self.temperature))
            pooled.append(key.cells.pooled)  # (N, C) unit norm
        for rows_of_view, queue in reversed(list(zip(pooled, self.dense_queues, strict=False))):
            queue.enqueue(all_gather(rows_of_view))  # in the order of the other queue
        loss_global, loss_dense = outputs["loss"], self.total(losses)
        loss = (1 - self.dense_weight) * loss_global + self.dense_weight * loss_dense
        return outputs | {
            "loss": loss,
            "loss_global": loss_global.detach(),
            "loss_dense": loss_dense.detach(),
        }

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """The learning rate of this step, the step, then the key encoder's update: once per optimizer step.

        The official codes update at the beginning of step t, with m(t) and the query weights that step t - 1 left; the
        first time these equal the key's. Here the same update closes step t - 1, so that no step is updated for twice
        when gradients are accumulated, and all keys are encoded with the same weights as there.
        """
        step = self.trainer.global_step
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate_at(step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        update_key_encoder(self.key_encoder, self.query_encoder, self.key_momentum_at(step + 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, **self.hparams["optimizer"])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch of the running training."""
        return trainer.steps_per_epoch(self.trainer)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole running training."""
        return trainer.num_steps(self.trainer)

    def loss_of_chance(self, num_negatives: int) -> float:
        """The loss when a query's own key cannot be told from its negatives: log(1 + their number) in every direction."""
        return float(self.total([torch.tensor(math.log(1 + num_negatives))] * (1 + self.symmetric)))

    def learning_rate_at(self, step: int) -> float:
        """A pure function of the optimizer step, counted from 0."""
        return learning_rate_at(
            step, self.num_steps, self.steps_per_epoch, **self.hparams["optimizer"]
        )

    def key_momentum_at(self, step: int) -> float:
        """A pure function of the optimizer step, counted from 0."""
        hparams = self.hparams
        return key_momentum_at(
            step,
            self.num_steps,
            hparams["key_momentum"],
            hparams["key_momentum_end"],
            hparams["key_momentum_schedule"],
        )


def unit_norm(rows: Tensor) -> Tensor:
    """Along the last dimension, in fp32 whatever the precision."""
    return F.normalize(rows.float(), dim=-1)


def check_switches(
    negatives: str, queue_size: int | None, num_queues: int, symmetric: bool, dense_weight: float
) -> None:
    """Raises InputError if they contradict each other."""
    if num_queues == 2 and not symmetric:
        raise InputError(
            "method.num_queues=2: the second queue is the second direction's; add method.symmetric=true"
        )
    if negatives == "queue" and queue_size is None:
        raise InputError(
            "method.queue_size=null: method.negatives=queue needs a size; expected a number at least 1"
        )
    if negatives == "queue":
        return
    for name, value, without_queue in (
        ("num_queues", num_queues, 1), ("dense_weight", dense_weight, 0), ("queue_size", queue_size, "null")
    ):  # fmt: skip
        if value not in (without_queue, None):
            raise InputError(
                f"method.{name}={value}: method.negatives=batch has no queue; expected method.{name}={without_queue}, "
                "or method.negatives=queue"
            )
