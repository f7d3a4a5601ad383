"""Semantic segmentation: ``python -m moco.segment checkpoint=PATH data.root=PATH``."""

from contextlib import ExitStack
from pathlib import Path

from moco.cli.checks import check_run
from moco.cli.launch import hydra_files, launch
from moco.config.segment import SegmentConfig
from moco.config.train import TrainerConfig
from moco.errors import InputError


def run(config: SegmentConfig, folder: Path) -> None:
    """Train as configured, in `folder`.

    Raises:
        InputError: something in the config does not fit the checkpoint, the data or the folder.
        RunError: training failed.
        Interrupted: a signal ended the run, and its checkpoint is saved.
    """
    check_run(config)
    check_trainer(config.trainer)

    # These imports take seconds. A help page and the mistakes above do not wait for them.
    import pytorch_lightning as pl

    from moco.cli.build_segmentation import (
        backbone_origin,
        build_data,
        build_segmenter,
        build_trainer,
        check_decoder,
        decoder_origin,
        tensor_settings,
    )
    from moco.cli.closing_tables import print_segmentation
    from moco.cli.starting_backbone import find_backbone, with_bands
    from moco.cli.training_run import Run, fit, take_folder
    from moco.runs.atomic_files import write_json
    from moco.runs.failures import failures_named
    from moco.runs.interrupts import StopRequest
    from moco.runs.run_folder import find_checkpoint
    from moco.runs.slurm import stop_signals
    from moco.runs.training_set import training_set

    pl.seed_everything(config.seed, verbose=False)
    start = find_backbone(config)
    config.image_size = start.image_size
    decoder = check_decoder(config, start)
    data = build_data(config, start)
    values = data.source.train.images.values
    assert values is not None  # `build_data` sets them
    start = with_bands(start, values.bands)
    class_names = data.source.class_names
    segmenter = build_segmenter(config, start, decoder, class_names)
    with (
        StopRequest(stop_signals(config.slurm.signal)) as stop,
        failures_named(folder),
        ExitStack() as stack,
    ):
        origin = backbone_origin(config, start) | decoder_origin(decoder)
        run = Run(config, folder, stop, hydra_files(), figures=origin)
        if run.is_finished():
            return
        try:
            checkpoint = find_checkpoint(folder, run.plain, run.defaults)
        except InputError as error:
            raise InputError(f"{error}{way_to_measure(config, folder)}") from error
        train = data.source.train
        run.training_set = training_set(
            train.images.files, len(train), config.data.batch_size, config.data.root
        )
        resumed = take_folder(run, stack, checkpoint, segmenter.hparams, tensor_settings)
        trainer = build_trainer(run, resumed)
        # A second time, because the folder's status has to hold the same line.
        with failures_named(folder):
            fit(run, trainer, segmenter, data, checkpoint)
            write_json(folder / "metrics.json", run.figures)
    print_segmentation(run, class_names)


def way_to_measure(config: SegmentConfig, folder: Path) -> str:
    """Return how a finished run in `folder` is measured with these settings, without training.

    It is empty for a run that is not finished, or whose dataset and inference are the same.
    """
    import yaml

    from moco.runs.run_folder import CONFIG, LAST_CHECKPOINT, as_override
    from moco.runs.run_status import read_status

    if (read_status(folder) or {}).get("state") != "finished":
        return ""
    there = yaml.safe_load((folder / CONFIG).read_text())
    words = []
    if config.inference != there["inference"]:
        words.append(as_override("evaluation.inference", config.inference))
    if config.data.name != there["data"]["name"]:
        words.append(as_override("data", config.data.name))
    if config.data.root != there["data"]["root"]:
        words.append(as_override("data.root", str(config.data.root)))
    if not words:
        return ""
    checkpoint = as_override("checkpoint", folder / LAST_CHECKPOINT)
    return (
        ". To measure the finished run so, without training: python -m moco.evaluate "
        f"{checkpoint} evaluation=segmentation {' '.join(words)}"
    )


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
    launch(run, "segment")


if __name__ == "__main__":
    main()
