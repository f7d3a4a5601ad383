"""Groups of images that show the same thing: one place at several seasons, one study, one slide.

Positives can come from two images of a group (SeCo, arXiv 2103.16607; MedAug, arXiv 2102.10663;
SSL4EO-S12, arXiv 2211.07044). `group_numbers` finds the groups by the names of the images, and
`KeyImages` draws which image the key view of each query comes from.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moco.data.augment.draws import uniforms
from moco.data.sources.folders import list_of_paths
from moco.data.sources.label_files import (
    NO_IMAGE,
    SEVERAL_IMAGES,
    ImageFinder,
    first_few,
    read_table,
)
from moco.data.sources.own_dataset import IterableImages
from moco.data.sources.shards import ShardedImages
from moco.data.sources.source import DataSource, Images
from moco.data.sources.split_folders import TRAINING_FOLDERS
from moco.errors import InputError, near_path, printable

log = logging.getLogger(__name__)

UNKNOWN = -1
KEY_IMAGE = 2  # the number of this draw; the query view and the key view have 0 and 1
NAMED_GROUP = "group"
COLUMNS = ("name", "group")
PART_OF_FILE = re.compile(r"#\d+(,\d+)?$")  # behind the path of a file: a page, or a tile
EXPECTED = (
    "expected a regular expression with a group (?P<group>...), the number of a folder level, or "
    "{csv: FILE}"
)


def group_numbers(names: Sequence[str], group: Any) -> np.ndarray:
    """Return the group of each image, (images,) int64; `UNKNOWN` for images without one.

    Args:
        names: of the images, relative to the folder of the dataset.
        group: a regular expression that is searched for in each name, and whose part
            ``(?P<group>...)`` tells the group; or a folder level: 1 is the first folder of a name;
            or ``{csv: FILE}``, a table with the columns name and group.

    Raises:
        InputError: `group` is none of these, or no image has a group.
    """
    if isinstance(group, str):
        keys = groups_by_expression(names, group)
    elif isinstance(group, int) and not isinstance(group, bool):
        keys = groups_by_level(names, group)
    elif isinstance(group, dict) and list(group) == ["csv"]:
        keys = groups_by_table(names, str(group["csv"]))
    else:
        raise InputError(f"data.group={group}: {EXPECTED}")
    number_of_key: dict[str | None, int] = {None: UNKNOWN}
    numbers = np.empty(len(names), np.int64)
    for index, key in enumerate(keys):
        numbers[index] = number_of_key.setdefault(key, len(number_of_key) - 1)
    if (numbers == UNKNOWN).all():
        first = ", ".join(map(printable, names[:2]))
        raise InputError(
            f"data.group={group}: says the group of none of the {len(names)} images; "
            f"the first are {first}"
        )
    return numbers


def groups_by_expression(names: Sequence[str], expression: str) -> list[str | None]:
    """Return what the group of a regular expression matches in each name, or None.

    Raises:
        InputError: it is no regular expression, or it has no group of that name.
    """
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise InputError(f"data.group={expression}: no regular expression ({error})") from error
    if NAMED_GROUP not in pattern.groupindex:
        raise InputError(
            f"data.group={expression}: has no (?P<group>...); "
            "'(?P<group>[^/]+)/.*' takes the first folder"
        )
    keys: list[str | None] = []
    for name in names:
        match = pattern.search(name)
        if match is None:
            keys.append(None)
        else:
            keys.append(match[NAMED_GROUP])
    return keys


def groups_by_level(names: Sequence[str], level: int) -> list[str | None]:
    """Return the folder at this level of each name with the folders above it, or None.

    Raises:
        InputError: the level is below 1.
    """
    if level < 1:
        raise InputError(f"data.group={level}: expected 1 for the first folder below the root")
    keys: list[str | None] = []
    for name in names:
        *folders, _ = name.split("/")
        if len(folders) < level:
            keys.append(None)
        else:
            keys.append("/".join(folders[:level]))
    return keys


def groups_by_table(names: Sequence[str], path: str) -> list[str | None]:
    """Return the group that a table gives for the file of each image, or None.

    Raises:
        InputError: the file cannot be read, has no such columns, or gives a file two groups.
    """
    where = f"data.group.csv={path}"
    if not os.path.isfile(path):
        raise InputError(f"{where}: no such file{near_path(path)}")
    # The tiles and the pages of a file have its group.
    file_of_image = [PART_OF_FILE.sub("", name) for name in names]
    files = list(dict.fromkeys(file_of_image))
    finder = ImageFinder(files)
    table = read_table(path, finder)
    titles = [title.lower() for title in table.header or ()]
    if not set(COLUMNS) <= set(titles):
        there = printable(", ".join(titles)) or "no names of columns"
        raise InputError(f"{where}: expected the columns name and group, found {there}")
    name_column, group_column = map(titles.index, COLUMNS)
    group_of_file: dict[str, str] = {}
    unknown = []
    for row in table.rows:
        name, group = row[name_column], row[group_column]
        place = finder.find(name)
        if place == SEVERAL_IMAGES:
            raise InputError(f"{where}: {printable(name)} stands for several images")
        if place == NO_IMAGE:
            unknown.append(name)
            continue
        known = group_of_file.setdefault(files[place], group)
        if known != group:
            raise InputError(
                f"{where}: {printable(name)} is in two groups, "
                f"{printable(known)} and {printable(group)}"
            )
    if unknown:
        log.warning(
            "%s: %s of %s names belong to no image: %s",
            where,
            f"{len(unknown):,}",
            f"{len(table.rows):,}",
            first_few(unknown),
        )
    # An empty cell is no group.
    return [group_of_file.get(file) or None for file in file_of_image]


def relative_names(images: Images, roots: Sequence[str]) -> list[str]:
    """Return the names of images relative to the folder of the dataset.

    If the names do not begin with that folder, as in a packed copy, they are relative to the folder
    that all of them have in common. If all of them are in a folder ``train``, they are relative to
    that one.

    Args:
        roots: the folders of the dataset, if it has any.
    """
    prefixes = []
    for root in roots:
        prefixes += [os.path.join(root, ""), os.path.join(Path(root), "")]
    names = list(map(images.name, range(len(images))))
    relative = [without_prefix(name, prefixes) for name in names]
    if relative == names:
        prefix = os.path.commonprefix(names)  # noqa: RUF071, cut at its last slash
        folder, slash, _ = prefix.rpartition("/")
        start = len(folder + slash)
        relative = [name[start:] for name in names]
    first_folder, slash, _ = relative[0].partition("/")
    folder = first_folder + slash
    is_split = slash and first_folder.lower() in TRAINING_FOLDERS
    if is_split and all(name.startswith(folder) for name in relative):
        relative = [name[len(folder) :] for name in relative]
    return relative


def without_prefix(name: str, prefixes: Sequence[str]) -> str:
    """Return a name without the first of the prefixes that it begins with, if it does."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def with_groups(source: DataSource, root: Any, group: Any) -> DataSource:
    """Return a source whose training images have groups.

    Args:
        root: the setting data.root: a folder, a list of folders, or something else.
        group: see `group_numbers`.

    Raises:
        InputError: as in `group_numbers`, or the images have no numbers.
    """
    if isinstance(source.train, (IterableImages, ShardedImages)):
        raise InputError(
            "data.group: tar shards and iterable datasets have no images by number; expected "
            "folders, a packed copy or another dataset that has"
        )
    folders = list_of_paths(root) or []
    groups = group_numbers(relative_names(source.train, folders), group)
    log_groups(groups)
    return replace(source, groups=groups)


