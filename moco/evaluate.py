"""Evaluate frozen features: ``python -m moco.evaluate checkpoint=PATH [evaluation=KIND]``."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.checks import check_masked_data, check_output, check_weights
from moco.cli.launch import hydra_files, launch
from moco.config.pretrained import (
    EvaluateConfig,
    check_settings,
    data_settings,
    given_settings,
    with_defaults,
    with_usual_settings,
)
from moco.phases import LOADING, phase

REPORT = "report"
"""The folder of the plots and the page that shows them, in the run folder."""

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moco.evaluation.subject import Subject
    from moco.weights.load_encoder import Pretrained


def run(config: EvaluateConfig, folder: Path) -> None:
    """Measure as configured, print the tables, and write the figures as JSON.

    Raises:
        InputError: the checkpoint or the data cannot be used, or the backbone has no such window.
        RunError: the machine ran out of memory or disk.
    """
    check_settings(config)
    output = Path(config.output) if config.output else folder / "metrics.json"
    check_output(output)
    check_weights(config.checkpoint)
    if config.data.root is not None:
        check_masked_data(config.data.name, config.data.root, is_trained_on=False)
    with phase(LOADING, unit=""):
        from moco.cli import measured_segmenter
        from moco.cli.closing_tables import (
            condition_in_words,
            is_sweep_job,
            print_next,
            print_plain,
            shown,
            two_columns,
        )
        from moco.cli.typed_command import after_evaluation
        from moco.evaluation.measurements import measure
        from moco.evaluation.reports.page import report_page
        from moco.runs.atomic_files import write_atomically, write_json
        from moco.runs.failures import failures_without_training_named
        from moco.runs.run_folder import claimed
        from moco.screen import screen

    failures_named = partial(failures_without_training_named, "evaluation.batch_size")
    with failures_named():
        if config.evaluation.name == "segmentation":
            findings, origin = measured_segmenter.measure(config)
        else:
            with phase("reading the checkpoint", unit=""):
                subject, pretrained = subject_of(config, folder)
            findings = measure(subject)
            origin = origin_of(subject, pretrained)
    console = screen.console
    rows = [(key, shown(value)) for key, value in findings.scores.items()]
    for key, value in {**findings.protocol, **origin}.items():
        rows.append((key, condition_in_words(key, value)))
    tables = [two_columns(findings.title, rows), *findings.tables]
    page = report_page(findings.title, findings.headline, tables, findings.plots)
    show(console, folder, findings.headline, tables)
    files = {folder / name: write for name, write in findings.files.items()}
    for name, write in findings.plots.items():
        files[folder / REPORT / name] = write
    files[folder / REPORT / "index.html"] = lambda file: file.write(page.encode())
    with failures_named(), claimed(folder, dataclasses.asdict(config), hydra_files()):
        for path, write in files.items():
            write_atomically(path, write)
        write_json(output, {**findings.scores, **findings.protocol, **findings.details, **origin})
    if is_sweep_job():
        return
    for path in [*files, output]:
        if path.suffix != ".png":  # the page shows them
            print_plain(console, f"written to {os.path.relpath(path)}")
    print_next(console, after_evaluation(config, findings.scores))


def show(console: "Console", folder: Path, headline: str, tables: Sequence["Table"]) -> None:
    """Print the result; in a sweep it is one line, as the table of all jobs comes at the end."""
    from moco.cli.closing_tables import is_sweep_job, print_plain, print_titled

    if is_sweep_job():
        print_plain(console, f"job {folder.name} is done: {headline}")
        return
    print_plain(console, headline)
    for table in tables:
        print_titled(console, table)


def subject_of(config: EvaluateConfig, folder: Path) -> "tuple[Subject, Pretrained]":
    """Return the encoder with all settings resolved, and the checkpoint that it is from.

    Without a checkpoint it is a network with random weights, and all settings are the usual ones.
    """
    from moco.evaluation.subject import Subject
    from moco.models.contract import check_feature_maps
    from moco.training.hardware import choose_device
    from moco.weights.load_encoder import fit_to_data, load_pretrained
    from moco.weights.untrained import build_untrained, rebuild_for_data

    device = choose_device(config.accelerator)
    given = given_settings(config.backbone)
    asked = config.evaluation
    if config.checkpoint is None:
        pretrained = build_untrained(given, config.seed)
        at_data = partial(rebuild_for_data, pretrained, given, config.seed)
    else:
        pretrained = load_pretrained(
            config.checkpoint,
            asked.encoder,
            given,
            asked.feature,
            trust_targets=config.trust_targets,
        )
        at_data = partial(fit_to_data, pretrained, given)
    if asked.name == "dense":
        check_feature_maps(pretrained.encoder.backbone, "evaluation=dense")
    run_settings = with_usual_settings(pretrained.config)
    data = data_settings(config, run_settings["data"])
    settings = with_defaults(config.evaluation, run_settings["evaluation"])
    views = run_settings["augmentation"]
    # Weights of other projects do not say how their views were made.
    pair = {"query": views["query"], "key": views["key"]} if views["query"] else {}
    subject = Subject(
        encoder=pretrained.encoder.to(device),
        data=data,
        augmentation=with_defaults(config.augmentation, views),
        settings=settings | {"feature": pretrained.feature},
        device=device,
        folder=folder,
        checkpoint=None if config.checkpoint is None else Path(config.checkpoint),
        backbone=pretrained.settings,
        at_data=at_data,
        shown_bands=config.preview.bands,
        pair=pair,
        num_steps=pretrained.step,
    )
    return subject, pretrained


def origin_of(subject: "Subject", pretrained: "Pretrained") -> dict[str, Any]:
    """Return what was measured, under the names of ``metrics.json``."""
    from moco.models.swin.backbone import Swin, one_or_each

    origin = {
        "data": subject.data["name"],
        "image_size": subject.data["image_size"],
        "checkpoint": None if subject.checkpoint is None else str(subject.checkpoint),
        "epoch": pretrained.epoch,
        "step": pretrained.step,
    }
    if isinstance(subject.encoder.backbone, Swin):
        origin["window_size"] = one_or_each(subject.encoder.backbone.window_size)
    return origin


def main() -> None:
    """Entry point of ``moco-evaluate``."""
    launch(run, "evaluate")


if __name__ == "__main__":
    main()
