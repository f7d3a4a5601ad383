"""Features of any pictures: ``python -m moco.embed checkpoint=PATH data=images data.root=PATH output=FILE.npz``."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.config.pretrained import EmbedConfig, given_settings, with_defaults, with_usual_settings
from moco.errors import InputError, printable
from moco.launch import launch, save_hydra_files
from moco.methods.pretrained import load_pretrained, log_window_advice

if TYPE_CHECKING:
    from moco.data.datasets import DataSource, Labelled

log = logging.getLogger("moco.embed")  # __name__ is __main__ under python -m


def run(config: EmbedConfig, folder: Path) -> None:
    """Write the file; `folder` keeps a record of the config.

    The file holds ``features`` (M, D) float32, not normalised, ``names`` (M,) of the pictures, files by their paths, and
    where the data set has them ``labels`` (M,) int64. Unreadable pictures are left out and named in the log.

    Raises:
        InputError: the checkpoint cannot be used, the data set has no such pictures, or the file cannot be written.
    """
    import numpy as np
    from rich.console import Console

    from moco.data.datamodule import check_unreadable
    from moco.data.datasets import build_source
    from moco.data.loading import evaluation_loader
    from moco.data.views import build_evaluation_view
    from moco.evaluation.features import embed
    from moco.training.hardware import choose_device
    from moco.training.progress import print_table
    from moco.training.run_folder import claimed, write_atomically

    output = Path(config.output)
    check_output(output)
    device = choose_device(config.accelerator)
    given = given_settings(config.backbone)
    pretrained = load_pretrained(config.checkpoint, config.encoder, given, config.feature)
    of_run = with_usual_settings(pretrained.config)
    data = with_defaults(config.data, of_run["data"], new_data=config.data.name is not None)
    if data["name"] is None:
        raise InputError(f"data: missing; {config.checkpoint} does not say it, give data=NAME")
    source = build_source(
        data["name"],
        data["root"],
        download=data["download"],
        num_images=data["num_images"],
        image_column=data["image_column"],
        label_column=data["label_column"],
        max_image_pixels=data["max_image_pixels"],
        held_out=data["held_out"],
        pages=data["pages"],
    )
    data["image_size"] = data["image_size"] or source.image_size
    log_window_advice(pretrained, given, data["image_size"])
    side, has_labels = pictures_of(source, config.split, data["name"])

    transform = with_defaults(config.augmentation, of_run["augmentation"])
    view = build_evaluation_view(data["image_size"], data["crop_ratio"], **transform)
    loader = evaluation_loader(side, view, data["image_size"], config.batch_size, data["num_workers"])
    encoder = pretrained.encoder.to(device)
    features, labels, unreadable = embed(lambda images: encoder.encode(images, config.feature), loader, device)
    bad = set(unreadable.tolist())
    for index in sorted(bad):
        log.warning("skipped %s: it cannot be read", printable(side.pictures.name(index)))
    check_unreadable(bad, side.pictures, data["max_bad_fraction"])
    names = np.array([side.pictures.name(index) for index in range(len(side.pictures)) if index not in bad])
    arrays: dict[str, Any] = {"features": features, "names": names} | ({"labels": labels} if has_labels else {})
    write_atomically(output, lambda file: np.savez(file, **arrays))
    with claimed(folder, dataclasses.asdict(config)):
        save_hydra_files(folder)

    console = Console()
    rows = [
        ("pictures", f"{len(features):,}, {config.split} of {data['name']}, {data['image_size']} px"),
        ("features", f"{config.feature} of the {config.encoder} encoder, {features.shape[1]} wide"),
        ("arrays", ", ".join(f"{name} {array.shape}" for name, array in arrays.items())),
    ]
    print_table(console, "Embedded", rows)
    console.print(f"written to {os.path.relpath(output)}", soft_wrap=True, highlight=False)


def check_output(output: Path) -> None:
    """Raises InputError if no .npz file can be written there."""
    if output.suffix != ".npz":
        raise InputError(f"output={output}: expected a file that ends in .npz")
    if output.is_dir():
        raise InputError(f"output={output}: a folder; expected the name of a file")
    existing = next(path for path in output.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"output={output}: cannot write to {existing}")


def pictures_of(source: "DataSource", split: str, name: str) -> "tuple[Labelled, bool]":
    """The pictures of a split, and whether they have labels; without, each is -1.

    Raises:
        InputError: the data set has none that are held out.
    """
    import numpy as np

    from moco.data.datasets import Labelled
    from moco.data.streams import NO_INDEX, ShardedPictures

    if isinstance(source.train, ShardedPictures):
        raise InputError(NO_INDEX)
    side = source.bank if split == "train" else source.queries
    if split == "test" and side is None:
        raise InputError(f"split=test: data={name} has no pictures that are held out")
    if side is not None and (split == "test" or len(side.pictures) == len(source.train)):
        return side, True
    return Labelled(source.train, np.full(len(source.train), -1)), False


def main() -> None:
    """Entry point of ``moco-embed``."""
    launch(run, EmbedConfig, "embed")


if __name__ == "__main__":
    main()
