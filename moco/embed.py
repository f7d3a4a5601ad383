"""Features of any images: ``python -m moco.embed checkpoint=PATH data=images data.root=PATH output=FILE.npz``."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.checks import check_output
from moco.cli.launch import launch, save_hydra_files
from moco.config.pretrained import EmbedConfig, given_settings, with_defaults, with_usual_settings
from moco.errors import InputError, RunError, printable
from moco.pack import interruptible
from moco.weights.pretrained import load_pretrained, log_window_advice

if TYPE_CHECKING:
    from numpy import ndarray
    from rich.console import Console
    from torch import Tensor, nn

    from moco.data.loading.image_sets import ImageSet
    from moco.data.sources.registry import DataSource
    from moco.evaluation.feature_parts import FeatureParts

log = logging.getLogger("moco.embed")  # __name__ is __main__ under python -m

USUAL_WORKERS = 4
# Settings that may differ when a pass goes on: they change no feature, or show in the names.
FREE = ("download", "max_bad_fraction", "num_images", "num_workers")


def run(config: EmbedConfig, folder: Path) -> None:
    """Write the file and its index; `folder` keeps a record of the config.

    The file holds ``features`` (M, D) float32, not normalised, ``names`` (M,) of the images, files by their paths, and
    where the data set has them ``labels`` (M,) int64. Unreadable images are left out and named in the log. Until all is
    done the features are in a folder beside it, from which the same command goes on.

    Raises:
        InputError: the checkpoint cannot be used, the data set has no such images, or the file cannot be written.
        RunError: features are not finite, or the machine gave out.
    """
    from rich.console import Console

    from moco.data.augment.views import evaluation_crop
    from moco.data.loading.waiting import cores_of
    from moco.data.sources.registry import build_source
    from moco.evaluation.feature_parts import FeatureParts, remove_parts, taken
    from moco.runs.failures import failures_without_training_named
    from moco.runs.run_folder import claimed
    from moco.training.hardware import choose_device

    output = Path(config.output)
    check_files(output)
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
    images = images_of(source, config.split, data["name"])

    transform = with_defaults(config.augmentation, of_run["augmentation"])
    encode = encoding(pretrained.encoder, config.feature, transform, device)
    about = {
        "settings": {
            "encoder": config.encoder,
            "feature": config.feature,
            "split": config.split,
            "batch_size": config.batch_size,
            "accelerator": device.type,
            "backbone": pretrained.settings,
            "augmentation": transform,
            "data": {key: value for key, value in data.items() if key not in FREE},
        },
        "weights": hash_of(pretrained.encoder),
        "data": images.fingerprint(),
    }
    parts_folder = output.with_name(f"{output.name}.part")
    console = Console()
    kept = f"what is done is kept in {parts_folder}, and the same command goes on there"
    failures_named = partial(failures_without_training_named, "batch_size")
    with taken(parts_folder), interruptible(), failures_named(kept, place="output=FILE.npz"):
        parts = FeatureParts(parts_folder, about, images.start)
        num_workers = config.data.num_workers
        if num_workers is None:
            num_workers = 0 if images.is_in_memory else min(USUAL_WORKERS, cores_of(1))
        crop = evaluation_crop(data["image_size"], data["crop_ratio"])
        loader = images.batches(
            parts.state.end, crop, data["image_size"], config.batch_size, num_workers, device
        )
        embed(encode, loader, parts, len(images), data["max_bad_fraction"], console)
        if not parts.state.num_rows:
            raise InputError(f"data.root={data['root']}: no images in there")
        said = write_files(output, parts, config.index, images.has_labels)
        remove_parts(parts_folder)
    with failures_named(), claimed(folder, dataclasses.asdict(config)):
        save_hydra_files(folder)
    report(config, data, parts, images.has_labels, said, console)


def check_files(output: Path) -> None:
    """Raises InputError if no .npz file, or no index beside it, can be written there."""
    if output.suffix != ".npz":
        raise InputError(f"output={output}: expected a file that ends in .npz")
    check_output(output)
    if index_of(output).is_dir():
        raise InputError(
            f"output={output}: {index_of(output)} is a folder; expected the name of a file"
        )


def index_of(output: Path) -> Path:
    """Where the index goes."""
    return output.with_suffix(".faiss")


def images_of(source: "DataSource", split: str, name: str) -> "ImageSet":
    """The images of a split, with labels if all of them have one.

    Raises:
        InputError: the data set has none that are held out.
    """
    import numpy as np

    from moco.data.loading.image_sets import IndexedSet, ShardedSet
    from moco.data.loading.streams import ShardedImages
    from moco.data.sources.registry import Labelled

    side = source.bank if split == "train" else source.queries
    if split == "test" and side is None:
        raise InputError(f"split=test: data={name} has no images that are held out")
    if isinstance(source.train, ShardedImages):
        return ShardedSet(source.train)
    if side is not None and (split == "test" or len(side.images) == len(source.train)):
        return IndexedSet(side, has_labels=True)
    labels = labels_of_both_sides(source)
    if labels is not None:
        return IndexedSet(Labelled(source.train, labels), has_labels=True)
    return IndexedSet(Labelled(source.train, np.full(len(source.train), -1)), has_labels=False)


def labels_of_both_sides(source: "DataSource") -> "ndarray | None":
    """Labels (M,) int64 of training images that are shared out among bank and queries; None where they are not."""
    import numpy as np

    if source.bank is None or source.queries is None:
        return None
    sides = (source.bank, source.queries)
    if sum(len(side.images) for side in sides) != len(source.train):
        return None
    label_of = {
        side.images.name(row): label for side in sides for row, label in enumerate(side.labels)
    }
    labels = [label_of.get(source.train.name(row)) for row in range(len(source.train))]
    return None if None in labels else np.array(labels, dtype=np.int64)


def hash_of(encoder: "nn.Module") -> str:
    """Differs where any weight differs."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def encoding(
    encoder: Any, feature: str, transform: dict[str, Any], device: Any
) -> "Callable[[Tensor], ndarray]":
    """From 8-bit images (N, 3, S, S) to features (N, D), computed on `device` in float32.

    Args:
        transform: mean and std of the pixels.
    """
    import torch

    from moco.data.augment.views import normalisation

    scale, shift = (values.to(device) for values in normalisation(**transform))
    encoder.to(device)

    @torch.no_grad()
    def encode(images: "Tensor") -> "ndarray":
        with torch.autocast(device.type, enabled=False):
            return encoder.encode(images.to(device) * scale - shift, feature).float().cpu().numpy()

    return encode


