"""Momentum Contrast: arXiv 1911.05722 (v1) and 2003.04297 (v2), as one algorithm with a few switches.

Letters: N batch, C embedding width, D feature width, K queue size, H W pixels.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.methods.batch_norm import batch_norm_mode, log_batch_norm, split_batch_norm
from moco.methods.key_queue import KeyQueue
from moco.methods.losses import info_nce
from moco.methods.momentum import key_momentum_at, update_key_encoder
from moco.models.backbones import build_backbone
from moco.models.encoder import Encoder, build_projector
from moco.training.distributed import all_gather, shuffled_across, unshuffled
from moco.training.optimizers import build_optimizer, learning_rate_at


class MoCo(pl.LightningModule):
    """Query encoder, momentum key encoder, queue of negative keys, InfoNCE.

    The arguments are plain numbers, strings and dicts: they are the checkpoint's hyperparameters and rebuild the module.

    Args:
        backbone: arguments of `build_backbone`.
        optimizer: the fields of ``OptimizerConfig``.
        head, hidden_dim, embedding_dim: the projector, see `build_projector`.
        queue_size, queue_start: K and its start, see `KeyQueue`.
        temperature: T.
        key_momentum, key_momentum_schedule, key_momentum_end: m, see `key_momentum_at`.
        symmetric: each view serves as query and as key; both views' keys are enqueued.
        symmetric_reduction: ``sum`` or ``mean`` of the two directions' losses.
        batch_norm, batch_norm_splits: see `moco.methods.batch_norm`.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        optimizer: dict[str, Any],
        head: str = "mlp",
        hidden_dim: int | None = None,
        embedding_dim: int = 128,
        queue_size: int = 65536,
        queue_start: str = "random",
        temperature: float = 0.2,
        key_momentum: float = 0.999,
        key_momentum_schedule: str = "constant",
        key_momentum_end: float = 1.0,
        symmetric: bool = False,
        symmetric_reduction: str = "sum",
        batch_norm: str = "auto",
        batch_norm_splits: int = 8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        net = build_backbone(**backbone)
        self.query_encoder = Encoder(net, build_projector(head, net.feature_dim, embedding_dim, hidden_dim))
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.queue = KeyQueue(queue_size, embedding_dim, queue_start)
        self.temperature = temperature
        self.symmetric = symmetric
        self.reduce_directions = torch.sum if symmetric_reduction == "sum" else torch.mean
        self.batch_norm = "plain"

    def setup(self, stage: str) -> None:
        """Put the batch-norm mode in force; before this (so for evaluation) BatchNorm is PyTorch's own."""
        devices = self.trainer.world_size
        self.batch_norm = batch_norm_mode(self.hparams["batch_norm"], self.query_encoder, devices)
        log_batch_norm(self.batch_norm, self.query_encoder, devices)
        if self.batch_norm == "split":
            split_batch_norm(self.query_encoder, self.hparams["batch_norm_splits"])
            split_batch_norm(self.key_encoder, self.hparams["batch_norm_splits"])

    def encode_query(self, images: Tensor) -> Tensor:
        """Embeddings (N, C), unit norm, of views (N, 3, H, W)."""
        return F.normalize(self.query_encoder(images).float(), dim=1)

    @torch.no_grad()
    def encode_key(self, images: Tensor) -> Tensor:
        """Keys (N, C), unit norm, no gradient, of views (N, 3, H, W); BatchNorm does not see them in their own batch."""
        if self.batch_norm == "plain":
            return F.normalize(self.key_encoder(images).float(), dim=1)
        images, order = shuffled_across(images)
        return unshuffled(F.normalize(self.key_encoder(images).float(), dim=1), order)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One batch of view pairs; returns the loss, and for the monitors what it was made of, of the last direction."""
        first, second = batch.views  # (N, 3, H, W) each
        directions = [(first, second), (second, first)] if self.symmetric else [(first, second)]
        negatives = self.queue.negatives()  # (K, C) unit norm
        losses, keys = [], []
        for query_view, key_view in directions:
            query = self.encode_query(query_view)  # (N, C) unit norm
            key = self.encode_key(key_view)  # (N, C) unit norm, no gradient
            losses.append(info_nce(query, key, negatives, self.temperature))
            keys.append(key)
        loss = self.reduce_directions(torch.stack(losses))
        self.queue.enqueue(all_gather(torch.cat(keys)))  # after the loss: a positive is never its own negative
        return {"loss": loss, "query": query.detach(), "key": key, "negatives": negatives}

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
        return build_optimizer(self.query_encoder.parameters(), **self.hparams["optimizer"])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch of the running training."""
        return -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole running training."""
        steps = (self.trainer.max_epochs or 1) * self.steps_per_epoch
        return steps if self.trainer.max_steps < 0 else min(steps, self.trainer.max_steps)

    def learning_rate_at(self, step: int) -> float:
        """A pure function of the optimizer step, counted from 0."""
        return learning_rate_at(step, self.num_steps, self.steps_per_epoch, **self.hparams["optimizer"])

    def key_momentum_at(self, step: int) -> float:
        """A pure function of the optimizer step, counted from 0."""
        hparams = self.hparams
        return key_momentum_at(
            step, self.num_steps, hparams["key_momentum"], hparams["key_momentum_end"], hparams["key_momentum_schedule"]
        )
