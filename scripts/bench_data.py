"""Measure how many images per second become two views, in turns with other pipelines.

    python scripts/bench_data.py files  [--images 128] [--repeats 5] [--size 500x375] [--quality 90]
    python scripts/bench_data.py memory [--threads 2] [--repeats 5] [--npz cifar10.npz]
        [--device cuda]

files: the script makes JPEGs of about 500 x 375 px. The worker engine makes two MoCo v2 views of
224 px in one process with one thread. A worker's part ends with uint8 images, which the training
process or its GPU normalises.
memory: images of 32 px, from an archive or noise, become two views of the CIFAR pair. The batch
engine has --threads.
The official pipeline is torchvision's v1 operations and Pillow's blur on Pillow images, up to
normalised tensors. lightly takes part if it is installed. The table has medians with the slowest
and fastest run. Only ratios within one run are comparable.
"""

import argparse
import contextlib
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import yaml
from benchmarks.turns import Turn, in_turns, timed, wait_for
from compare_augmentations import photograph
from hydra import compose, initialize_config_dir
from PIL import Image, ImageFilter
from torchvision import transforms as v1
from torchvision.transforms import v2

from moco import pack
from moco.config.pack import PackConfig
from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.data.augment.views import ViewPair
from moco.data.files.images import MAX_IMAGE_PIXELS
from moco.data.loading.loaders import PairDataset
from moco.data.sources.packed_copy import packed_source
from moco.data.sources.source import DataSource, FileImages, Images


class OfficialBlur:
    """Pillow's blur with a sigma from 0.1 to 2, as in the official loader."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def official(pair: dict[str, Any], side: int, blur: bool) -> v1.Compose:
    """Return the official transform to one view."""
    jitter = v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    scale = pair["query"]["random_resized_crop"]["scale"]
    steps = [v1.RandomResizedCrop(side, scale=scale), jitter, v1.RandomGrayscale(p=0.2)]
    if blur:
        steps.append(v1.RandomApply([OfficialBlur()], p=0.5))
    steps += [v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(pair["mean"], pair["std"])]
    return v1.Compose(steps)


def on_tensors(pair: dict[str, Any], side: int) -> v2.Compose:
    """Return the transform to one view by transforms.v2 on uint8 tensors."""
    scale = pair["query"]["random_resized_crop"]["scale"]
    return v2.Compose([
        v2.RandomResizedCrop(side, scale=scale, antialias=True),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(pair["mean"], pair["std"]),
    ])  # fmt: skip


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIG_DIR / "augmentation" / f"{name}.yaml").read_text())


def view_pair(pair: dict[str, Any], side: int, engine: str) -> ViewPair:
    return ViewPair(pair["query"], pair["query"], pair["mean"], pair["std"], side, 0, engine)


def files(arguments: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Return the pipelines on JPEG files; each returns its number of images."""
    width, height = (int(side) for side in arguments.size.split("x"))
    random_numbers = np.random.default_rng(0)
    paths = []
    for number in range(arguments.images):
        paths.append(str(Path(arguments.folder) / f"{number:04}.jpg"))
        shape = (height, width) if number % 2 else (width, height)
        image = photograph(random_numbers, *shape)
        Image.fromarray(image).save(paths[-1], quality=arguments.quality)
    pair = settings("moco_v2")
    official_view, tensor_view = official(pair, 224, blur=True), on_tensors(pair, 224)

    def by_official() -> int:
        for path in paths:
            image = Image.open(path).convert("RGB")
            official_view(image), official_view(image)
        return len(paths)

    def by_tensors() -> int:
        for path in paths:
            image = torchvision.io.decode_jpeg(torchvision.io.read_file(path))
            tensor_view(image), tensor_view(image)
        return len(paths)

    pipelines = {"official (Pillow)": by_official, "transforms.v2 on tensors": by_tensors}
    try:
        from lightly.data import LightlyDataset
        from lightly.transforms import MoCoV2Transform
    except ImportError:
        print("lightly is not installed")
    else:
        dataset = LightlyDataset(arguments.folder, transform=MoCoV2Transform(input_size=224))

        def by_lightly() -> int:
            for number in range(len(dataset)):
                dataset[number]
            return len(dataset)

        pipelines["lightly"] = by_lightly

    def ours(images: Images, *, to_floats: bool) -> Callable[[], int]:
        dataset = PairDataset(images, view_pair(pair, 224, "worker"))

        def by_worker() -> int:
            for first in range(0, len(paths), 64):
                places = [(0, index) for index in range(first, min(first + 64, len(paths)))]
                batch = dataset.__getitems__(places)
                if to_floats:
                    dataset.augment.finished(batch.views, 0, batch.indices)
            return len(paths)

        return by_worker

    pipelines["ours"] = ours(FileImages(paths), to_floats=True)
    part = "ours, a loader process's part (uint8)"
    pipelines[part] = ours(FileImages(paths), to_floats=False)
    for kind in ("array", "shards") if arguments.packed else ():
        images = packed_copy(arguments.folder, kind).train
        pipelines[f"{part}, from a packed copy ({kind})"] = ours(images, to_floats=False)
    return pipelines


