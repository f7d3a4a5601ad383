"""Measure what matches by location and local crops cost in a training step.

The step works on random tensors in memory. Each switch is compared with the plain method, and the
matches by location with those of DenseCL as well. On a CPU the seconds are processor time, which
other programs on the machine hardly change.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.nets import ON_A_GPU, TINY, Net, Setting
from benchmarks.ours import pair_batch
from benchmarks.peers import Peers
from benchmarks.recipe import KEY_MOMENTUM
from benchmarks.step import CALLS
from benchmarks.turns import Case, Turn, timed
from moco.cli.build_pretraining import build_method
from moco.data.augment.local_crops import LocalCrops
from moco.data.augment.views import ViewPair
from moco.data.loading.loaders import PairBatch
from moco.methods.batch_norm import batch_norm_mode
from moco.methods.momentum import update_key_encoder
from moco.training.hardware import keep_freed_memory

PLAIN = "plain"
DENSE = "dense_match=feature"
DENSE_WEIGHT = "method.dense_weight=0.5"
SWITCHES: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "plain, again": (),
    DENSE: (DENSE_WEIGHT,),
    "dense_match=location": (DENSE_WEIGHT, "method.dense_match=location"),
    "dense_match=both": (DENSE_WEIGHT, "method.dense_match=both"),
    "local_crops=2": ("method.local_crops=2",),
    "local_crops=6": ("method.local_crops=6",),
}
"""The overrides of each contender. The distance of the second ratio from 1 shows how exact the
ratios of these rounds are."""
ON_A_CPU = {
    "ResNet-18, 32 px, batch 64": Net("resnet18_cifar", 32, 64, 4096),
    "ResNet-50, 224 px, batch 8": Net("resnet50", 224, 8, 65536),
    "Swin V2-T, 224 px, batch 8": Net("swin_v2_t", 224, 8, 65536, window_size=7),
}
CROP = {"random_resized_crop": {"scale": [0.2, 1.0]}, "horizontal_flip": {"probability": 0.5}}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """There are none."""


def cases(arguments: argparse.Namespace, peers: Peers) -> Iterator[Case]:
    """Yield a case for each net."""
    device = torch.device(arguments.device)
    num_threads = None if arguments.tiny or device.type == "cuda" else arguments.threads
    nets = ON_A_GPU if device.type == "cuda" else ON_A_CPU
    if arguments.tiny:
        nets = TINY
    for name, net in nets.items():
        contenders: dict[str, Callable[[], Turn]] = {}
        for label, overrides in SWITCHES.items():
            contenders[label] = partial(turn_of, net, Setting(device), overrides)
        yield Case(name, contenders, (PLAIN, DENSE), num_threads=num_threads)


def turn_of(net: Net, setting: Setting, overrides: tuple[str, ...]) -> Turn:
    """Return a turn of one step: training step, backward pass, optimizer, momentum update."""
    keep_freed_memory()  # as `moco.train` does
    method = setting.placed(build_method(net.plain(*overrides)))
    mode = batch_norm_mode("auto", method.key_encoder, 1, setting.device.type)
    method.install_batch_norm(mode)
    optimizer = method.configure_optimizers()
    batch = batch_of(net, setting, method.num_local_crops)

    def step() -> None:
        with setting.autocast():
            loss = method.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_key_encoder(method.key_encoder, method.query_encoder, KEY_MOMENTUM)

    calls = CALLS[setting.device.type]
    clock = time.perf_counter
    if setting.device.type == "cpu":
        clock = time.process_time
    return timed(step, setting.device, images=net.batch_size, calls=calls, clock=clock)


def batch_of(net: Net, setting: Setting, num_local_crops: int) -> PairBatch:
    """Return a batch of noise with the places of drawn crops, and local crops of noise."""
    indices = torch.arange(net.batch_size)
    sizes = torch.full((net.batch_size, 2), net.image_size)
    pair = ViewPair(CROP, CROP, image_size=net.image_size)
    side = LocalCrops(num_local_crops).side(net.image_size)
    local_crops: list[Tensor] = []
    for _ in range(num_local_crops):
        local_crops.append(setting.placed(torch.randn(net.batch_size, 3, side, side)))
    return pair_batch(*setting.views(net))._replace(
        placements=pair.placements(0, indices, sizes).to(setting.device),
        local_crops=tuple(local_crops),
    )
