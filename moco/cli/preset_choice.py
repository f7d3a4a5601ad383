"""Which preset trains on a folder of the user's own images, when nobody chooses an experiment.

``python -m moco.train data.root=DIR`` finds out what DIR is, counts its images, and takes
``own_images_small``, ``own_images_medium`` or ``own_images_large``. What the user chooses wins, key
by key. With another ``method``, ``augmentation`` or ``optimizer`` the preset's numbers for that
group are left out too: they belong to the preset's own choice.

A run keeps its preset in its folder. It goes on with that when images were added meanwhile.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from moco.cli.checks import check_pretraining
from moco.cli.run_names import key_of, parsed
from moco.config.parsing import CONFIG_DIR
from moco.config.train import TrainConfig
from moco.errors import printable
from moco.runs.run_folder import METRICS, has_checkpoint

log = logging.getLogger("moco.train")

PRESET_FILE = "preset.yaml"
"""In the folder's ``.hydra``: the preset of a run, as the fields of `Preset`."""
SIZES = (("small", 10_000), ("medium", 200_001), ("large", None))
"""The presets, each with the number of images from which on it is too small."""
OWN_SOURCES = ("hdf5", "hf", "image_folder", "images", "npz", "packed", "webdataset", "zarr")
"""The kinds of data of which only the user knows what is in there."""
TUNED_GROUPS = ("augmentation", "backbone", "method", "optimizer")
"""Groups of which the preset's numbers fit the preset's own choice alone."""
SMALL_SIDE = 64  # px; up to it the images are like CIFAR's, and a ResNet keeps their resolution
SMALL_GROUPS = {
    "backbone=resnet18": "backbone=resnet18_cifar",
    "backbone=resnet50": "backbone=resnet50_cifar",
    "augmentation=moco_v2": "augmentation=cifar",
}
"""What the presets choose for photographs, and what suits small images instead."""
# Files by which a folder is recognised, and the endings of files that hold many images.
MARKS = {
    "zarr.json": "zarr",
    ".zarray": "zarr",
    ".zgroup": "zarr",
    "dataset_info.json": "hf",
    "dataset_dict.json": "hf",
}
ENDINGS = {
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".npy": "npz",
    ".npz": "npz",
    ".tar": "webdataset",
}
MOST_ENTRIES = 1000  # of a folder that are looked at to tell shards from images


@dataclass(frozen=True)
class Preset:
    """The preset of a run, and what it depends on."""

    data: str
    """The kind of data, such as ``images``."""
    size: str
    """small, medium or large."""
    num_images: int
    """Number of images when it was chosen."""
    image_size: int
    """Side at which such images are usually used, px."""

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return f"own_images_{self.size}"


def with_preset(
    program: str, composed: DictConfig, config: TrainConfig, overrides: Sequence[str], folder: Path
) -> tuple[DictConfig, dict[str, str]]:
    """Return the config with a preset below the user's overrides, and the file that keeps it.

    Args:
        program: ``train`` or ``preview``.
        composed: the config without a preset.
        config: the same as an instance of its schema.
        overrides: of the user, as Hydra reads them.
        folder: the run folder.

    Returns:
        The config as Hydra composes it, without Hydra's own section; and the file for the folder's
        ``.hydra``, by name. Both are as before if there is nothing to choose.

    Raises:
        InputError: the images cannot be listed.
    """
    chosen = chosen_keys(overrides)
    if not is_open(config, chosen):
        return composed, {}
    if program == "train":  # the images are listed after this check, as without a preset
        check_pretraining(config, folder)
    preset = kept_preset(config, folder)
    is_kept = preset is not None
    if preset is None:
        if has_checkpoint(folder) or (folder / METRICS).is_file():
            return composed, {}  # a run of an earlier version, which had no preset
        preset = chosen_preset(config, chosen, folder)
    lines = preset_overrides(preset, chosen)
    if is_kept:
        reason = "which this run began with"
    else:
        reason = f"for {preset.num_images:,} images, since no experiment was chosen"
    replaced = sorted(chosen & set(TUNED_GROUPS))
    yours = f"; your own: {', '.join(replaced)}" if replaced else ""
    log.info("preset: +experiment=%s, %s%s", preset.name, reason, yours)
    if "data" not in chosen and preset.data != "images":
        say_kind(config.data.root, preset.data)
    text = yaml.safe_dump({**vars(preset), "overrides": lines}, sort_keys=False)
    return recomposed(program, [*lines, *overrides]), {PRESET_FILE: text}


def with_kind_of_data(
    program: str, composed: DictConfig, config: Any, overrides: Sequence[str]
) -> DictConfig:
    """Return the config of a program that looks at images, with the kind of data that root is.

    It is that of ``moco.train``, see `kind_of`.

    Args:
        program: ``pack`` or ``stats``.
        composed: the config as Hydra composed it.
        config: the same as an instance of its schema.
        overrides: of the user, as Hydra reads them.
    """
    if config.data.root is None or chosen_keys(overrides) & {"data", "data.name", "data.target"}:
        return composed
    kind = kind_of(config.data.root)
    if kind == config.data.name:
        return composed
    say_kind(config.data.root, kind)
    return recomposed(program, [f"data={kind}", *overrides])


def say_kind(root: Any, kind: str) -> None:
    """Log what kind of data a path is taken for."""
    log.info("%s: taken as data=%s", printable(str(root)), kind)


