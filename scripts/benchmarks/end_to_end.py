"""Measure a training on images of CIFAR-10's shape, data included.

It is compared with its step alone and with the peers.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bench_data
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import of_lightly, official, ours
from benchmarks.nets import Net, Setting, nets_of
from benchmarks.peers import Peers
from benchmarks.turns import Case, Turn, timed
from moco.cli.build_pretraining import build_data

STEP = "our step alone"


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--npz", help="an archive with train_images (M, 32, 32, 3), uint8; default: noise"
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of one turn, after the first ones"
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes of the peers")


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    name = "resnet_tiny" if arguments.tiny else "resnet18 K 4096"
    net = nets_of(torch.device(arguments.device), arguments.tiny)[name]
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(arguments.npz or write_noise(Path(folder), net, arguments.steps))
        yield case_of(net, archive, arguments, peers)


def write_noise(folder: Path, net: Net, num_steps: int) -> Path:
    """Write an archive of random images, for more batches than a turn takes."""
    generator = np.random.default_rng(0)
    num_batches = max(ours.WARM_UP.values()) + num_steps + ours.COOL_DOWN + 2
    shape = (num_batches * net.batch_size, net.image_size, net.image_size, 3)
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(len(images)) % 10
    few = slice(net.batch_size)
    path = folder / "noise.npz"
    parts = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images[few],
        "test_labels": labels[few],
    }
    np.savez(path, **parts)
    return path


def case_of(net: Net, archive: Path, arguments: argparse.Namespace, peers: Peers) -> Case:
    """Compare default settings.

    Ours is `moco.train` with all its callbacks. The peers have the loops and loaders of their
    examples.
    """
    setting = Setting(torch.device(arguments.device))
    overrides = ["data=npz", f"data.root={archive}", "augmentation=cifar"]
    config = net.config(*overrides, *ours.for_steps(arguments.steps, setting.device))

    def step_alone() -> Turn:
        return ours.training(config, ours.SamePair(config, setting.views(net)))

    def with_data() -> Turn:
        data = build_data(config)
        # Without a bank, there is no evaluation at the end of a turn.
        data.source = dataclasses.replace(data.source, bank=None, queries=None)
        return ours.training(config, data)

    contenders: dict[str, Callable[[], Turn]] = {STEP: step_alone, "ours, with data": with_data}
    fed_from = partial(fed, net, setting, archive, arguments.steps, arguments.workers)
    if "lightly" in peers:
        contenders["lightly"] = lambda: fed_from(of_lightly.step(net, setting), lightly_views(net))
    if "official" in peers:
        step = official.step(peers["official"], net, setting, True)
        contenders["official"] = lambda: fed_from(step, official_views(net))
    images = archive.name if arguments.npz else "noise"
    name = f"{net.backbone}, batch {net.batch_size}, {images}"
    return Case(name, contenders, (STEP, "official", "lightly"), warm_ups=0)


def lightly_views(net: Net) -> Callable[[Image.Image], list[Tensor]]:
    from lightly.transforms import MoCoV2Transform

    return MoCoV2Transform(input_size=net.image_size)


def official_views(net: Net) -> Callable[[Image.Image], list[Tensor]]:
    """Return the transform to two views of the official CIFAR-10 notebook."""
    view = bench_data.official(bench_data.settings("cifar"), net.image_size, blur=False)
    return lambda image: [view(image), view(image)]


class Images(Dataset[list[Tensor]]):
    """Images of an archive, transformed one by one.

    A transform gets Pillow images, as from torchvision's CIFAR10.
    """

    def __init__(self, archive: Path, views: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images = np.load(archive)["train_images"]
        self.views = views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.views(Image.fromarray(self.images[index]))


def fed(
    net: Net,
    setting: Setting,
    archive: Path,
    num_steps: int,
    num_workers: int,
    step: Callable[[Tensor, Tensor], None],
    views: Callable[[Image.Image], list[Tensor]],
) -> Turn:
    """Return a turn of a peer's loop.

    It builds a new loader, takes as many uncounted steps as ours, and then `num_steps`.
    """
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "num_workers": num_workers}
    loader = DataLoader(Images(archive, views), net.batch_size, **options)

    def turn() -> dict[str, float]:
        batches = iter(loader)

        def one_step() -> None:
            step(*map(setting.placed, next(batches)))

        for _ in range(ours.WARM_UP[setting.device.type]):
            one_step()
        measured = timed(one_step, setting.device, images=net.batch_size, calls=num_steps)()
        return dict(measured)

    return turn
