"""The kNN accuracy of the encoder while it trains, as a Lightning callback."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.callbacks.epoch_measurement import EpochMeasurement
from moco.callbacks.feature_plots import FeaturePlots
from moco.callbacks.running_trainer import board_of, data_of, is_end, log_scalars
from moco.data.loading.datamodule import PretrainingData, check_unreadable
from moco.data.loading.every_image import EvaluationBatch, num_images
from moco.data.sources.source import Labelled
from moco.errors import InputError
from moco.evaluation.diagnostics import MOST_ROWS, evenly_spaced, rank_me
from moco.evaluation.features import EmbeddingStopped, embed, evaluating
from moco.evaluation.knn import KNNResult, knn_accuracy
from moco.evaluation.lost_queries import warn_of_lost, without_class_in_bank
from moco.evaluation.reports.embedded import Embedded
from moco.phases import counted, phase
from moco.runs.interrupts import measuring
from moco.training.board_layout import tag_of
from moco.training.distributed.collectives import (
    copy_from_rank_zero,
    from_rank_zero,
    gather_rows,
    largest,
    rank,
    world_size,
)
from moco.training.stopwatches import MONITORS, epoch_time

log = logging.getLogger(__name__)


class KNNMonitor(EpochMeasurement):
    """Measure the kNN accuracy of the query encoder every n epochs, on clean images in eval mode.

    The labelled images are those of `PretrainingData`. With any other data they are batches
    (images, labels): images (N, 3, H, W) float32, normalised as in training and not augmented, and
    labels (N,), whole numbers. They come from `bank` and `queries`, or else from the methods
    ``bank_dataloader()`` and ``query_dataloader()`` of the Trainer's data module. Every process of
    a training then embeds all images of both. ``knn/top1`` and ``knn/top5`` are metrics of the
    Trainer there, which other callbacks can monitor.

    Args:
        figures: gets ``knn/top1``, with at least five neighbours ``knn/top5``, for images with
            several classes each ``knn/mean_average_precision``, ``knn/epoch`` and
            the protocol. Baselines go to ``knn_raw_pixels/top1`` and to ``knn_untrained/top1``, or
            to ``knn_start/top1`` in a run that starts from given weights.
        bank: yields the batches of the labelled training images each time it is iterated over, such
            as a DataLoader without shuffling.
        queries: the same for the images that are classified.
        num_neighbors, temperature, feature, precision: the protocol, see `MonitorConfig`.
        every_n_epochs: epochs between two measurements.
        should_stop: asked before every batch. A measurement that it stops is repeated when the run
            resumes.
        baselines: also measure raw pixels and the encoder before the first step.
        is_untrained: the encoder starts from random weights.
        plots: draws the features of each measurement of `PretrainingData`.

    Raises:
        InputError: only one of `bank` and `queries` is given. When the training starts: the data
            module gives neither. In a measurement: they yield something else.

    Example:
        >>> monitor = moco.KNNMonitor(bank=DataLoader(train, 256), queries=DataLoader(test, 256))
        >>> Trainer(callbacks=[monitor]).fit(moco.MoCo("resnet18"), loader_of_pairs)
        >>> monitor.figures["knn/top1"]
    """

    def __init__(
        self,
        figures: dict[str, Any] | None = None,
        *,
        bank: Iterable[Any] | None = None,
        queries: Iterable[Any] | None = None,
        num_neighbors: int = 200,
        temperature: float = 0.1,
        feature: str = "backbone",
        precision: str = "32-true",
        every_n_epochs: int = 1,
        baselines: bool = False,
        is_untrained: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        plots: FeaturePlots | None = None,
    ) -> None:
        super().__init__({} if figures is None else figures, every_n_epochs, should_stop)
        if (bank is None) != (queries is None):
            raise InputError("KNNMonitor: expected both bank and queries, or neither")
        self.bank = bank
        self.queries = queries
        self.num_neighbors = num_neighbors
        self.temperature = temperature
        self.feature = feature
        self.precision = precision
        self.baselines = baselines
        self.is_untrained = is_untrained
        self.plots = plots
        self.resumed = False
        self.scores: dict[str, float] = {}
        """The latest accuracies."""

    def state_dict(self) -> dict[str, Any]:
        # Never empty: Lightning loads no empty state, and a resumed run would measure the
        # baselines again, on an encoder that is no longer untrained.
        return {"owed": self.owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.resumed = True

    @epoch_time.measured(MONITORS)
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.has_labelled_images(trainer):
            log.info(
                "no kNN: the dataset has no labelled training and test images; watch label_free/* "
                "instead: columns of metrics.csv in the run folder, and %s in TensorBoard",
                tag_of("label_free/*"),
            )
            return
        sizes = ""
        if self.is_of_loaders(trainer):
            self.loaders(trainer)  # an error before the training
        else:
            source = data_of(trainer).source
            assert source.bank is not None
            assert source.queries is not None
            sizes = (
                f", {len(source.queries.labels):,} queries "
                f"against a bank of {len(source.bank.labels):,}"
            )
            labels = source.queries.labels
            lost = without_class_in_bank(
                source.bank.targets_of(source.bank.labels), source.queries.targets_of(labels)
            )
            warn_of_lost(lost, labels, source.queries, is_leave_one_out=False)
        log.info(
            f"kNN every {self.every_n_epochs} epochs: k {self.num_neighbors}, "
            f"T {self.temperature}, {self.feature} feature{sizes}"
        )
        if self.baselines and not self.resumed:
            with measuring():
                self._measure_baselines(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.is_of_loaders(trainer):
            pl_module.log_dict(self.scores, logger=False)

    def is_of_loaders(self, trainer: pl.Trainer) -> bool:
        """Return whether the labelled images come in batches, and not from `PretrainingData`."""
        return self.bank is not None or not isinstance(data_of(trainer), PretrainingData)

    def loaders(self, trainer: pl.Trainer) -> tuple[Iterable[Any], Iterable[Any]]:
        """Return the batches of bank and queries of a training with other data.

        Raises:
            InputError: nobody gives any.
        """
        if self.bank is not None and self.queries is not None:
            return self.bank, self.queries
        data: Any = data_of(trainer)
        if not hasattr(data, "bank_dataloader") or not hasattr(data, "query_dataloader"):
            where = "there is no data module"
            if data is not None:
                where = f"{type(data).__name__} lacks bank_dataloader() or query_dataloader()"
            raise InputError(
                f"KNNMonitor: {where}; expected these two methods, or KNNMonitor(bank=loader, "
                "queries=loader), with batches (images, labels)"
            )
        return data.bank_dataloader(), data.query_dataloader()

    def has_labelled_images(self, trainer: pl.Trainer) -> bool:
        """Return whether there are a bank and queries."""
        if self.is_of_loaders(trainer):
            return True
        source = data_of(trainer).source
        return source.bank is not None and source.queries is not None

    def _measure_baselines(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pixels = self._result(trainer, pl_module, lambda images: images.flatten(1))
        start = self._result(trainer, pl_module, self._encoding(pl_module))
        key, encoder = "knn_start/top1", "the weights of init_from"
        if self.is_untrained:
            key, encoder = "knn_untrained/top1", "untrained backbone"
        self.figures |= {"knn_raw_pixels/top1": pixels.top1, key: start.top1}
        log.info("kNN before training: raw pixels %.4f, %s %.4f", pixels.top1, encoder, start.top1)

    def measure(self, trainer: pl.Trainer, pl_module: Any, epoch: int) -> None:
        if not self.has_labelled_images(trainer):
            return
        try:
            result = self._result(trainer, pl_module, self._encoding(pl_module), epoch)
        except EmbeddingStopped:
            self.owed = True
            return
        self.owed = False
        # If k was capped, one warning is enough.
        self.num_neighbors = result.num_neighbors
        scores = {"knn/top1": result.top1}
        # An earlier part of the run may have left a top-5; with k below 5 there is none now.
        self.figures.pop("knn/top5", None)
        if result.top5 is not None:
            scores["knn/top5"] = result.top5
        if result.mean_average_precision is not None:
            scores["knn/mean_average_precision"] = result.mean_average_precision
        self.scores = scores
        self.figures |= {
            **scores,
            "knn/epoch": epoch,
            "knn/num_neighbors": result.num_neighbors,
            "knn/temperature": self.temperature,
            "knn/feature": self.feature,
            "knn/bank_size": result.bank_size,
            "knn/num_queries": result.num_queries,
            "knn/precision": self.precision,
        }
        log_scalars(trainer, scores)

    def _encoding(self, pl_module: Any) -> Callable[[Tensor], Tensor]:
        return lambda images: pl_module.query_encoder.encode(images, self.feature)

    def _result(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        encode: Callable[[Tensor], Tensor],
        epoch: int | None = None,
    ) -> KNNResult:
        """Embed bank and queries on all processes, then classify on rank 0.

        Args:
            encode: images (batch, channels, height, width) to features (batch, feature_dim).
            epoch: of which the features are plotted; None: they are not.

        Raises:
            EmbeddingStopped: `should_stop` stopped it, on every process.
            InputError: too many images could not be read.
        """
        # Each process has running statistics of its own. Rank 0's are in the checkpoint, so they
        # are the ones that are measured.
        copy_from_rank_zero([*pl_module.query_encoder.buffers()])
        device = pl_module.device
        if self.is_of_loaders(trainer):
            with evaluating(pl_module):
                bank_loader, query_loader = self.loaders(trainer)
                bank_side = self._embedded(bank_loader, encode, device, "kNN: bank")
                sides = [bank_side, self._embedded(query_loader, encode, device, "kNN: queries")]
            if epoch is not None:
                self._show_rank(trainer, sides[0][0])
            return self._classified(sides[0], sides[1], device)
        data = data_of(trainer)

        def embedded(labelled: Any, title: str) -> Embedded:
            loader = data.evaluation_dataloader(labelled)
            total = math.ceil(len(labelled.labels) / world_size())
            batches = counted(loader, title, total, size=num_images)
            how = device, self.should_stop, self.precision
            return embed_together(labelled, encode, batches, *how)

        with evaluating(pl_module):
            bank = embedded(data.source.bank, "kNN: bank")
            queries = embedded(data.source.queries, "kNN: queries")

        def search() -> KNNResult:
            for side in (bank, queries):
                check_unreadable(side.unreadable(), side.labelled.images, data.max_bad_fraction)
            if epoch is not None:
                self._show(trainer, epoch, bank, queries)
            return self._classified(
                (bank.features, bank.targets), (queries.features, queries.targets), device
            )

        return from_rank_zero(search)

    def _embedded(
        self,
        loader: Iterable[Any],
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        title: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return features (images, feature_dim) and labels (images,) of a loader's batches."""
        batches = counted(plain_batches(loader), title, size=num_images)
        features, labels, _ = embed(encode, batches, device, self.should_stop, self.precision)
        if len(labels) == 0:
            raise InputError("KNNMonitor: bank or queries yield no images")
        return features, labels

    def _classified(
        self,
        bank: tuple[np.ndarray, np.ndarray],
        queries: tuple[np.ndarray, np.ndarray],
        device: torch.device,
    ) -> KNNResult:
        """Classify the queries; each side is features and labels."""
        arrays = (*bank, *queries)
        with phase("kNN: searching", unit=""):
            try:
                return knn_accuracy(*arrays, self.num_neighbors, self.temperature, device)
            except torch.OutOfMemoryError:
                log.info("kNN: searching on the CPU, because training leaves too little GPU memory")
            return knn_accuracy(*arrays, self.num_neighbors, self.temperature, "cpu")

    def _show(self, trainer: pl.Trainer, epoch: int, bank: Embedded, queries: Embedded) -> None:
        """Log what the features show beside the scores; on rank 0 alone."""
        self._show_rank(trainer, bank.features)
        experiment = board_of(trainer)
        if self.plots is None or experiment is None:
            return
        is_last = is_end(trainer, epoch)
        if self.plots.is_due(epoch, max(0, epoch - self.every_n_epochs), is_last):
            k = min(self.num_neighbors, len(bank.rows))
            with phase("kNN: plots", unit=""):
                self.plots.draw(experiment, trainer.global_step, bank, queries, k, self.temperature)
        if is_last and self.plots.projector_images:
            with phase("embedding projector", unit=""):
                self.plots.project(experiment, queries)

    def _show_rank(self, trainer: pl.Trainer, features: np.ndarray) -> None:
        if trainer.logger is not None:
            effective_rank = rank_me(torch.from_numpy(evenly_spaced(features, MOST_ROWS)))
            log_scalars(trainer, {"label_free/feature_rank_me": effective_rank})


