"""A linear classifier that learns beside the encoder, without a gradient into it."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.callbacks.running_trainer import data_of, is_logged_step, log_scalars
from moco.data.sources.source import DataSource
from moco.errors import InputError
from moco.evaluation.image_names import labels_by_name
from moco.evaluation.knn import refuse_several_classes
from moco.training.distributed.collectives import all_gather
from moco.training.stopwatches import MONITORS, epoch_time

UNKNOWN = -1
"""The class of an image without a label."""


class OnlineProbe(pl.Callback):
    """Train a linear classifier on the query encoder's features of each batch's first views.

    A batch is classified before the classifier learns from it, so the accuracy is on augmented
    views that the classifier has not seen; since it learned, the encoder has moved on. On several
    devices, every process learns the same from the features of all. The classifier draws no random
    numbers and reads detached features, so the run ends with the same weights, to the bit, as
    without it.

    Args:
        figures: gets ``probe/top1`` of the epoch and ``probe/epoch``.
        log_every_n_steps: optimizer steps between two points of ``probe/top1`` in the logger.
        lr: of Adam, on features that are standardised within the batch.
    """

    def __init__(self, figures: dict[str, Any], log_every_n_steps: int, lr: float = 1e-3) -> None:
        self.figures = figures
        self.log_every_n_steps = log_every_n_steps
        self.lr = lr
        self.feature: Any = None
        self.loaded: dict[str, Any] | None = None
        self.head: Any = None
        # On the device while training, so that adding to them does not wait for the device.
        self.right: Tensor | float = 0.0
        self.seen: Tensor | float = 0.0

    def state_dict(self) -> dict[str, Any]:
        if self.head is None:
            return {}
        # The sums are the same on every process.
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "right": float(self.right),
            "seen": float(self.seen),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict
        self.right = state_dict["right"]
        self.seen = state_dict["seen"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Find the labels before anything is computed.

        Raises:
            InputError: the training images have none.
        """
        self.labels = training_classes(data_of(trainer).source)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        encoder = pl_module.query_encoder
        num_classes = int(self.labels.max()) + 1
        # nn.Linear would draw its first weights, and change the random numbers of the run.
        head = nn.utils.skip_init(nn.Linear, encoder.backbone.feature_dim, num_classes)
        self.head = head.to(pl_module.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.Adam(self.head.parameters(), self.lr)
        if self.loaded:
            self.head.load_state_dict(self.loaded["head"])
            self.optimizer.load_state_dict(self.loaded["optimizer"])
        self.labels = self.labels.to(pl_module.device)
        # The feature is the projector's input. A hook on the backbone would miss it: with a dense
        # term the backbone is not called as a module.
        self.hook = encoder.projector.register_forward_pre_hook(self._keep)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.right = 0.0
        self.seen = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.feature = None

    def _keep(self, projector: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if projector.training and self.feature is None:
            self.feature = arguments[0].detach()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # If one pass took both views, the first view's features come first.
        feature = self.feature[: len(batch.indices)].float()  # (batch, feature_dim)
        is_known = feature.isfinite().all(dim=1) & ~batch.unreadable.to(feature.device)
        classes = self.labels[batch.indices.to(feature.device)].where(is_known, UNKNOWN)
        feature = feature.where(is_known[:, None], 0.0)
        self._learn(all_gather(feature), all_gather(classes))
        if is_logged_step(trainer, batch_idx, self.log_every_n_steps):
            log_scalars(trainer, {"probe/top1": self._accuracy()})

    @epoch_time.measured(MONITORS)
    def _learn(self, feature: Tensor, classes: Tensor) -> None:
        """Classify a batch, then take one step on it.

        Args:
            feature: (batch, feature_dim).
            classes: (batch,), `UNKNOWN` for an image without a class.
        """
        num_known = (classes != UNKNOWN).sum()
        with torch.enable_grad():
            # Standardised within the batch.
            logits = self.head(F.batch_norm(feature, None, None, training=True))
            loss = F.cross_entropy(logits, classes, ignore_index=UNKNOWN, reduction="sum")
            loss = loss / num_known.clamp(min=1)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.right = self.right + (logits.argmax(dim=1) == classes).sum()
        self.seen = self.seen + num_known

    def _accuracy(self) -> float:
        return float(self.right) / max(float(self.seen), 1.0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        accuracy = self._accuracy()
        self.figures["probe/top1"] = accuracy
        self.figures["probe/epoch"] = trainer.current_epoch + 1
        log_scalars(trainer, {"epoch/probe_top1": accuracy})

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.hook.remove()


def training_classes(source: DataSource) -> Tensor:
    """Return the class of every training image, (images,) int64.

    It is `UNKNOWN` for an image without a label, or that is held out of the bank.

    Raises:
        InputError: no training image has a class.
    """
    refuse_several_classes(source.bank, "evaluation.online_probe=true")
    classes = labels_by_name(source.train, source.bank)
    if not (classes >= 0).any():
        raise InputError("evaluation.online_probe=true: the training images have no labels")
    return torch.from_numpy(classes).long()
