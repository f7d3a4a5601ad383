"""The command that was typed, with changes, as a line that can be pasted."""

import shlex
from collections.abc import Collection, Sequence

from hydra.core.hydra_config import HydraConfig

from moco.cli.help_pages import command_name
from moco.config.pretrained import EvaluateConfig

OF_HYDRA_ITSELF = "hydra.mode"
"""An override that Hydra adds."""
OF_MEASUREMENT = ("evaluation", "output", "preview", "seed", "hydra.run.dir")
"""What the command of an evaluation says of the measurement alone."""


def typed_command(program: str, drops: Collection[str] = (), extra: Sequence[str] = ()) -> str:
    """Return a command with the overrides of this one.

    Args:
        program: the program of the command, such as ``embed``.
        drops: keys and groups that the command does not have, and with a group all of its keys.
        extra: further words, as they are typed in a shell.
    """
    words = [command_name(program)]
    if HydraConfig.initialized():
        typed = HydraConfig.get().overrides
        for override in [*typed.task, *typed.hydra]:
            key = override.partition("=")[0].lstrip("+~")
            is_dropped = key in drops or key.partition(".")[0] in drops
            if key != OF_HYDRA_ITSELF and not is_dropped:
                words.append(shlex.quote(override))
    return " ".join([*words, *extra])


def after_evaluation(config: EvaluateConfig, figures: Collection[str]) -> list[str]:
    """Return what to type after ``moco.evaluate``: commands with the same checkpoint and images.

    There is none if the measurement was called from Python.

    Args:
        config: of the measurement.
        figures: the names of its scores.
    """
    if not HydraConfig.initialized():
        return []
    if config.checkpoint is None:
        drops = (*OF_MEASUREMENT, "checkpoint", "accelerator", "trust_targets")
        return [typed_command("train", drops)]
    if config.evaluation.name == "segmentation":
        drops = (*OF_MEASUREMENT, "data", "accelerator", "preview")
        return [typed_command("predict", drops, ["data=images", "data.root=PATH"])]
    if config.evaluation.name not in ("knn", "label_free"):
        drops = (*OF_MEASUREMENT, "data", "augmentation", "accelerator")
        return [typed_command("export", drops, ["format=safetensors"])]
    steps = [typed_command("embed", OF_MEASUREMENT, ["output=features.npz"])]
    # A linear classifier takes one class for each image.
    if "knn/top1" in figures and "knn/mean_average_precision" not in figures:
        steps.insert(0, typed_command("evaluate", OF_MEASUREMENT, ["evaluation=linear"]))
    return steps