def plain_batches(loader: Iterable[Any]) -> Iterator[EvaluationBatch]:
    """Yield the batches (images, labels) of any loader as those of this project.

    Raises:
        InputError: a batch is something else.
    """
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise InputError(
                f"KNNMonitor: bank or queries yield a {type(batch).__name__}; "
                "expected batches (images, labels)"
            )
        images = batch[0]
        labels = torch.as_tensor(batch[1]).reshape(-1).long().cpu()
        if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != len(labels):
            shape = getattr(images, "shape", type(images).__name__)
            raise InputError(
                f"KNNMonitor: expected images (N, 3, H, W) and labels (N,), got {shape} and "
                f"{len(labels)} labels"
            )
        yield EvaluationBatch(images, labels, torch.zeros(len(labels), dtype=torch.bool))


def embed_together(labelled: Labelled, *arguments: Any) -> Embedded:
    """Embed a dataset: each process embeds its own images, and rank 0 gets all features.

    Args:
        labelled: the dataset.
        arguments: those of `embed`. Of n processes, each loader yields every n-th image, from the
            process's rank on.

    Returns:
        On rank 0 the features of all readable images, in their order; on the others no rows.

    Raises:
        EmbeddingStopped: `should_stop` stopped it on any process.
    """
    stopped = False
    try:
        features, labels, rows = embed(*arguments)
    except EmbeddingStopped:
        stopped = True
    if largest([stopped])[0]:
        raise EmbeddingStopped
    # Image i of this process is image i * world_size + rank of the dataset.
    rows = gather_rows(rows * world_size() + rank())
    features, labels = gather_rows(features), gather_rows(labels)
    if world_size() > 1:
        order = rows.argsort()
        features, labels, rows = features[order], labels[order], rows[order]
    return Embedded(features, labels, labelled, rows)
