"""Semantic segmentation: ``python -m moco.segment checkpoint=PATH data.root=PATH``."""

import dataclasses
import logging
from pathlib import Path

from moco.cli.checks import check_run
from moco.cli.launch import launch, save_hydra_files
from moco.config.segment import SegmentConfig
from moco.config.train import TrainerConfig
from moco.errors import InputError

log = logging.getLogger("moco.segment")  # __name__ is __main__ under python -m


def run(config: SegmentConfig, folder: Path) -> None:
    """Train as configured, in `folder`.

    Raises:
        InputError: something in the config does not fit the checkpoint, the data or the folder.
        RunError: training failed.
        Interrupted: a signal ended the run, and its checkpoint is saved.
    """
    check_run(config.resume, config.trainer)
    check_trainer(config.trainer)

    # These imports take seconds. A help page and the mistakes above do not wait for them.
    import pytorch_lightning as pl
    from rich.console import Console

    from moco.cli.build_segmentation import (
        backbone_origin,
        build_data,
        build_segmenter,
        build_trainer,
        check_decoder,
        check_resumable,
    )
    from moco.cli.closing_tables import print_segmentation
    from moco.cli.starting_backbone import find_backbone
    from moco.runs.atomic_files import write_json
    from moco.runs.failures import failures_named
    from moco.runs.interrupts import StopRequest
    from moco.runs.run_folder import claimed, find_checkpoint, is_finished
    from moco.runs.slurm import stop_signals

    pl.seed_everything(config.seed, verbose=False)
    start = find_backbone(config)
    config.image_size = start.image_size
    decoder = check_decoder(config, start)
    data = build_data(config, start)
    segmenter = build_segmenter(config, start, decoder, data.source.class_names)

    plain = dataclasses.asdict(config)
    defaults = dataclasses.asdict(SegmentConfig())
    if is_finished(folder, plain, defaults):
        log.info("%s is finished; a larger trainer.max_epochs goes on", folder)
        return
    checkpoint = find_checkpoint(folder, plain, config.resume, defaults)
    if checkpoint is not None:
        check_resumable(checkpoint, segmenter)
        log.info("going on from %s", checkpoint)

    figures = backbone_origin(config, start)
    console = Console()
    with StopRequest(stop_signals(config.slurm.signal)) as stop:
        trainer = build_trainer(config, folder, figures, console, stop)
        with failures_named(folder), claimed(folder, plain):
            save_hydra_files(folder)
            # A second time, because the folder's status has to hold the same line.
            with failures_named(folder):
                trainer.fit(
                    segmenter,
                    datamodule=data,
                    ckpt_path=None if checkpoint is None else str(checkpoint),
                    weights_only=True,
                )
            write_json(folder / "metrics.json", figures)
    print_segmentation(console, folder, figures, data.source.class_names)


def check_trainer(trainer: TrainerConfig) -> None:
    """Raise InputError for a Trainer setting that moco.segment does not support."""
    if trainer.devices * trainer.num_nodes > 1:
        raise InputError(f"trainer.devices={trainer.devices}: moco.segment trains on one device")
    for key in ("compile", "cuda_graphs"):
        if getattr(trainer, key):
            raise InputError(
                f"trainer.{key}=true: moco.segment does not compile its model; expected false"
            )


def main() -> None:
    """Run the command ``moco-segment``."""
    launch(run, SegmentConfig, "segment")


if __name__ == "__main__":
    main()
