"""Pretrain a backbone: ``python -m moco.train +experiment=NAME [key=value ...]``."""

from pathlib import Path

from moco.cli.checks import check_pretraining
from moco.cli.launch import hydra_files, launch
from moco.config.train import TrainConfig
from moco.errors import RunError

# torch and Lightning are imported inside the functions: a mistake in the config shows in a second.


def run(config: TrainConfig, folder: Path) -> None:
    """Train as configured in the run folder `folder`, with one process per device.

    Raises:
        InputError: something in the config does not fit the data or the folder.
        RunError: the training failed.
        Interrupted: a signal ended it; the checkpoint is saved.
    """
    check_pretraining(config, folder)

    from moco.cli.build_pretraining import build_data

    data = build_data(config, folder)

    from moco.cli.pretraining import Given, fill_in_from_data, train, train_in_new_process
    from moco.cli.training_run import Run
    from moco.runs.interrupts import StopRequest
    from moco.runs.run_status import state_now, write_ending
    from moco.runs.slurm import stop_signals
    from moco.training.distributed.collectives import environment_of
    from moco.training.distributed.processes import run_on_devices, starts_its_own

    fill_in_from_data(config, data)
    devices = config.trainer.devices
    environment = environment_of(devices, config.trainer.num_nodes)
    arguments = (config, folder, hydra_files())
    with StopRequest(stop_signals(config.slurm.signal)) as stop:
        if Run(config, folder, stop).is_finished():
            return
        if not starts_its_own(environment, devices):
            train(*arguments, stop, Given(data))
            return
        try:
            run_on_devices(train_in_new_process, arguments, devices, stop, folder)
        except RunError as error:
            if state_now(folder) == "crashed":  # no process was left to write it down
                write_ending(folder, error)
            raise


def main() -> None:
    """Entry point of ``moco-train``."""
    launch(run, "train")


if __name__ == "__main__":
    main()
