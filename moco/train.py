"""Pretrain a backbone: ``python -m moco.train +experiment=NAME [key=value ...]``."""

import dataclasses
import logging
from functools import partial
from pathlib import Path

from moco.cli.build_pretraining import build_data
from moco.cli.checks import check_devices, check_optimizer, check_run
from moco.cli.launch import hydra_files, launch
from moco.cli.resuming import DEFAULTS
from moco.config.train import TrainConfig
from moco.errors import InputError, RunError
from moco.runs.run_folder import has_checkpoint

log = logging.getLogger("moco.train")  # __name__ is __main__ under python -m

# torch and Lightning are imported inside the functions: a mistake in the config shows in a second.


def run(config: TrainConfig, folder: Path) -> None:
    """Train as configured in the run folder `folder`, with one process per device.

    Raises:
        InputError: something in the config does not fit the data or the folder.
        RunError: the training failed.
        Interrupted: a signal ended it; the checkpoint is saved.
    """
    check_run(config.resume, config.trainer)
    check_optimizer(config.optimizer)
    check_devices(config.trainer)
    if config.init_from and not Path(config.init_from).is_file() and not has_checkpoint(folder):
        raise InputError(f"init_from={config.init_from}: no such file")
    data = build_data(config, folder)
    config.data.image_size = data.image_size

    from moco.cli.pretraining import train, train_in_new_process
    from moco.runs.interrupts import StopRequest
    from moco.runs.run_folder import is_finished, last_good, write_ending
    from moco.runs.run_status import state_now
    from moco.runs.slurm import stop_signals
    from moco.training.distributed.collectives import environment_of
    from moco.training.distributed.processes import run_on_devices, starts_its_own

    if is_finished(folder, dataclasses.asdict(config), DEFAULTS):
        log.info("%s is finished; a larger trainer.max_epochs goes on", folder)
        return
    devices = config.trainer.devices
    environment = environment_of(devices, config.trainer.num_nodes)
    arguments = (config, folder, hydra_files())
    with StopRequest(stop_signals(config.slurm.signal)) as stop:
        if not starts_its_own(environment, devices):
            train(*arguments, stop, data)
            return
        try:
            last_checkpoint = partial(last_good, folder)
            run_on_devices(train_in_new_process, arguments, devices, stop, last_checkpoint)
        except RunError as error:
            if state_now(folder) == "crashed":  # no process was left to write it down
                write_ending(folder, error)
            raise


def main() -> None:
    """Entry point of ``moco-train``."""
    launch(run, TrainConfig, "train")


if __name__ == "__main__":
    main()
