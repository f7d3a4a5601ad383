"""Momentum Contrast: arXiv 1911.05722 (v1) and 2003.04297 (v2), as one algorithm with a few switches.

Letters: N batch, C embedding width, D feature width, K queue size, S cells of the dense grid, H W pixels.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.errors import InputError
from moco.methods.batch_norm import batch_norm_mode, log_batch_norm, split_batch_norm
from moco.methods.key_queue import KeyQueue
from moco.methods.losses import dense_info_nce, info_nce, most_similar_cells
from moco.methods.momentum import key_momentum_at, update_key_encoder
from moco.models.backbones import build_backbone
from moco.models.encoder import Encoded, Encoder, switch_off_stochastic_depth
from moco.models.heads import DenseProjector, build_head
from moco.training import trainer
from moco.training.distributed import all_gather, shuffled_across, unshuffled
from moco.training.optimizers import build_optimizer, learning_rate_at


class MoCo(pl.LightningModule):
    """Query encoder, momentum key encoder, queue of negative keys, InfoNCE.

    The arguments are plain numbers, strings and dicts: they are the checkpoint's hyperparameters and rebuild the module.

    Args:
        backbone: arguments of `build_backbone`.
        optimizer: the fields of ``OptimizerConfig``, learning rates as they are to be used.
        projector: arguments of `build_head`; it ends in embeddings, and the key encoder has a copy.
        predictor: arguments of `build_head`; from embedding to embedding, of queries only, as in MoBY (arXiv 2105.04553).
        embedding_dim: C.
        queue_size, queue_start: K and its start, see `KeyQueue`.
        num_queues: 1 takes all keys; 2 are one for each view's keys, as in MoBY: a query meets only negatives that were
            augmented as its own key was. Two need the symmetric loss.
        temperature: T.
        key_momentum, key_momentum_schedule, key_momentum_end: m, see `key_momentum_at`.
        symmetric: each view serves as query and as key; both views' keys are enqueued.
        symmetric_reduction: ``sum`` or ``mean`` of the two directions' losses.
        batch_norm, batch_norm_splits: see `moco.methods.batch_norm`.
        dense_weight: w of DenseCL (arXiv 2011.09157): the loss is (1 - w) * global + w * dense, 0 is MoCo. The dense term
            has its own projector, as wide as the other, and for each queue a queue of its own; the predictor is not for it.
        dense_grid: side of its grid, cells, see `DenseProjector`.

    Raises:
        InputError: a second queue without the symmetric loss, or an unknown backbone.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        optimizer: dict[str, Any],
        projector: dict[str, Any],
        predictor: dict[str, Any],
        embedding_dim: int = 128,
        queue_size: int = 65536,
        queue_start: str = "random",
        num_queues: int = 1,
        temperature: float = 0.2,
        key_momentum: float = 0.999,
        key_momentum_schedule: str = "constant",
        key_momentum_end: float = 1.0,
        symmetric: bool = False,
        symmetric_reduction: str = "sum",
        batch_norm: str = "auto",
        batch_norm_splits: int = 8,
        dense_weight: float = 0.0,
        dense_grid: int = 7,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if num_queues == 2 and not symmetric:
            raise InputError(
                "method.num_queues=2: the second queue is the second direction's; add method.symmetric=true"
            )
        net = build_backbone(**backbone)
        self.query_encoder = Encoder(net, build_head(net.feature_dim, embedding_dim, **projector))
        if dense_weight:
            dense_head = DenseProjector(net.feature_dim, embedding_dim, projector.get("hidden_dim"), dense_grid)
            self.query_encoder.dense_projector = dense_head
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        switch_off_stochastic_depth(self.key_encoder)
        self.predictor = build_head(embedding_dim, embedding_dim, **predictor)
        new_queue = partial(KeyQueue, queue_size, embedding_dim, queue_start)
        self.queue = new_queue()
        self.reverse_queue = new_queue() if num_queues == 2 else None
        self.dense_queue = new_queue() if dense_weight else None
        self.reverse_dense_queue = new_queue() if dense_weight and num_queues == 2 else None
        self.temperature = temperature
        self.symmetric = symmetric
        self.reduce_directions = torch.sum if symmetric_reduction == "sum" else torch.mean
        self.dense_weight = dense_weight
        self.batch_norm = "plain"

    def setup(self, stage: str) -> None:
        """Put the batch-norm mode in force; before this (so for evaluation) BatchNorm is PyTorch's own."""
        devices = self.trainer.world_size
        self.batch_norm = batch_norm_mode(self.hparams["batch_norm"], self.key_encoder, devices)
        log_batch_norm(self.batch_norm, self.key_encoder, devices)
        if self.batch_norm == "split":
            for module in (self.query_encoder, self.key_encoder, self.predictor):
                split_batch_norm(module, self.hparams["batch_norm_splits"])

    @property
    def queues(self) -> list[KeyQueue]:
        """For each direction, the queue that holds its negatives and takes its keys."""
        return [self.queue, self.reverse_queue or self.queue]

    @property
    def dense_queues(self) -> list[KeyQueue]:
        """The same for the dense term."""
        assert self.dense_queue is not None
        return [self.dense_queue, self.reverse_dense_queue or self.dense_queue]

    def encode_query(self, images: Tensor) -> Encoded:
        """Embeddings (N, C), and with the dense term cells, of views (N, 3, H, W); all of unit norm."""
        encoded = self.query_encoder.embed(images)
        return encoded._replace(embedding=self.predictor(encoded.embedding)).map(unit_norm)

    @torch.no_grad()
    def encode_key(self, images: Tensor) -> Encoded:
        """The same of keys, without gradient and predictor; BatchNorm does not see them in their own batch."""
        if self.batch_norm == "plain":
            return self.key_encoder.embed(images).map(unit_norm)
        images, order = shuffled_across(images)
        return self.key_encoder.embed(images).map(unit_norm).map(lambda shuffled: unshuffled(shuffled, order))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One batch of view pairs; returns the loss, and for the monitors what it was made of, of the last direction."""
        first, second = batch.views  # (N, 3, H, W) each
        directions = [(first, second), (second, first)] if self.symmetric else [(first, second)]
        losses, pairs = [], []
        for (query_view, key_view), queue in zip(directions, self.queues, strict=False):
            query = self.encode_query(query_view)  # (N, C) unit norm
            key = self.encode_key(key_view)  # (N, C) unit norm, no gradient
            negatives = queue.negatives()  # (K, C) unit norm
            losses.append(info_nce(query.embedding, key.embedding, negatives, self.temperature))
            pairs.append((query, key))
        loss = self.reduce_directions(torch.stack(losses))
        for (_, key), queue in zip(pairs, self.queues, strict=False):
            queue.enqueue(all_gather(key.embedding))  # after the losses: a positive is never its own negative
        outputs = {"loss": loss, "query": query.embedding.detach(), "key": key.embedding, "negatives": negatives}
        return self.with_dense_term(outputs, pairs) if self.dense_weight else outputs

    def with_dense_term(self, outputs: dict[str, Tensor], pairs: list[tuple[Encoded, Encoded]]) -> dict[str, Tensor]:
        """A step's outputs with DenseCL's loss for MoCo's (arXiv 2011.09157, section 3), and both of its terms.

        Each cell of a query is to find the most similar cell of its own key; negatives are other images' mean embeddings.
        Advances the dense queues.
        """
        losses, pooled = [], []
        for (query, key), queue in zip(pairs, self.dense_queues, strict=False):
            assert query.cells is not None
            assert key.cells is not None
            matches = most_similar_cells(query.cells.features, key.cells.features)  # (N, S)
            rows = (query.cells.embeddings, key.cells.embeddings)  # (N, S, C) unit norm each
            losses.append(dense_info_nce(*rows, matches, queue.negatives(), self.temperature))
            pooled.append(key.cells.pooled)  # (N, C) unit norm
        for keys, queue in zip(pooled, self.dense_queues, strict=False):
            queue.enqueue(all_gather(keys))
        loss_global, loss_dense = outputs["loss"], self.reduce_directions(torch.stack(losses))
        loss = (1 - self.dense_weight) * loss_global + self.dense_weight * loss_dense
        return outputs | {"loss": loss, "loss_global": loss_global.detach(), "loss_dense": loss_dense.detach()}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The learning rate of this step, the step, then the key encoder's update: once per optimizer step.

        Updating after the step gives the official code's key weights to the last bit: there the update comes before the
        keys are encoded, and the first one finds equal weights.
        """
        step = self.trainer.global_step
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate_at(step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        update_key_encoder(self.key_encoder, self.query_encoder, self.key_momentum_at(step))

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
        """The loss when nothing is told apart: log(1 + K) in every direction."""
        each = torch.full((1 + self.symmetric,), math.log(1 + num_negatives))
        return float(self.reduce_directions(each))

    def learning_rate_at(self, step: int) -> float:
        """A pure function of the optimizer step, counted from 0."""
        return learning_rate_at(step, self.num_steps, self.steps_per_epoch, **self.hparams["optimizer"])

    def key_momentum_at(self, step: int) -> float:
        """A pure function of the optimizer step, counted from 0."""
        hparams = self.hparams
        return key_momentum_at(
            step, self.num_steps, hparams["key_momentum"], hparams["key_momentum_end"], hparams["key_momentum_schedule"]
        )


def unit_norm(rows: Tensor) -> Tensor:
    """Along the last dimension, in fp32 whatever the precision."""
    return F.normalize(rows.float(), dim=-1)
