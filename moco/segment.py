"""Semantic segmentation: ``python -m moco.segment checkpoint=PATH data.root=PATH``."""

from contextlib import ExitStack
from pathlib import Path

from moco.cli.checks import check_segmentation
from moco.cli.launch import hydra_files, launch
from moco.config.segment import SegmentConfig
from moco.errors import InputError


def run(config: SegmentConfig, folder: Path) -> None:
    """Train as configured, in `folder`.

    Raises:
        InputError: something in the config does not fit the checkpoint, the data or the folder.
        RunError: training failed.
        Interrupted: a signal ended the run, and its checkpoint is saved.
    """
    check_segmentation(config)

    # These imports take seconds. A help page and the mistakes above do not wait for them.
    import pytorch_lightning as pl

    from moco.cli.build_segmentation import (
        backbone_origin,
        build_data,
        build_segmenter,
        build_trainer,
        check_decoder,
        decoder_origin,
        images_of_run,
        images_origin,
        tensor_settings,
    )
    from moco.cli.closing_tables import print_segmentation
    from moco.cli.resuming import way_to_measure
    from moco.cli.segmentation_panel import print_segmentation_start
    from moco.cli.segmentation_settings import resolved_class_weights, write_drawn_images
    from moco.cli.starting_backbone import find_backbone, with_bands
    from moco.cli.training_run import Run, fit, take_folder
    from moco.runs.atomic_files import write_json
    from moco.runs.failures import failures_named
    from moco.runs.interrupts import StopRequest
    from moco.runs.run_folder import find_checkpoint
    from moco.runs.slurm import stop_signals

    pl.seed_everything(config.seed, verbose=False)
    start = find_backbone(config)
    config.image_size = start.image_size
    decoder = check_decoder(config, start)
    data = build_data(config, start)
    values = data.source.train.images.values
    assert values is not None  # `build_data` sets them
    start = with_bands(start, values.bands)
    class_names = data.source.class_names
    class_weights = resolved_class_weights(config.class_weights, data.source)
    segmenter = build_segmenter(config, start, decoder, class_names, class_weights)
    with (
        StopRequest(stop_signals(config.slurm.signal)) as stop,
        failures_named(folder),
        ExitStack() as stack,
    ):
        origin = backbone_origin(config, start) | images_origin(config, data)
        origin |= decoder_origin(decoder)
        run = Run(config, folder, stop, hydra_files(), figures=origin)
        if run.is_finished():
            return
        try:
            checkpoint = find_checkpoint(folder, run.plain, run.defaults)
        except InputError as error:
            raise InputError(f"{error}{way_to_measure(config, folder)}") from error
        run.training_set = images_of_run(config, data)
        resumed = take_folder(run, stack, checkpoint, segmenter.hparams, tensor_settings)
        write_drawn_images(folder, data.source, config.data.root)
        trainer = build_trainer(run, resumed)
        print_segmentation_start(run, trainer, segmenter, data, resumed)
        # A second time, because the folder's status has to hold the same line.
        with failures_named(folder):
            fit(run, trainer, segmenter, data, checkpoint)
            write_json(folder / "metrics.json", run.figures)
    print_segmentation(run, class_names)


def main() -> None:
    """Run the command ``moco-segment``."""
    launch(run, "segment")


if __name__ == "__main__":
    main()