def chosen_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys and groups that overrides set."""
    return {key_of(item) for item in parsed(overrides)}


def is_open(config: TrainConfig, chosen: set[str]) -> bool:
    """Return whether the user left the recipe open, and the data are the user's own images.

    Args:
        config: the config without a preset.
        chosen: the keys and groups of the user's overrides.
    """
    data = config.data
    if data.root is None or chosen & {"experiment", "data.name", "data.target"}:
        return False
    return data.name in OWN_SOURCES


def kept_preset(config: TrainConfig, folder: Path) -> Preset | None:
    """Return the preset of the run in a folder, or of the run that ``resume`` names, if it has one.

    Args:
        config: of the run.
        folder: the run folder.
    """
    places = []
    if has_checkpoint(folder) or (folder / METRICS).is_file():
        places.append(folder)
    if config.resume not in (None, "auto"):
        places.append(Path(str(config.resume)).parent.parent)
    for place in places:
        path = place / ".hydra" / PRESET_FILE
        if path.is_file():
            return read_preset(path.read_text())
    return None


def read_preset(text: str) -> Preset:
    """Return the preset that the content of a `PRESET_FILE` describes."""
    kept = yaml.safe_load(text)
    del kept["overrides"]
    return Preset(**kept)


def chosen_preset(config: TrainConfig, chosen: set[str], folder: Path) -> Preset:
    """Return the preset for the images of a config. They are listed for it.

    Args:
        config: of the run.
        chosen: the keys and groups of the user's overrides.
        folder: the run folder, where the list of the images is kept.
    """
    from moco.cli.build_pretraining import listed_source

    data = replace(config.data)
    if "data" not in chosen:
        data.name = kind_of(data.root)
    is_training = type(config) is TrainConfig
    source = listed_source(data, folder if is_training else None, is_kept=True)
    number = len(source.train)
    for size, too_many in SIZES:
        if too_many is None or number < too_many:
            return Preset(data.name, size, number, source.image_size)
    raise AssertionError("the last size has no limit")


def kind_of(root: Any) -> str:
    """Return the kind of data at a path where it is certain, otherwise ``images``.

    Sub-folders may be classes, places or years. They are classes if there are a training and a
    validation folder with the same names in both.

    Args:
        root: ``data.root``.
    """
    if isinstance(root, list):
        kinds = {kind_of(path) for path in root}
        return "webdataset" if kinds == {"webdataset"} else "images"
    path = str(root)
    if path.startswith("pipe:"):
        return "webdataset"
    if not os.path.isdir(path):
        return ENDINGS.get(os.path.splitext(path)[1].lower(), "images")
    if path.rstrip("/").endswith(".zarr"):
        return "zarr"
    for name, kind in MARKS.items():
        if os.path.isfile(os.path.join(path, name)):
            return kind
    if is_packed(path):
        return "packed"
    with os.scandir(path) as entries:
        names = []
        for entry in entries:
            names.append(entry.name)
            if len(names) == MOST_ENTRIES:
                break
    visible = [name for name in names if not name.startswith(".")]
    if any(name.endswith(".tar") for name in visible):
        others = [name for name in visible if not name.endswith((".tar", ".json", ".idx", ".txt"))]
        if not others:
            return "webdataset"
    return "image_folder" if is_class_tree(path) else "images"


def is_packed(path: str) -> bool:
    """Return whether moco.pack wrote a folder."""
    try:
        index = json.loads(Path(path, "index.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(index, dict) and {"version", "parts", "source"} <= index.keys()


def is_class_tree(path: str) -> bool:
    """Return whether a folder holds a training and a validation folder with the same classes."""
    from moco.data.sources.split_folders import (
        TRAINING_FOLDERS,
        VALIDATION_FOLDERS,
        first_of,
        folders_in,
    )

    folders = folders_in(path)
    train = first_of(folders, TRAINING_FOLDERS)
    validation = first_of(folders, VALIDATION_FOLDERS)
    if train is None or validation is None:
        return False
    classes = folders_in(os.path.join(path, train))
    held_out = folders_in(os.path.join(path, validation))
    return len(classes) > 1 and bool(held_out) and set(held_out) <= set(classes)


def preset_overrides(preset: Preset, chosen: set[str]) -> list[str]:
    """Return the preset as overrides that come before the user's own.

    The preset is fitted to few images: the queue holds at most a tenth of them, and the batch is
    not larger than their number. Small images keep their own size.

    Args:
        preset: the preset.
        chosen: the keys and groups of the user's overrides.
    """
    content = yaml.safe_load((CONFIG_DIR / "experiment" / f"{preset.name}.yaml").read_text())
    is_small_image = preset.image_size <= SMALL_SIDE
    overrides = []
    for entry in content.pop("defaults"):
        for name, choice in entry.items():
            group = name.removeprefix("override /")
            line = f"{group}={preset.data if group == 'data' else choice}"
            if is_small_image:
                line = SMALL_GROUPS.get(line, line)
            if group not in chosen:
                overrides.append(line)
    for key, value in flattened(content):
        if key.split(".")[0] in chosen & set(TUNED_GROUPS):
            continue
        if key == "data.image_size" and is_small_image:
            continue
        if key == "method.queue_size":
            value = min(value, power_of_two(preset.num_images // 10))
        elif key == "data.batch_size":
            value = min(value, power_of_two(preset.num_images))
        overrides.append(f"{key}={value}")
    return overrides


def power_of_two(most: int) -> int:
    """Return the largest power of two that is not above `most`, and at least 8."""
    return max(8, 2 ** (max(most, 1).bit_length() - 1))


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested settings with their dotted keys."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def recomposed(program: str, overrides: Sequence[str]) -> DictConfig:
    """Return the config of a program with these overrides, without Hydra's own section."""
    if GlobalHydra.instance().is_initialized():  # with the user's --config-dir
        return compose(program, list(overrides))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(program, list(overrides))
