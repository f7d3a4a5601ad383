"""Does a pretrained Swin V2 keep what it learned when the images more than double in size?

    python scripts/segmentation_journey.py --tiles cifar10.npz --folder /tmp/journey [--seeds 3]

The script pretrains small Swins on unlabelled mosaics of 2 x 2 CIFAR-10 images at 64 px, with
windows of 4. Then it segments mosaics of 3 x 3 larger images at 144 px, with windows of 9. A
pixel has the class of its image. Training mosaics use CIFAR-10's training images, the measured
ones its test images. All variants are fine-tuned for the same number of steps on the same mosaics.
Finished runs are not repeated. --tiles takes any archive in the MedMNIST layout.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console
from rich.table import Table

from moco import segment, train
from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.segment import SegmentConfig
from moco.config.train import TrainConfig

NEW_WINDOW = 9  # cells; the pretraining has 4


@dataclasses.dataclass(frozen=True)
class Scale:
    """How long a journey is."""

    pretraining_mosaics: int = 8192
    pretraining_epochs: int = 3
    pretraining_batch: int = 128
    training_mosaics: int = 1600
    test_mosaics: int = 160
    epochs: int = 2
    batch: int = 16


PRETRAINING = {
    "v1": ["backbone=swin_tiny_patch2"],
    "v2": ["backbone=swin_v2_tiny_patch2"],
    "v2_dense": ["backbone=swin_v2_tiny_patch2", "method.dense_weight=0.5"],
}
# For each name in the table: the pretraining, and settings of the fine-tuning.
VARIANTS = {
    "from scratch, V2": (None, ["backbone=swin_v2_tiny_patch2"]),
    "V1, table resized bicubically": ("v1", []),
    "V2, normaliser stretched": ("v2", [f"backbone.pretrained_window_size={NEW_WINDOW}"]),
    "V2, re-windowed": ("v2", []),
    "V2 + dense term, re-windowed": ("v2_dense", []),
}
CIFAR_NORMALISATION = [
    "augmentation.mean=[0.4914,0.4822,0.4465]",
    "augmentation.std=[0.2023,0.1994,0.2010]",
]


def mosaics(
    tiles: np.ndarray, labels: np.ndarray, count: int, grid: int, side: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mosaics of random tiles, and their masks of classes.

    Args:
        tiles: (M, height, width, 3) uint8.
        labels: (M,) the class of each tile.
        count: number of mosaics.
        grid: tiles in a row of a mosaic.
        side: side of a tile in the mosaic, px.

    Returns:
        Images (count, grid * side, grid * side, 3) and masks (count, grid * side, grid * side).
    """
    generator = np.random.default_rng(seed)
    images = np.empty((count, grid * side, grid * side, 3), dtype=np.uint8)
    masks = np.empty(images.shape[:3], dtype=np.uint8)
    for number in range(count):
        for row in range(grid):
            for column in range(grid):
                chosen = generator.integers(len(tiles))
                tile = Image.fromarray(tiles[chosen])
                resized = tile.resize((side, side), Image.Resampling.BICUBIC)
                rows = slice(row * side, (row + 1) * side)
                columns = slice(column * side, (column + 1) * side)
                images[number, rows, columns] = resized
                masks[number, rows, columns] = labels[chosen]
    return images, masks


