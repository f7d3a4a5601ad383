"""Do seven unlabelled satellite bands help to find water, beside three, and beside no pretraining?

    python scripts/water_journey.py --patches patches.npy --water FOLDER --folder /tmp/water

``patches.npy`` holds unlabelled images (M, 64, 64, 7) uint16 of reflectance x 10,000; ``FOLDER`` is
a segmentation_folder of images with the same bands, int16, and masks of water. Both start with
coastal, blue, green and red. The script pretrains a small ResNet on all bands and on red, green and
blue alone, and segments with each: fine-tuned, frozen under a linear decoder, and by the nearest
neighbours of its patches, all beside a network from scratch. Finished runs are not repeated, and an
interrupted one goes on. The figures are in FOLDER/journey.json: with this file alone in its folder,
another machine goes on with the next backbone.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finished_runs import call
from rich.console import Console
from rich.table import Table

from moco import evaluate, segment, train
from moco.config.pretrained import EvaluateConfig
from moco.config.segment import SegmentConfig
from moco.config.train import TrainConfig

BACKBONE = ["backbone=resnet_tiny", "backbone.stem=cifar"]
PIXELS = ["data.value_range=[0,4000]"]
LOOK = ["augmentation.mean=[0.5]", "augmentation.std=[0.25]"]
BANDS: dict[str, list[str]] = {"7 bands": [], "RGB": ["data.bands=[4,3,2]"]}
CPU = "trainer.accelerator=cpu"

Record = dict[str, Any]
"""What one backbone came to with one seed: its row, seed, scores, and the lengths of its runs."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How long a journey is."""

    pretraining_epochs: int = 400
    """Of 4,232 patches: an hour on two cores."""
    epochs: int = 15
    """Of fine-tuning on 226 images."""
    frozen_epochs: int = 15


def pretrain(patches: Path, folder: Path, bands: str, seed: int, scale: Scale) -> Path:
    """Pretrain on unlabelled patches by MoCo v2. Return the checkpoint."""
    run = folder / f"pretrain_{bands.replace(' ', '_')}_{seed}"
    overrides = [
        *BACKBONE,
        "data=npz",
        f"data.root={patches}",
        *PIXELS,
        *BANDS[bands],
        "data.batch_size=128",
        "data.num_workers=0",
        "augmentation=satellite",
        "method=moco_v2",
        "method.queue_size=2048",
        "method.key_momentum=0.99",
        "optimizer.lr=0.06",
        "optimizer.lr_for_batch_size=128",
        "optimizer.warmup_epochs=5",
        f"trainer.max_epochs={scale.pretraining_epochs}",
        CPU,
        f"seed={seed}",
    ]
    call(train.run, "train", TrainConfig, run, overrides)
    return run / "checkpoints" / "last.ckpt"


def measure(
    water: Path,
    folder: Path,
    name: str,
    checkpoint: Path | None,
    bands: str,
    seed: int,
    scale: Scale,
) -> dict[str, float]:
    """Return the mIoU of one backbone: fine-tuned, frozen, and by nearest neighbours.

    Args:
        name: of the row.
        checkpoint: None: random weights.
        bands: a key of `BANDS`.
    """
    start = [f"checkpoint={checkpoint}" if checkpoint else "checkpoint=null", *LOOK]
    if checkpoint is None:
        start += BACKBONE
    scores = {}
    for kind, settings in {
        "fine-tuned": ["decoder=fpn", "decoder.channels=128", "optimizer.lr=1e-3",
                       f"trainer.max_epochs={scale.epochs}"],
        "frozen, linear": ["freeze_backbone=true", "decoder=linear", "optimizer.lr=1e-2",
                           f"trainer.max_epochs={scale.frozen_epochs}"],
    }.items():  # fmt: skip
        overrides = [
            *start,
            "data=segmentation_folder",
            f"data.root={water}",
            *PIXELS,
            *BANDS[bands],
            "data.batch_size=16",
            "data.num_workers=0",
            "image_size=64",
            "augmentation.scale=[0.8,1.25]",
            "augmentation.color_jitter=null",
            "optimizer.layer_decay=1",
            f"evaluation.every_n_epochs={max(scale.epochs, scale.frozen_epochs)}",
            "evaluation.batch_size=16",
            CPU,
            f"seed={seed}",
            *settings,
        ]
        run = folder / f"{name}_{kind}_{seed}".replace(" ", "_").replace(",", "")
        scores[kind] = call(segment.run, "segment", SegmentConfig, run, overrides)["segment/miou"]
    if checkpoint is not None:
        run = folder / f"{name}_dense_{seed}".replace(" ", "_").replace(",", "")
        overrides = [
            f"checkpoint={checkpoint}",
            "evaluation=dense",
            "evaluation.maps=[2,3]",
            "data=segmentation_folder",
            f"data.root={water}",
            "data.image_size=128",
            "accelerator=cpu",
        ]
        figures = call(evaluate.run, "evaluate", EvaluateConfig, run, overrides)
        scores["frozen, kNN of patches"] = figures["dense/knn_miou"]
    return scores


def journey(arguments: Any, scale: Scale) -> list[Record]:
    """Return what each backbone came to, seed by seed. Also write it to ``journey.json``.

    What that file has already is not measured again.

    Raises:
        SystemExit: the file has figures of other lengths.
    """
    path = arguments.folder / "journey.json"
    records: list[Record] = json.loads(path.read_text()) if path.exists() else []
    lengths = dataclasses.asdict(scale)
    for record in records:
        if record["lengths"] != lengths:
            raise SystemExit(f"{path} has figures of other lengths: {record['lengths']}")
    done = {(record["row"], record["seed"]) for record in records}
    for seed in range(arguments.seeds):
        for bands in BANDS:
            starts = {f"{bands}, {start}": start for start in ("pretrained", "from scratch")}
            for row, start in starts.items():
                if (row, seed) in done:
                    continue
                checkpoint = None
                if start == "pretrained":
                    checkpoint = pretrain(arguments.patches, arguments.folder, bands, seed, scale)
                scores = measure(
                    arguments.water, arguments.folder, row, checkpoint, bands, seed, scale
                )
                records.append({"row": row, "seed": seed, "scores": scores, "lengths": lengths})
                path.write_text(json.dumps(records, indent=1) + "\n")
    return records


def print_results(records: Sequence[Record]) -> None:
    """Print a table with one row for each backbone."""
    of_row: dict[str, dict[str, list[float]]] = {}
    kinds: list[str] = []
    for record in records:
        scores = of_row.setdefault(record["row"], {})
        for kind, score in record["scores"].items():
            scores.setdefault(kind, []).append(score)
            if kind not in kinds:
                kinds.append(kind)
    table = Table(title="Water: mIoU on held-out images, mean ± standard deviation")
    for column in ("backbone", "seeds", *kinds):
        table.add_column(column)
    for row, of_kind in of_row.items():
        cells = [str(max(len(scores) for scores in of_kind.values()))]
        for kind in kinds:
            scores = of_kind.get(kind, [])
            text = f"{statistics.mean(scores):.4f}" if scores else ""
            if len(scores) > 1:
                text += f" ± {statistics.stdev(scores):.4f}"
            cells.append(text)
        table.add_row(row, *cells)
    Console().print(table)


def main() -> None:
    """Run a journey of the scale on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--patches", "--water", "--folder"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    for field in dataclasses.fields(Scale):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = parser.parse_args()
    settings = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Scale)}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print_results(journey(arguments, Scale(**settings)))


if __name__ == "__main__":
    main()
