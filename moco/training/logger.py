"""TensorBoard events straight in the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from moco.training.stopwatches import LOGGING, epoch_time


class RunLogger(TensorBoardLogger):
    """Lightning's logger without its sub-folders and its empty ``hparams.yaml``: ``.hydra/config.yaml`` has them all.

    Args:
        folder: the run folder.
        purge_step: TensorBoard forgets what an earlier process wrote for this step and later ones, which come again.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        super().__init__(
            save_dir=str(folder),
            name="",
            version="",
            default_hp_metric=False,
            purge_step=purge_step,
        )

    @rank_zero_only
    @epoch_time.measured(LOGGING)
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All scalars of a step in one event, where Lightning writes one each."""
        values = [
            Summary.Value(tag=tag, simple_value=float(value)) for tag, value in metrics.items()
        ]
        self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    @epoch_time.measured(LOGGING)
    def save(self) -> None:
        self.experiment.flush()

    def describe(
        self, config: Mapping[str, Any], metrics: Sequence[str], chosen: Sequence[str], step: int
    ) -> None:
        """The config as text, and as hyperparameters of this very run in the HPARAMS tab.

        Lightning's `log_hyperparams` would write values of the metrics too, at step 0.

        Args:
            config: the run's, as plain data.
            metrics: scalars of the run, of which the tab shows the newest value.
            chosen: keys, or groups of keys, that the tab shows before the others: it sorts by name what does not differ.
        """
        text = yaml.safe_dump(dict(config), sort_keys=False)
        self.experiment.add_text("config", f"```yaml\n{text}```", step)
        experiment, session, _ = hparams(hyperparameters(config), dict.fromkeys(metrics, 0.0))
        plugin_data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin_data.content)
        for info in content.experiment.hparam_infos:
            info.differs = is_below(info.name, chosen)
        plugin_data.content = content.SerializeToString()
        for summary in (experiment, session):
            self.experiment._get_file_writer().add_summary(summary, step)


def hyperparameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, float | str]:
    """Nested settings under dotted names: numbers, and as text what is none. Without those that are null."""
    flat: dict[str, float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= hyperparameters(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
        elif value is not None:
            flat[prefix + key] = str(value)
    return flat


def is_below(name: str, keys: Sequence[str]) -> bool:
    """Whether a dotted name is one of the keys, or within one."""
    return any(name == key or name.startswith(f"{key}.") for key in keys)


class RunDescription(pl.Callback):
    """Writes what the run is when it starts, and again when it goes on.

    Args:
        folder: the run folder; what was given on the command line comes from its ``.hydra/overrides.yaml``.
        config: the run's, as plain data.
        metrics: see `RunLogger.describe`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], metrics: Sequence[str]) -> None:
        self.folder = folder
        self.config = config
        self.metrics = metrics

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.describe(
                self.config, self.metrics, given_keys(self.folder), trainer.global_step
            )


def given_keys(folder: Path) -> list[str]:
    """The keys and groups that the command line of the run in `folder` set."""
    path = folder / ".hydra" / "overrides.yaml"
    overrides = (
        yaml.safe_load(path.read_text()) if path.is_file() else []
    )  # not of a run from Python
    return [override.partition("=")[0].lstrip("+~").replace("/", ".") for override in overrides]
