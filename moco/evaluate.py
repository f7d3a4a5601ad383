"""Evaluate frozen features: ``python -m moco.evaluate checkpoint=PATH [evaluation=KIND] [data=NAME data.root=PATH]``.

The checkpoint is any file of weights that ``docs/weights.md`` lists; with another project's the data have to be named.

A Swin can look through windows of another size than in pretraining, at images of another size:
``data.image_size=565 backbone.window_size=18``.
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.checks import check_output
from moco.cli.launch import launch, save_hydra_files
from moco.config.pretrained import (
    EvaluateConfig,
    check_settings,
    given_settings,
    with_defaults,
    with_usual_settings,
)
from moco.errors import InputError
from moco.weights.pretrained import load_pretrained, log_window_advice

if TYPE_CHECKING:
    from moco.evaluation.subject import Findings, Subject
    from moco.weights.pretrained import Pretrained


def run(config: EvaluateConfig, folder: Path) -> None:
    """Measure as configured; print tables and write the figures as JSON.

    Raises:
        InputError: the checkpoint cannot be used, the data do not suit the measurement, or the backbone has no such window.
        RunError: the machine gave out.
    """
    from moco.runs.atomic_files import write_atomically, write_json
    from moco.runs.failures import failures_without_training_named
    from moco.runs.run_folder import claimed

    check_settings(config)
    output = Path(config.output) if config.output else folder / "metrics.json"
    check_output(output)
    with failures_without_training_named("evaluation.batch_size"):
        subject, pretrained = subject_of(config, folder)
        findings = measure(subject)
    origin = origin_of(subject, pretrained)
    console = show(findings, origin)
    with (
        failures_without_training_named("evaluation.batch_size"),
        claimed(folder, dataclasses.asdict(config)),
    ):
        save_hydra_files(folder)
        for name, write in findings.files.items():
            write_atomically(folder / name, write)
        write_json(output, {**findings.scores, **findings.protocol, **findings.details, **origin})
    for path in [*(folder / name for name in findings.files), output]:
        console.print(f"written to {os.path.relpath(path)}", soft_wrap=True, highlight=False)


def measure(subject: "Subject") -> "Findings":
    """What the kind of measurement that is configured finds."""
    if subject.settings["name"] == "knn":
        from moco.evaluation.knn_measurement import measure_knn

        return measure_knn(subject)
    if subject.settings["name"] == "dense":
        from moco.evaluation.dense_measurement import measure_dense

        return measure_dense(subject)
    if subject.settings["name"] == "linear":
        from moco.evaluation.linear_measurement import measure_linear

        return measure_linear(subject)
    if subject.settings["name"] == "linear_official":
        from moco.evaluation.linear_official import measure_linear_official

        return measure_linear_official(subject)
    raise AssertionError(subject.settings["name"])  # the schema knows the choices


def subject_of(config: EvaluateConfig, folder: Path) -> "tuple[Subject, Pretrained]":
    """The encoder with all settings resolved, and where it is from.

    Raises:
        InputError: the checkpoint cannot be used, or nobody says which data.
    """
    from moco.evaluation.subject import Subject
    from moco.training.hardware import choose_device

    device = choose_device(config.accelerator)
    given = given_settings(config.backbone)
    pretrained = load_pretrained(
        config.checkpoint, config.evaluation.encoder, given, config.evaluation.feature
    )
    of_run = with_usual_settings(pretrained.config)
    data = with_defaults(config.data, of_run["data"], new_data=config.data.name is not None)
    if data["name"] is None:
        raise InputError(f"data: missing; {config.checkpoint} does not say it, give data=NAME")
    subject = Subject(
        pretrained.encoder.to(device),
        data,
        with_defaults(config.augmentation, of_run["augmentation"]),
        with_defaults(config.evaluation, of_run["evaluation"]) | {"feature": pretrained.feature},
        device,
        folder,
        Path(config.checkpoint),
        pretrained.settings,
        lambda image_size: log_window_advice(pretrained, given, image_size),
        {
            side: of_run["augmentation"][side]
            for side in ("query", "key")
            if of_run["augmentation"]["query"]
        },
    )
    return subject, pretrained


def origin_of(subject: "Subject", pretrained: "Pretrained") -> dict[str, Any]:
    """What was measured, under the names of ``metrics.json``."""
    from moco.models.swin.backbone import Swin
    from moco.weights.library_names import one_or_each

    origin = {
        "data": subject.data["name"],
        "image_size": subject.data["image_size"],
        "checkpoint": str(subject.checkpoint),
        "epoch": pretrained.epoch,
        "step": pretrained.step,
    }
    if isinstance(subject.encoder.backbone, Swin):
        origin["window_size"] = one_or_each(subject.encoder.backbone.window_size)
    return origin


def show(findings: "Findings", origin: dict[str, Any]) -> Any:
    """Print the tables; the console."""
    from rich.console import Console

    from moco.cli.progress import print_table

    console = Console()
    rows = [(key, f"{value:.4f}") for key, value in findings.scores.items()]
    rows += [(key, str(value)) for key, value in {**findings.protocol, **origin}.items()]
    print_table(console, findings.title, rows)
    for table in findings.tables:
        console.print(table)
    return console


def main() -> None:
    """Entry point of ``moco-evaluate``."""
    launch(run, EvaluateConfig, "evaluate")


if __name__ == "__main__":
    main()
