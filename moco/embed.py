"""Features of any images: ``python -m moco.embed checkpoint=PATH [output=FILE.npz]``."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from moco.cli.checks import check_output, check_weights
from moco.cli.default_outputs import features_file
from moco.cli.launch import hydra_files, launch
from moco.config.pretrained import (
    EmbedConfig,
    data_settings,
    given_settings,
    with_defaults,
    with_usual_settings,
)
from moco.errors import InputError
from moco.phases import LOADING, phase


def run(config: EmbedConfig, folder: Path) -> None:
    """Write features and names of all images to an .npz file, and a faiss index beside it.

    Until all features are there, they lie in a folder beside the file, and the same command
    continues from there. `folder` keeps a record of the settings.

    Raises:
        InputError: the checkpoint or the data cannot be used, faiss has no such index, or the file
            cannot be written.
        RunError: features are not finite, or the machine ran out of memory or disk.
    """
    if config.output is not None:
        check_features_output(Path(config.output))
    check_weights(config.checkpoint)
    with phase(LOADING, unit=""):
        from moco.cli.closing_tables import print_plain, print_table
        from moco.data.augment.views import Normalized
        from moco.evaluation import embedding
        from moco.evaluation.indexes import empty_index
        from moco.evaluation.resumable_features import remove_parts, taken
        from moco.evaluation.subject import build_source_of
        from moco.runs.failures import failures_without_training_named
        from moco.runs.interrupts import ending_at_once
        from moco.runs.run_folder import claimed
        from moco.screen import screen
        from moco.training.hardware import choose_device
        from moco.weights.load_encoder import fit_to_data, load_pretrained

    device = choose_device(config.accelerator)
    given = given_settings(config.backbone)
    with phase("reading the checkpoint", unit=""):
        pretrained = load_pretrained(
            config.checkpoint,
            config.encoder,
            given,
            config.feature,
            trust_targets=config.trust_targets,
        )
    encoder: Any = pretrained.encoder
    if config.index != embedding.NO_INDEX and config.feature == "backbone":
        # What faiss refuses is refused before the images are embedded.
        empty_index(config.index, encoder.backbone.feature_dim, "index")
    run_settings = with_usual_settings(pretrained.config)
    data = data_settings(config, run_settings["data"])
    # The loader processes of the run say nothing about this machine.
    data["num_workers"] = config.data.num_workers
    transform = with_defaults(config.augmentation, run_settings["augmentation"])
    source = build_source_of(data, transform["mean"])
    images = embedding.choose_images(source, config.split, data["name"])
    values = source.train.values
    assert values is not None  # `build_source_of` sets them
    fit_to_data(pretrained, given, data["image_size"], values.bands)
    normalized = Normalized(**transform, bands=values.bands, is_float=values.is_float)
    encode = embedding.build_encode(encoder, config.feature, normalized, device)
    # A pass continues only with these same settings.
    settings = {
        "encoder": config.encoder,
        "feature": config.feature,
        "split": config.split,
        "batch_size": config.batch_size,
        "accelerator": device.type,
        "backbone": pretrained.settings,
        "augmentation": transform,
        "data": data,
        "values": values.described(),
    }
    if config.output is None:
        output = features_file(config.checkpoint, settings, folder)
        check_features_output(output)
    else:
        output = Path(config.output)
    console = screen.console
    parts_folder = output.with_name(f"{output.name}.part")
    kept = f"what is done is kept in {parts_folder}, and the same command goes on there"
    # An interruption or a full disk loses nothing, and the message says so.
    failures_named = failures_without_training_named("batch_size", kept)
    with taken(parts_folder), ending_at_once(), failures_named:
        parts = embedding.open_parts(parts_folder, settings, encoder, images)
        loader = embedding.load_images(images, parts, settings, device)
        with parts, phase("embedding", len(images), start=parts.num_done) as say:
            embedding.add_features(
                encode, loader, parts, len(images), data["max_bad_fraction"], say
            )
        if parts.state.num_rows == 0:
            raise InputError(f"data.root={data['root']}: no images in there")
        index = embedding.write_files(output, parts, config.index, images)
        duplicates = embedding.near_duplicates(parts, output)
        remove_parts(parts_folder)
    with (
        failures_without_training_named("batch_size"),
        claimed(folder, dataclasses.asdict(config), hydra_files()),
    ):
        pass  # a record of the settings
    rows = embedding.summary(settings, parts, images.has_labels, index)
    rows.append(("near-duplicates", duplicates))
    print_table(console, "Embedded", rows)
    names = os.path.relpath(output)
    if config.index != embedding.NO_INDEX:
        names += f" and {Path(names).with_suffix('.faiss')}"
    print_plain(console, f"written to {names}")


def check_features_output(output: Path) -> None:
    """Raise InputError if no features can be written to `output`."""
    if output.suffix != ".npz":
        raise InputError(f"output={output}: expected a file that ends in .npz")
    check_output(output)


def main() -> None:
    """Entry point of ``moco-embed``."""
    launch(run, "embed")


if __name__ == "__main__":
    main()
