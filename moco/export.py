"""Write a backbone's weights for other libraries.

``python -m moco.export checkpoint=PATH format=torchvision|timm|smp|safetensors [output=FILE]``
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.checks import check_output, check_weights
from moco.cli.default_outputs import export_file
from moco.cli.launch import hydra_files, launch
from moco.config.pretrained import ExportConfig, given_settings, image_size_of, with_usual_settings
from moco.phases import LOADING, phase

if TYPE_CHECKING:
    from moco.weights.load_encoder import Pretrained

# torch is imported in `run`: the help page and a wrong command line need none of it.


def run(config: ExportConfig, folder: Path) -> None:
    """Write the file; print what is in it and the lines that load it.

    Args:
        folder: keeps a record of the config.

    Raises:
        InputError: the checkpoint cannot be read, the library has no such model, or the file
            cannot be written.
        RunError: the disk is full.
    """
    check_weights(config.checkpoint)
    with phase(LOADING, unit=""):
        import torch

        from moco.cli.closing_tables import print_plain, print_table
        from moco.runs.atomic_files import write_atomically
        from moco.runs.failures import failures_without_training_named
        from moco.runs.run_folder import claimed
        from moco.screen import screen
        from moco.weights.exporting import (
            ENDINGS,
            check_ending,
            deviation,
            export_content,
            loading_lines,
            summary_rows,
        )
        from moco.weights.load_encoder import load_pretrained

    file_format = config.format
    if config.output is None:
        output = export_file(config.checkpoint, file_format, ENDINGS[file_format][0], folder)
    else:
        output = Path(config.output)
    check_output(output)
    check_ending(output, file_format)
    with phase("reading the checkpoint", unit=""):
        pretrained = load_pretrained(
            config.checkpoint,
            config.encoder,
            given_settings(config.backbone),
            trust_targets=config.trust_targets,
        )
    # Readers of weights expect the usual memory format.
    backbone: Any = pretrained.encoder.backbone.to(memory_format=torch.contiguous_format)
    settings = pretrained.settings
    about = about_weights(config, pretrained)
    image_size = about["image_size"]

    content = export_content(file_format, output, backbone, settings, about)
    with failures_without_training_named("batch_size", "change output=FILE"):
        write_atomically(output, lambda file: file.write(content))
        with claimed(folder, dataclasses.asdict(config), hydra_files()):
            pass  # a record of the settings

    console = screen.console
    print_table(console, f"Exported for {file_format}", summary_rows(backbone, settings, about))
    print_plain(console, f"written to {os.path.relpath(output)}; to load it:")
    for line in loading_lines(file_format, output, backbone, settings, image_size):
        print_plain(console, f"    {line}")
    note = deviation(file_format, backbone, image_size)
    if note is not None:
        print_plain(console, f"note: {note}")


def about_weights(config: ExportConfig, pretrained: "Pretrained") -> dict[str, Any]:
    """Return what a user of the weights needs to know about them.

    The image size is the given one. By default it is the checkpoint's, in proportion to a new
    attention window.

    Raises:
        InputError: no image size is given, and the checkpoint does not say one.
    """
    of_run = with_usual_settings(pretrained.config)
    image_size = image_size_of(config, of_run["data"])
    if config.image_size is None and pretrained.window_size is not None:
        backbone: Any = pretrained.encoder.backbone
        image_size = round(image_size * backbone.window_size[0] / pretrained.window_size[0])
    return {
        "image_size": image_size,
        "mean": of_run["augmentation"]["mean"],
        "std": of_run["augmentation"]["std"],
        "encoder": config.encoder,
        "epoch": pretrained.epoch,
        "step": pretrained.step,
        "checkpoint": config.checkpoint,
    }


def main() -> None:
    """Run the command ``moco-export``."""
    launch(run, "export")


if __name__ == "__main__":
    main()
