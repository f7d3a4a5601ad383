"""The end of a sweep: the table of all its jobs."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from moco.errors import printable
from moco.runs.shell_quotes import shell_quoted


class PrintTable(Callback):
    """Hydra callback that prints the table of a sweep when its last job has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from moco.cli.sweep_table import as_text, find_jobs

        folder = Path(config.hydra.sweep.dir)
        print(printable(f"the sweep is done: {folder}"))
        print(as_text(find_jobs(folder)))
        print(f"next: python -m moco.sweep {shell_quoted(str(folder))} --csv sweep.csv")
