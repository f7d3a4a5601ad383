"""Measure a training step on random tensors in memory.

It is compared with the bare backbone and with the peers, in each precision and memory format.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import lower_bound, of_lightly, official, ours
from benchmarks.nets import Net, Setting, nets_of
from benchmarks.peers import Peers
from benchmarks.turns import Case, Turn, timed

Step = Callable[[Tensor, Tensor], None]
REFERENCES = ("lower bound", "official", "lightly")
CALLS = {"cpu": 1, "cuda": 5}
"""Steps of one turn. A GPU works on several at once, as in a training."""


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--steps", type=int, default=3, help="steps of the Trainer in one turn")
    parser.add_argument(
        "--compile", choices=("true", "false"), help="also the Trainer with this trainer.compile"
    )


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    """Yield the cases of each net.

    First come all precisions and memory formats, the same for all contenders. Then come our
    defaults against the peers as published.
    """
    device = torch.device(arguments.device)
    # PyTorch manages the memory of a GPU by itself, so there all contenders can share a process.
    num_threads = None if arguments.tiny or device.type == "cuda" else arguments.threads
    for name, net in nets_of(device, arguments.tiny).items():
        layouts = ["contiguous"]
        if not net.window_size:  # a Swin has no choice of memory format
            layouts.append("channels_last")
        for precision in ("fp32", "bf16"):
            for layout in layouts:
                setting = Setting(device, precision, layout)
                contenders = alike(net, setting) | of_peers(net, setting, peers)
                case = f"{name}, {precision}, {layout}"
                yield Case(case, contenders, REFERENCES, num_threads=num_threads)
        setting = Setting(device)
        contenders = {
            "lower bound": partial(one_step, lower_bound.step, net, setting),
            "ours, default settings, Trainer": partial(by_trainer, net, setting, arguments.steps),
        }
        if arguments.compile:
            other = f"trainer.compile={arguments.compile}"
            contenders[f"ours, {other}, Trainer"] = partial(
                by_trainer, net, setting, arguments.steps, other
            )
        contenders |= of_peers(net, setting, peers)
        yield Case(f"{name}, defaults", contenders, REFERENCES, num_threads=num_threads)


def one_step(build: Callable[..., Step], net: Net, setting: Setting, *more: object) -> Turn:
    """Return a turn of the step that `build` makes, always on the same two views."""
    step = partial(build(net, setting, *more), *setting.views(net))
    calls = CALLS[setting.device.type]
    return timed(step, setting.device, images=net.batch_size, calls=calls)


def alike(net: Net, setting: Setting) -> dict[str, Callable[[], Turn]]:
    """Return the lower bound and our method in the same precision and memory format.

    The lower bound takes part twice. The distance of the second ratio from 1 shows how exact the
    ratios of these rounds are.
    """
    steps = {
        "lower bound": partial(one_step, lower_bound.step, net, setting),
        "lower bound, again": partial(one_step, lower_bound.step, net, setting),
        "ours": partial(one_step, ours.step, net, setting),
    }
    if net.has_batch_norm:
        steps["ours, batch_norm=shuffle"] = partial(one_step, ours.step, net, setting, "shuffle")
    return steps


def of_peers(net: Net, setting: Setting, peers: Peers) -> dict[str, Callable[[], Turn]]:
    steps: dict[str, Callable[[], Turn]] = {}
    if "official" in peers:
        build = partial(official.step, peers["official"])
        steps["official"] = partial(one_step, build, net, setting, False)
        steps["official, with its accuracy"] = partial(one_step, build, net, setting, True)
    if "lightly" in peers:
        steps["lightly"] = partial(one_step, of_lightly.step, net, setting)
    return steps


def by_trainer(net: Net, setting: Setting, num_steps: int, *more: str) -> Turn:
    """Return a turn in the Trainer of `moco.train`.

    All settings of speed have their defaults, except for the overrides `more`.
    """
    config = net.config(*ours.for_steps(num_steps, setting.device), *more)
    return ours.training(config, ours.SamePair(config, setting.views(net)))