class KeyImages:
    """The image that the key view of each query comes from.

    The draw of an image depends on (seed, epoch, index) alone.

    Args:
        groups: (images,) int64, `UNKNOWN` for images without a group.
        pair: ``group``: another image of the query's group, each with the same probability.
            ``mixed``: with a probability of one half such an image, otherwise the query's own. An
            image that is alone in its group, or has none, always pairs with itself.
        seed: of the run.

    Raises:
        InputError: no group has two images.
    """

    def __init__(self, groups: np.ndarray, pair: str, seed: int) -> None:
        # Every image without a group is a group of its own.
        own_numbers = groups.max() + 1 + np.arange(len(groups))
        numbers = np.where(groups == UNKNOWN, own_numbers, groups)
        _, number_of_image, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
        if sizes.max() == 1:
            raise InputError(
                f"data.pair={pair}: each of the {len(sizes)} groups of data.group has only one "
                "image; expected groups of several"
            )
        # Images of a group stand side by side in this order.
        order = np.argsort(number_of_image, kind="stable")
        starts = np.cumsum(sizes) - sizes
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        # Loader processes share a tensor's memory; an array would be copied to each of them.
        self.order = torch.from_numpy(order)
        self.starts = torch.from_numpy(starts[number_of_image])
        self.sizes = torch.from_numpy(sizes[number_of_image])
        self.places = torch.from_numpy(places) - self.starts
        """(images,) each: the images by group; and of each image, where its group starts in that
        order, how many images the group has, and the place of the image in its group."""
        self.pair = pair
        self.seed = seed

    def of(self, epoch: int, indices: Tensor) -> Tensor:
        """Return the number of the image that each key view comes from, (batch,) int64.

        Args:
            indices: (batch,) int64, the numbers of the queries' images.
        """
        numbers = uniforms(self.seed, epoch, indices, KEY_IMAGE, 2)
        sizes = self.sizes[indices]
        num_others = sizes - 1
        # Which of the others, from 0; rounding could give one more, and an image alone gets -1.
        chosen = torch.minimum((numbers[:, 0] * num_others).long(), num_others - 1)
        places = (self.places[indices] + 1 + chosen) % sizes
        keys = self.order[self.starts[indices] + places]
        if self.pair == "mixed":
            keys = torch.where(numbers[:, 1] < 0.5, keys, indices)
        return keys

    def others_of_group(self, index: int, key: int) -> list[int]:
        """Return the images that can stand in for an unreadable key image, in order.

        They are the other images of the group after `key`, and at last the query's own.

        Args:
            index: of the query's image.
            key: the image that was drawn.
        """
        start, size = int(self.starts[key]), int(self.sizes[key])
        place = int(self.places[key])
        others = []
        for step in range(1, size):
            other = int(self.order[start + (place + step) % size])
            if other != index:
                others.append(other)
        return [*others, index]

    def to(self, device: torch.device) -> "KeyImages":
        """Return the same on a device."""
        moved = object.__new__(KeyImages)
        moved.__dict__ |= self.__dict__
        for name in ("order", "starts", "sizes", "places"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


def log_groups(groups: np.ndarray) -> None:
    """Log how many groups there are, and how many images cannot be paired."""
    known = groups[groups != UNKNOWN]
    sizes = np.unique(known, return_counts=True)[1]
    num_alone = int((sizes == 1).sum())
    num_without = len(groups) - len(known)
    with_themselves = ""
    if num_alone or num_without:
        with_themselves = (
            f"; {num_alone:,} images are alone in their group and {num_without:,} have none: they "
            "pair with themselves"
        )
    log.info(
        "%s groups of %s to %s images%s",
        f"{len(sizes):,}",
        f"{sizes.min():,}",
        f"{sizes.max():,}",
        with_themselves,
    )