def embed(
    encode: "Callable[[Tensor], ndarray]",
    loader: Any,
    parts: "FeatureParts",
    num_images: int,
    max_bad_fraction: float,
    console: "Console",
) -> None:
    """Add the features of all batches of a `moco.data.loading.image_sets.ImageSet` to the parts.

    Raises:
        InputError: unreadable images are more than `max_bad_fraction` of `num_images`.
        RunError: features are not finite.
    """
    import numpy as np

    from moco.cli.image_progress import ImageProgress
    from moco.data.files.bad_fraction import check_bad_fraction
    from moco.runs.interrupts import ENDING, held_back

    bad = parts.unreadable()
    done = parts.state.num_rows + len(bad)
    if done:
        log.info("going on after %s of %s images", f"{done:,}", f"{num_images:,}")
    check_bad_fraction(bad, num_images, max_bad_fraction)
    with parts, ImageProgress(console, "embedding", done, num_images) as progress:
        with held_back(
            ENDING
        ):  # a loader that is interrupted while it starts complains about itself when it goes
            arriving = iter(loader)
        for batch in arriving:
            features = encode(batch.images) if batch.names else np.empty((0, 0), np.float32)
            check_finite(features, batch.names)
            for problem in batch.problems:
                log.warning("%s: %s", "damaged" if problem.is_shard else "skipped", problem.reason)
            unreadable = [problem.name for problem in batch.problems if not problem.is_shard]
            parts.add(features, batch.names, batch.labels.numpy(), unreadable, batch.end)
            if unreadable:
                bad += unreadable
                check_bad_fraction(bad, num_images, max_bad_fraction)
            progress.say(parts.state.num_rows + len(bad))


def check_finite(features: "ndarray", names: list[str]) -> None:
    """Raises RunError if features (N, D) are not finite; names the first ten images."""
    import numpy as np

    rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(rows):
        first = ", ".join(printable(names[row]) for row in rows[:10])
        raise RunError(
            f"the features of {len(rows)} images are not finite, of {first}; the checkpoint's weights are damaged, or too "
            "large for these images"
        )


def write_files(output: Path, parts: "FeatureParts", index: str, has_labels: bool) -> str:
    """Write the index and the .npz file, each whole or not at all; what the index is, in words."""
    from moco.evaluation.feature_files import write_index, write_npz
    from moco.runs.atomic_files import write_atomically

    said: list[str] = []
    if index != "none":
        log.info("writing %s", index_of(output))
        write_atomically(
            index_of(output), lambda file: said.append(write_index(file, parts, index))
        )
    elif index_of(output).exists():
        log.warning("%s is of an earlier run and does not go with the new file", index_of(output))
    log.info("writing %s", output)
    write_atomically(output, lambda file: write_npz(file, parts, has_labels))
    return said[0] if said else "none"


def report(
    config: EmbedConfig,
    data: dict[str, Any],
    parts: "FeatureParts",
    has_labels: bool,
    index: str,
    console: "Console",
) -> None:
    """Print what was written."""
    from moco.cli.progress import print_table

    num_rows, width = parts.state.num_rows, parts.state.feature_dim
    labels = f", labels {(num_rows,)}" if has_labels else ""
    rows = [
        ("images", f"{num_rows:,}, {config.split} of {data['name']}, {data['image_size']} px"),
        ("features", f"{config.feature} of the {config.encoder} encoder, {width} wide"),
        ("arrays", f"features {(num_rows, width)}, names {(num_rows,)}{labels}"),
        ("index", index),
    ]
    print_table(console, "Embedded", rows)
    written = [Path(config.output)] + (
        [index_of(Path(config.output))] if config.index != "none" else []
    )
    names = " and ".join(os.path.relpath(path) for path in written)
    console.print(f"written to {names}", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point of ``moco-embed``."""
    launch(run, EmbedConfig, "embed")


if __name__ == "__main__":
    main()
