"""TensorBoard events straight in the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams


class RunLogger(TensorBoardLogger):
    """Lightning's logger without its sub-folders and its empty ``hparams.yaml``: ``.hydra/config.yaml`` has them all.

    Args:
        folder: the run folder.
        purge_step: TensorBoard forgets what an earlier process wrote for this step and later ones, which come again.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        super().__init__(save_dir=str(folder), name="", version="", default_hp_metric=False, purge_step=purge_step)

    def save(self) -> None:
        self.experiment.flush()

    def describe(self, config: Mapping[str, Any], metrics: Sequence[str], step: int) -> None:
        """The config as text, and as hyperparameters of this very run, beside whose metrics the HPARAMS tab shows them.

        Lightning's `log_hyperparams` would write the metrics, too, at step 0.

        Args:
            config: the run's, as plain data.
            metrics: scalars of the run, of which the tab shows the newest value.
        """
        text = yaml.safe_dump(dict(config), sort_keys=False)
        self.experiment.add_text("config", f"```yaml\n{text}```", step)
        for summary in hparams(hyperparameters(config), dict.fromkeys(metrics, 0.0)):
            self.experiment._get_file_writer().add_summary(summary, step)


def hyperparameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; a list as its text, and nothing of what is null."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= hyperparameters(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


class RunDescription(pl.Callback):
    """Writes what the run is when it starts, and again when it goes on.

    Args:
        config: the run's, as plain data.
        metrics: see `RunLogger.describe`.
    """

    def __init__(self, config: Mapping[str, Any], metrics: Sequence[str]) -> None:
        self.config = config
        self.metrics = metrics

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.describe(self.config, self.metrics, trainer.global_step)
