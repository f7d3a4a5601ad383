"""Do two parts of one image make a better pair than two views of one part?

    python scripts/group_pairs.py --images EUROSAT --folder /tmp/groups [--seeds 3] [--steps 1500]

EUROSAT is an image_folder, with or without a validation folder. Its images of 64 px are read as
four tiles of 32 px each (``data.tile=32``), and the four tiles of an image are a group. A small
ResNet is pretrained by MoCo v2 with the pairs ``same`` and ``group``, and with ``group`` where the
keys of the own group are no negatives. Its kNN accuracy on held-out tiles is compared. Finished
runs are not repeated, and an interrupted one goes on.
"""

import argparse
import json
import statistics
from pathlib import Path

from finished_runs import call
from rich.console import Console
from rich.table import Table

from moco import train
from moco.config.train import TrainConfig

GROUP = r"data.group='(?P<group>[^#]+)'"
VARIANTS = {
    "same": ["data.pair=same"],
    "group": ["data.pair=group", GROUP],
    "group, own group masked": ["data.pair=group", GROUP, "method.mask_own_group=true"],
}


def pretrain(arguments: argparse.Namespace, name: str, seed: int) -> dict:
    """Return the figures of one run."""
    run = arguments.folder / f"{list(VARIANTS).index(name)}_{seed}"
    overrides = [
        "backbone=resnet_tiny",
        "data=image_folder",
        f"data.root={arguments.images}",
        "data.tile=32",
        "data.image_size=32",
        "data.batch_size=128",
        "data.num_workers=1",
        "augmentation=cifar",
        "method=moco_v2",
        "method.queue_size=4096",
        "method.key_momentum=0.99",
        "optimizer.lr=0.06",
        "optimizer.lr_for_batch_size=128",
        "trainer.max_epochs=100",
        f"trainer.max_steps={arguments.steps}",
        "evaluation.baselines=false",
        "evaluation.every_n_epochs=100",
        "evaluation.plots_every_n_epochs=null",
        "evaluation.projector_images=0",
        "trainer.accelerator=cpu",
        f"seed={seed}",
        *VARIANTS[name],
    ]
    return call(train.run, "train", TrainConfig, run, overrides)


def main() -> None:
    """Run all variants with all seeds, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(arguments.seeds):
        for name, scores in results.items():
            scores.append(pretrain(arguments, name, seed)["knn/top1"])
            (arguments.folder / "groups.json").write_text(json.dumps(results, indent=1))
    table = Table(title=f"kNN of tiles after {arguments.steps} steps")
    for column in ("pair", "top-1, mean", "standard deviation", "each seed"):
        table.add_column(column)
    for name, scores in results.items():
        deviation = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        each_seed = ", ".join(f"{score:.4f}" for score in scores)
        table.add_row(name, f"{statistics.mean(scores):.4f}", deviation, each_seed)
    Console().print(table)


if __name__ == "__main__":
    main()
