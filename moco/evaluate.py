"""Evaluate frozen features: ``python -m moco.evaluate checkpoint=PATH [data=NAME data.root=PATH]``.

The checkpoint is any file of weights that ``docs/weights.md`` lists; with another project's the data have to be named.

A Swin can look through windows of another size than in pretraining, at images of another size:
``data.image_size=565 backbone.window_size=18``.
"""

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.config.pretrained import EvaluateConfig, given_settings, with_defaults, with_usual_settings
from moco.errors import InputError
from moco.launch import launch, save_hydra_files
from moco.methods.pretrained import load_pretrained, log_window_advice

if TYPE_CHECKING:
    import numpy as np
    import torch

    from moco.data.datasets import Labelled
    from moco.models.encoder import Encoder

log = logging.getLogger("moco.evaluate")  # __name__ is __main__ under python -m


def run(config: EvaluateConfig, folder: Path) -> None:
    """Measure as configured; print a table and write the figures as JSON.

    Raises:
        InputError: the checkpoint cannot be used, the data set has no labels, or the backbone has no such window.
    """
    from rich.console import Console

    from moco.data.datasets import build_source
    from moco.evaluation.knn import knn_accuracy
    from moco.evaluation.monitor import protocol
    from moco.models.swin import Swin
    from moco.models.weights import one_or_each
    from moco.training.hardware import choose_device
    from moco.training.progress import print_table
    from moco.training.run_folder import claimed, write_json

    output = Path(config.output) if config.output else folder / "metrics.json"
    if output.is_dir():
        raise InputError(f"output={output}: a folder; expected the name of a file")
    device = choose_device(config.accelerator)
    given = given_settings(config.backbone)
    pretrained = load_pretrained(config.checkpoint, config.evaluation.encoder, given, config.evaluation.feature)
    of_run = with_usual_settings(pretrained.config)
    data = with_defaults(config.data, of_run["data"], new_data=config.data.name is not None)
    if data["name"] is None:
        raise InputError(f"data: missing; {config.checkpoint} does not say it, give data=NAME")
    knn = with_defaults(config.evaluation, of_run["evaluation"]) | {"feature": pretrained.feature}
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
    if source.bank is None or source.queries is None:
        raise InputError(f"data={data['name']}: kNN needs labelled training and test pictures, and this set has none")

    encoder = pretrained.encoder
    transform = with_defaults(config.augmentation, of_run["augmentation"])
    sides = [features_of(encoder, labelled, data, transform, knn, device) for labelled in (source.bank, source.queries)]
    result = knn_accuracy(*sides[0], *sides[1], knn["num_neighbors"], knn["temperature"])
    figures = {
        "knn/top1": result.top1,
        "knn/top5": result.top5,
        **protocol(result, knn["temperature"], knn["feature"]),
        "knn/encoder": knn["encoder"],
        "data": data["name"],
        "image_size": data["image_size"],
        "checkpoint": config.checkpoint,
        "epoch": pretrained.epoch,
        "step": pretrained.step,
    }
    if isinstance(encoder.backbone, Swin):
        figures["window_size"] = one_or_each(encoder.backbone.window_size)
    rows = [(key, f"{value:.4f}" if key in ("knn/top1", "knn/top5") else str(value)) for key, value in figures.items()]
    console = Console()
    print_table(console, "kNN classification of frozen features", rows)
    with claimed(folder, dataclasses.asdict(config)):
        save_hydra_files(folder)
        write_json(output, figures)
    console.print(f"written to {os.path.relpath(output)}", soft_wrap=True, highlight=False)


def features_of(
    encoder: "Encoder",
    labelled: "Labelled",
    data: dict[str, Any],
    transform: dict[str, Any],
    knn: dict[str, Any],
    device: "torch.device",
) -> "tuple[np.ndarray, np.ndarray]":
    """Features (M, D) and labels (M,) of labelled pictures; unreadable ones are left out and counted."""
    from moco.data.datamodule import check_unreadable
    from moco.data.loading import evaluation_loader
    from moco.data.views import build_evaluation_view
    from moco.evaluation.features import embed

    view = build_evaluation_view(data["image_size"], data["crop_ratio"], **transform)
    loader = evaluation_loader(labelled, view, data["image_size"], knn["batch_size"], data["num_workers"])
    encoder.to(device)
    features, labels, unreadable = embed(lambda images: encoder.encode(images, knn["feature"]), loader, device)
    if len(unreadable):
        log.warning("skipped %d unreadable pictures", len(unreadable))
    check_unreadable(set(unreadable.tolist()), labelled.pictures, data["max_bad_fraction"])
    return features, labels


def main() -> None:
    """Entry point of ``moco-evaluate``."""
    launch(run, EvaluateConfig, "evaluate")


if __name__ == "__main__":
    main()
