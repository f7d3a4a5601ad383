"""TensorBoard events, written straight into the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from moco.errors import encodable
from moco.runs.config_changes import flattened
from moco.training.stopwatches import LOGGING, epoch_time


class RunLogger(TensorBoardLogger):
    """Lightning's logger without its sub-folders and without an empty ``hparams.yaml``.

    ``.hydra/config.yaml`` holds all settings.

    Args:
        folder: the run folder.
        purge_step: TensorBoard forgets what an earlier process wrote for this step and later ones,
            because the resumed run writes them again.
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
        # Lightning's own would turn an error of the disk into a ValueError about the metric.
        for name, value in metrics.items():
            self.experiment.add_scalar(encodable(name), float(value), step)

    @epoch_time.measured(LOGGING)
    def save(self) -> None:
        self.experiment.flush()

    def describe(
        self, config: Mapping[str, Any], metrics: Sequence[str], chosen: Sequence[str], step: int
    ) -> None:
        """Write the config as text, and as hyperparameters of this run in the HPARAMS tab.

        Lightning's `log_hyperparams` and TensorBoard's `add_hparams` would write values of the
        metrics, too, at step 0.

        Args:
            config: of the run, as plain data.
            metrics: scalars of the run, of which the tab shows the newest value.
            chosen: settings, or groups of settings, that the tab shows before the others.
        """
        text = yaml.safe_dump(dict(config), sort_keys=False)
        self.experiment.add_text("config", f"```yaml\n{text}```", step)
        experiment, session, _ = hparams(hyperparameters(config), dict.fromkeys(metrics, 0.0))
        plugin_data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin_data.content)
        # The tab puts settings that differ between runs first, and sorts the others by name.
        for info in content.experiment.hparam_infos:
            info.differs = f"{info.name}.".startswith(tuple(f"{key}." for key in chosen))
        plugin_data.content = content.SerializeToString()
        for summary in (experiment, session):
            self.experiment.file_writer.add_summary(summary, step)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, float | str]:
    """Return nested settings under dotted names: numbers as they are, the rest as text.

    Settings that are null are left out. A path that is not UTF-8 is shown with escapes.
    """
    flat: dict[str, float | str] = {}
    for name, value in flattened(config).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[name] = value
        elif value is not None:
            flat[name] = encodable(str(value))
    return flat


def given_keys(folder: Path) -> list[str]:
    """Return the settings and groups that the command line of the run in `folder` set."""
    path = folder / ".hydra" / "overrides.yaml"
    # A run that Python started has no command line.
    if not path.is_file():
        return []
    keys = [
        override.partition("=")[0] for override in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    return [key.lstrip("+~").replace("/", ".") for key in keys]
