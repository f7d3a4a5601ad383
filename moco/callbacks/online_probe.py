"""A linear classifier that learns beside the encoder, from its features and without a gradient into it.

Letters: N batch, D feature width, C classes.
"""

import logging
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.callbacks.running_trainer import data_of
from moco.data.sources.registry import DataSource
from moco.errors import InputError
from moco.training.distributed.collectives import all_gather
from moco.training.stopwatches import MONITORS, epoch_time

log = logging.getLogger(__name__)


class OnlineProbe(pl.Callback):
    """Learns from the query encoder's backbone features of each training batch, in their first view.

    A batch is classified before it is learned from, so the accuracy is on augmented views that the head has not seen; the
    encoder has moved on since the head learned of them. Over several devices every process learns the same from the
    features of all. The head draws no random numbers and reads detached features, so the run's weights are to the bit those
    of a run without it.

    Args:
        figures: gets ``probe/top1`` of the epoch and ``probe/epoch``.
        log_every_n_steps: optimizer steps between two points of ``probe/top1`` in the logger.
        lr: of Adam, on features that are standardised within the batch.
    """

    def __init__(self, figures: dict[str, Any], log_every_n_steps: int, lr: float = 1e-3) -> None:
        self.figures = figures
        self.log_every_n_steps = log_every_n_steps
        self.lr = lr
        self.feature: Tensor | None = None
        self.loaded: dict[str, Any] | None = None
        self.head: nn.Linear | None = None
        # Tensors on the device while training: adding to them does not wait for the device.
        self.right: Tensor | float = 0.0
        self.seen: Tensor | float = 0.0

    def state_dict(self) -> dict[str, Any]:
        if self.head is None:
            return {}
        sums = {"right": float(self.right), "seen": float(self.seen)}  # the same on every process
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(), **sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict
        self.right, self.seen = state_dict["right"], state_dict["seen"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the labels, before anything is computed.

        Raises:
            InputError: the training images have none.
        """
        self.labels = training_classes(data_of(trainer).source)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        encoder = pl_module.query_encoder
        # Not nn.Linear's own first weights: they are random, and the run's draws are to stay what they are.
        head = nn.utils.skip_init(
            nn.Linear, encoder.backbone.feature_dim, int(self.labels.max()) + 1
        )
        self.head = head.requires_grad_(False).to(pl_module.device)
        self.head.weight.zero_()
        self.head.bias.zero_()
        self.head.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.head.parameters(), self.lr)
        if self.loaded:
            self.head.load_state_dict(self.loaded["head"])
            self.optimizer.load_state_dict(self.loaded["optimizer"])
        self.labels = self.labels.to(pl_module.device)
        # The projector's input: with a dense term the backbone itself is not called as a module.
        self.hook = encoder.projector.register_forward_pre_hook(self._keep)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.right, self.seen = 0.0, 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.feature = None

    def _keep(self, projector: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if projector.training and self.feature is None:
            self.feature = arguments[0].detach()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self.feature is not None
        feature = self.feature[
            : len(batch.indices)
        ].float()  # of the first view, where one pass took both
        is_known = feature.isfinite().all(dim=1) & ~batch.unreadable.to(feature.device)
        classes = self.labels[batch.indices.to(feature.device)].where(is_known, -1)
        self._learn(all_gather(feature.where(is_known[:, None], 0.0)), all_gather(classes))
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.log_every_n_steps == 0 and trainer.logger:
            trainer.logger.log_metrics({"probe/top1": self._accuracy()}, step=trainer.global_step)

    @epoch_time.measured(MONITORS)
    def _learn(self, feature: Tensor, classes: Tensor) -> None:
        """One step on features (N, D) of classes (N,), -1 where there is none."""
        assert self.head is not None
        with torch.enable_grad(), torch.autocast(feature.device.type, enabled=False):
            logits = self.head(standardised(feature))
            loss = F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum")
            loss = loss / (classes >= 0).sum().clamp(min=1)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.right = self.right + (logits.argmax(dim=1) == classes).sum()
        self.seen = self.seen + (classes >= 0).sum()

    def _accuracy(self) -> float:
        return float(self.right) / max(float(self.seen), 1.0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.figures |= {"probe/top1": self._accuracy(), "probe/epoch": trainer.current_epoch + 1}
        if trainer.logger:
            trainer.logger.log_metrics(
                {"epoch/probe_top1": self._accuracy()}, step=trainer.global_step
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hook.remove()


def standardised(feature: Tensor) -> Tensor:
    """Each dimension of (N, D) to mean 0 and standard deviation 1 over the batch."""
    return (feature - feature.mean(dim=0)) / (feature.var(dim=0, correction=0) + 1e-5).sqrt()


def training_classes(source: DataSource) -> Tensor:
    """The class of every training image (M,) int64, -1 where it has none or is held out of the bank.

    Raises:
        InputError: none has one.
    """
    classes = np.full(len(source.train), -1)
    if source.bank is not None and len(source.bank.images) == len(source.train):
        classes = source.bank.labels
    elif source.bank is not None:
        named = {
            source.bank.images.name(row): label for row, label in enumerate(source.bank.labels)
        }
        classes = np.array(
            [named.get(source.train.name(row), -1) for row in range(len(source.train))]
        )
    if not (classes >= 0).any():
        raise InputError("evaluation.online_probe=true: the training images have no labels")
    return torch.from_numpy(classes).long()