def save_all(arrays: np.ndarray, folder: Path) -> None:
    """Write arrays as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{number:04}.png")


def prepare(archive: Path, folder: Path, scale: Scale) -> None:
    """Write ``unlabelled.npz`` and the folder ``segmentation``, once.

    Raises:
        SystemExit: the folder holds a journey of another scale.
    """
    marker = folder / "scale.json"
    if marker.exists():
        if json.loads(marker.read_text()) != dataclasses.asdict(scale):
            raise SystemExit(f"{folder} holds a journey of another scale: {marker.read_text()}")
        return
    with np.load(archive) as arrays:
        train_tiles = (arrays["train_images"], arrays["train_labels"].ravel())
        test_tiles = (arrays["test_images"], arrays["test_labels"].ravel())
    folder.mkdir(parents=True, exist_ok=True)
    images, _ = mosaics(*train_tiles, scale.pretraining_mosaics, grid=2, side=32, seed=0)
    np.savez(folder / "unlabelled.npz", train_images=images)

    root = folder / "segmentation"
    images, masks = mosaics(*train_tiles, scale.training_mosaics, grid=3, side=48, seed=1)
    save_all(images, root / "images" / "train")
    save_all(masks, root / "masks" / "train")
    images, masks = mosaics(*test_tiles, scale.test_mosaics, grid=3, side=48, seed=2)
    save_all(images, root / "images" / "val")
    save_all(masks, root / "masks" / "val")
    marker.write_text(json.dumps(dataclasses.asdict(scale)))


def call(
    program: Callable[[Any, Path], None],
    name: str,
    schema: type,
    folder: Path,
    overrides: list[str],
) -> dict:
    """Run a program, unless its folder says that it is done. Return its figures."""
    done = folder / "done.json"
    if not done.exists():
        register_schemas()
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = parse(compose(name, overrides), schema)
        program(config, folder)
        done.write_text((folder / "metrics.json").read_text())
    return json.loads(done.read_text())


def pretrain(folder: Path, kind: str, seed: int, scale: Scale) -> Path:
    """Pretrain by MoCo v2 with AdamW. Return the checkpoint."""
    run = folder / f"pretrain_{kind}_{seed}"
    overrides = [
        "data=npz",
        f"data.root={folder / 'unlabelled.npz'}",
        "data.image_size=64",
        "data.num_workers=0",
        f"data.batch_size={scale.pretraining_batch}",
        "method=moco_v2",
        "method.queue_size=4096",
        "method.queue_start=empty",
        "method.key_momentum=0.99",
        "method.projector.hidden_dim=512",
        "augmentation=cifar",
        "augmentation.query.random_resized_crop.scale=[0.2,1.0]",
        "optimizer=adamw",
        "optimizer.lr_for_batch_size=null",
        "optimizer.warmup_epochs=0.5",
        "trainer.gradient_clip_val=5.0",
        f"trainer.max_epochs={scale.pretraining_epochs}",
        "trainer.accelerator=cpu",
        f"seed={seed}",
        *PRETRAINING[kind],
    ]
    call(train.run, "train", TrainConfig, run, overrides)
    return run / "checkpoints" / "last.ckpt"


def fine_tune(folder: Path, name: str, seed: int, scale: Scale) -> float:
    """Fine-tune a variant. Return its mIoU on the mosaics of test images."""
    kind, settings = VARIANTS[name]
    if kind is None:
        start = ["checkpoint=null", *CIFAR_NORMALISATION]
    else:
        start = [f"checkpoint={pretrain(folder, kind, seed, scale)}"]
    run = folder / f"segment_{list(VARIANTS).index(name)}_{seed}"
    overrides = [
        *start,
        f"backbone.window_size={NEW_WINDOW}",
        "data=segmentation_folder",
        f"data.root={folder / 'segmentation'}",
        "data.num_workers=0",
        f"data.batch_size={scale.batch}",
        "data.num_classes=10",
        "image_size=144",
        "augmentation.scale=[1.0,1.5]",
        "decoder=fpn",
        "decoder.channels=128",
        "optimizer.lr=1e-3",
        "optimizer.layer_decay=1",
        f"trainer.max_epochs={scale.epochs}",
        f"evaluation.every_n_epochs={scale.epochs}",
        "evaluation.batch_size=16",
        "trainer.accelerator=cpu",
        f"seed={seed}",
        *settings,
    ]
    figures = call(segment.run, "segment", SegmentConfig, run, overrides)
    return figures["segment/miou"]


def journey(archive: Path, folder: Path, seeds: int, scale: Scale) -> dict[str, list[float]]:
    """Return the mIoU of each variant, seed by seed. Also write it to ``journey.json``."""
    prepare(archive, folder, scale)
    results: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        for name, scores in results.items():
            scores.append(fine_tune(folder, name, seed, scale))
            (folder / "journey.json").write_text(json.dumps(results, indent=1))
    return results


def print_results(results: dict[str, list[float]]) -> None:
    """Print a table with one row for each variant."""
    table = Table(title="Segmentation of mosaics, 64 px to 144 px")
    for column in ("variant", "mIoU, mean", "standard deviation", "each seed"):
        table.add_column(column)
    for name, scores in results.items():
        deviation = ""
        if len(scores) > 1:
            deviation = f"{statistics.stdev(scores):.4f}"
        each_seed = ", ".join(f"{score:.4f}" for score in scores)
        table.add_row(name, f"{statistics.mean(scores):.4f}", deviation, each_seed)
    Console().print(table)


def main() -> None:
    """Run a journey of the scale on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    for field in dataclasses.fields(Scale):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = parser.parse_args()
    settings = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Scale)}
    results = journey(arguments.tiles, arguments.folder, arguments.seeds, Scale(**settings))
    print_results(results)


if __name__ == "__main__":
    main()
