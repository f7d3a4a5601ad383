"""A training step on random tensors in memory, against the bare backbone and the peers, in each precision and layout."""

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
"""Steps of one turn; on a GPU several are on their way at once, as in a training."""


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--steps", type=int, default=3, help="of the Trainer in one turn")
    parser.add_argument(
        "--compile", choices=("true", "false"), help="also the Trainer with this trainer.compile"
    )


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    """For each net: each precision and layout, all alike; then our defaults against what the others run as published."""
    device = torch.device(arguments.device)
    # A GPU's memory is PyTorch's own business, so there all can share a process.
    num_threads = None if arguments.tiny or device.type == "cuda" else arguments.threads
    for name, net in nets_of(device, arguments.tiny).items():
        layouts = (
            ("contiguous",) if net.window_size else ("contiguous", "channels_last")
        )  # a Swin has no layout
        for precision in ("fp32", "bf16"):
            for layout in layouts:
                setting = Setting(device, precision, layout)
                contenders = alike(net, setting) | of_peers(net, setting, peers)
                yield Case(
                    f"{name}, {precision}, {layout}",
                    contenders,
                    REFERENCES,
                    num_threads=num_threads,
                )
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
    """A turn of a step that `build` makes, on the same two views."""
    step = build(net, setting, *more)
    calls = CALLS[setting.device.type]
    return timed(
        partial(step, *setting.views(net)), setting.device, images=net.batch_size, calls=calls
    )


def alike(net: Net, setting: Setting) -> dict[str, Callable[[], Turn]]:
    """The lower bound, and the method in the same precision and layout.

    The lower bound takes part twice: how far the second is from 1 tells what a ratio of these rounds can tell.
    """
    steps = {
        "lower bound": partial(one_step, lower_bound.step, net, setting),
        "lower bound, again": partial(one_step, lower_bound.step, net, setting),
        "ours": partial(one_step, ours.step, net, setting),
    }
    if net.has_batch_norm:  # without it there is one way only
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
    """As `moco.train` runs it, all settings that concern speed at their defaults but for the overrides `more`."""
    config = net.config(*ours.for_steps(num_steps, setting.device), *more)
    return ours.training(config, ours.SamePair(config, setting.views(net)))