def packed_copy(folder: str, kind: str) -> DataSource:
    """Return the packed copy of a folder of images, with the shorter side at 256 px."""
    output = tempfile.mkdtemp(dir=Path(folder).parent)
    overrides = [
        f"data.root={folder}",
        "data=images",
        "data.resize=256",
        f"format={kind}",
        f"output={output}/copy",
    ]
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = parse(compose("pack", overrides), PackConfig)
    pack.run(config, Path(output) / "run")
    return packed_source(f"{output}/copy", MAX_IMAGE_PIXELS)


def memory(arguments: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Return the pipelines on small images in memory; each returns its number of images."""
    if arguments.npz:
        images = np.load(arguments.npz)["train_images"][: arguments.memory_images]
    else:
        shape = (arguments.memory_images, 32, 32, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pair = settings("cifar")
    official_view = official(pair, 32, blur=False)
    device = torch.device(arguments.device)
    augment = view_pair(pair, 32, "batch")
    pixels = torch.from_numpy(images).to(device)  # (images, height, width, 3)
    at_once = 512 if device.type == "cpu" else len(pixels)

    def by_official() -> int:
        torch.set_num_threads(1)
        for array in images[:512]:
            image = Image.fromarray(array)
            official_view(image), official_view(image)
        return min(512, len(images))

    def by_batch() -> int:
        torch.set_num_threads(arguments.threads)
        for indices in torch.arange(len(pixels), device=device).split(at_once):
            chosen = pixels.index_select(0, indices).permute(0, 3, 1, 2).contiguous()
            augment.on_batch(chosen, 0, indices)
        wait_for(device)
        return len(pixels)

    where = f"{arguments.threads} threads" if device.type == "cpu" else "on the GPU"
    return {"official (Pillow), 1 process": by_official, f"ours, batch engine, {where}": by_batch}


KINDS = {"files": files, "memory": memory}


@contextlib.contextmanager
def turns_of(what: str, arguments: argparse.Namespace) -> Iterator[dict[str, Turn]]:
    """Yield the pipelines of ``files`` or ``memory``, ready to take turns."""
    torch.set_num_threads(1)
    # For one thread, the time on its core is less sensitive to other work of the machine.
    clock = time.process_time if what == "files" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = f"{folder}/images"  # packed copies lie beside it
        Path(arguments.folder).mkdir()
        turns = {}
        for name, pipeline in KINDS[what](arguments).items():
            turns[name] = timed(pipeline, clock=clock)
        yield turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=128, help="number of files")
    parser.add_argument("--size", default="500x375", help="size of a file, px")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of a file")
    parser.add_argument("--packed", action="store_true", help="measure packed copies, too")
    parser.add_argument("--npz", help="an archive with train_images")
    parser.add_argument("--memory-images", type=int, default=4096, help="images in memory")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=KINDS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="for memory")
    add_arguments(parser)
    arguments = parser.parse_args()
    with turns_of(arguments.what, arguments) as turns:
        found = in_turns(turns, arguments.repeats)
    speeds = {}
    for name, done in found.items():
        speeds[name] = [turn["images"] / turn["seconds"] for turn in done]
    print(f"{platform.machine()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    print("| pipeline | images/s, median (slowest to fastest) | against official |")
    print("|---|---|---|")
    reference = statistics.median(next(iter(speeds.values())))
    for name, values in speeds.items():
        median = statistics.median(values)
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"| {name} | {median:,.0f} ({spread}) | {median / reference:.2f} |")


if __name__ == "__main__":
    main()
