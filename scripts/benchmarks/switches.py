"""Measure a training step with a switch of the method beside the step without it.

All steps are on random tensors in memory. The queues are full, as they are for nearly all of a run.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import ours
from benchmarks.nets import TINY, Net, Setting
from benchmarks.peers import Peers
from benchmarks.turns import Case, Turn, timed
from moco.methods.moco import MoCo

PLAIN = "plain"
NEIGHBOURS = {
    PLAIN: (),
    "plain, again": (),
    "neighbours=1": ("method.neighbours=1",),
    "neighbours=5": ("method.neighbours=5",),
    "neighbours=20": ("method.neighbours=20",),
}
DENSE = ("method.dense_weight=0.5",)
FPN = (*DENSE, "method.decoder=fpn")
DECODER = {
    PLAIN: (),
    "dense term": DENSE,
    "dense term on an FPN": FPN,
    "dense term on an FPN of 128 channels": (*FPN, "method.decoder_channels=128"),
}
NETS = {
    "ResNet-18, 32 px, batch 32, K 4096": (Net("resnet18_cifar", 32, 32, 4096), NEIGHBOURS),
    "ResNet-18, 32 px, batch 32, K 65536": (Net("resnet18_cifar", 32, 32, 65536), NEIGHBOURS),
    "ResNet-18, 224 px, batch 8": (Net("resnet18", 224, 8, 4096), DECODER),
    "Swin V2-T, 224 px, batch 4": (Net("swin_v2_t", 224, 4, 4096, window_size=7), DECODER),
}
ON_A_GPU = {
    "ResNet-18, 32 px, batch 512, K 65536": (Net("resnet18_cifar", 32, 512, 65536), NEIGHBOURS),
    "ResNet-50, 224 px, batch 64": (Net("resnet50", 224, 64, 65536), DECODER),
    "Swin V2-T, 224 px, batch 64": (Net("swin_v2_t", 224, 64, 65536, window_size=7), DECODER),
}


@dataclasses.dataclass(frozen=True)
class SwitchedNet(Net):
    """A net whose method has switches of its own."""

    overrides: tuple[str, ...] = ()

    def plain(self, *more: str) -> dict[str, Any]:
        return super().plain(*self.overrides, *more)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU: count the seconds that a process computes, for a machine with other work",
    )


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    """Yield a case for each net. The plain method is its reference."""
    device = torch.device(arguments.device)
    # PyTorch manages the memory of a GPU by itself, so there all contenders can share a process.
    num_threads = None if arguments.tiny or device.type == "cuda" else arguments.threads
    chosen = ON_A_GPU if device.type == "cuda" else NETS
    if arguments.tiny:
        (net,) = TINY.values()
        chosen = {"tiny, neighbours": (net, NEIGHBOURS), "tiny, decoder": (net, DECODER)}
    for name, (net, switches) in chosen.items():
        # The layouts that `moco.train` chooses.
        layout = "channels_last" if net.has_batch_norm else "contiguous"
        setting = Setting(device, arguments.precision, layout)
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        contenders = turns_of(net, setting, switches, clock)
        yield Case(name, contenders, (PLAIN,), num_threads=num_threads)


def turns_of(
    net: Net,
    setting: Setting,
    switches: Mapping[str, tuple[str, ...]],
    clock: Callable[[], float],
) -> dict[str, Callable[[], Turn]]:
    """Return what builds the turn of each contender."""
    turns = {}
    for name, overrides in switches.items():
        switched = SwitchedNet(**dataclasses.asdict(net), overrides=overrides)
        turns[name] = partial(one_step, switched, setting, clock)
    return turns


def one_step(net: Net, setting: Setting, clock: Callable[[], float]) -> Turn:
    """Return a turn of one step, always on the same two views."""
    step = ours.step(net, setting, prepare=fill_queues)
    work = partial(step, *setting.views(net))
    return timed(work, setting.device, images=net.batch_size, clock=clock)


def fill_queues(method: MoCo) -> None:
    """Let the random keys of all queues count as keys of images."""
    for queue in [*method.queues, *method.dense_queues]:
        queue.enqueue(queue.keys.clone())
