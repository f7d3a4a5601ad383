"""Check that a resumed run ends in the same bits as an uninterrupted one."""

from pathlib import Path
from typing import Any

import torch

from gpu_parts import shapes
from gpu_parts.measuring import Context, Unmet, measured
from gpu_parts.results import Result
from gpu_parts.rows import DIFFERENT, EAGER
from moco.train import run

STOP, END = 3, 6
"""Steps."""


def measure(case: str, context: Context) -> list[Result]:
    """Compare the last checkpoints of both runs.

    Raises:
        Unmet: they differ, though nothing was compiled.
    """
    is_compiled = case != EAGER and not context.is_rehearsal
    whole, parts = context.scratch / f"{case} whole", context.scratch / f"{case} parts"
    for folder, steps in ((whole, END), (parts, STOP), (parts, END)):
        run(config_of(context, steps, is_compiled), folder)
    one, other = tensors_of(whole), tensors_of(parts)
    if one.keys() != other.keys():
        raise Unmet("the checkpoints do not have the same tensors")
    different = [name for name in one if not torch.equal(one[name], other[name])]
    note = f"of {len(one)} in the checkpoint"
    if different:
        largest = max(distance(one[name], other[name]) for name in different)
        note += f", by up to {largest:.1g}"
    if different and case == EAGER:
        names = ", ".join(different[:3])
        raise Unmet(f"{len(different)} tensors differ, {note}: {names} ...")
    if case != EAGER and context.is_rehearsal:
        note += ", not compiled, as there is no GPU"
    return [measured(case, DIFFERENT, "tensors", len(different), note=note)]


def config_of(context: Context, num_steps: int, is_compiled: bool) -> Any:
    """Return the config of a run whose steps are all in the first epoch."""
    (net,) = context.sizes.trainings.values()
    archive = context.scratch / "shapes.npz"
    if not archive.exists():
        shapes.write(archive, (END + 2) * net.batch_size, 0, net.image_size, has_labels=False)
    return net.config(
        "data=npz",
        f"data.root={archive}",
        "data.num_workers=0",
        "augmentation=cifar",
        "optimizer.schedule=constant",
        f"trainer.accelerator={context.device.type}",
        "trainer.deterministic=true",
        f"trainer.compile={str(is_compiled).lower()}",
        f"trainer.max_steps={num_steps}",
        "evaluation.plots_every_n_epochs=null",
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of model and optimizer in the run's last checkpoint, by name."""
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, map_location="cpu", weights_only=True)
    found = dict(content["state_dict"])
    for number, state in content["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                found[f"optimizer.{number}.{name}"] = value
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two tensors of the same shape."""
    return float((one.double() - other.double()).abs().max())
