"""Measure what the communication between the processes of a training costs, on gloo.

    python scripts/bench_distributed.py [--processes 2] [--repeats 7] [--queue-size 65536]

The model is a small encoder with MoCo's queue. The script measures in turns:
- a step as we run it;
- the same step with the default of DistributedDataParallel, which sends the buffers of rank 0 (the
  queue and the running statistics) to the others in every step;
- shuffling the images of the keys, with each row sent only to the process that needs it;
- shuffling with all rows gathered by every process.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moco.methods.key_queue import KeyQueue
from moco.runs.interrupts import StopRequest
from moco.training.distributed import collectives as distributed
from moco.training.distributed.processes import run_on_devices
from moco.training.trainer import buffers_switch


class Encoder(nn.Module):
    """A model with little to compute and a queue to broadcast."""

    def __init__(self, queue_size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
        )
        self.queue = KeyQueue(queue_size, 128)

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


def each_row_to_one(images: Tensor) -> Tensor:
    """Shuffle as this project does."""
    return distributed.Shuffle(len(images), images.device).shuffled(images)


def gathered_everywhere(images: Tensor) -> Tensor:
    """Shuffle as the official code does: every process gets all images and keeps its share."""
    everything = distributed.all_gather(images)
    order = torch.randperm(len(everything))
    dist.broadcast(order, src=0)
    return everything[order.chunk(distributed.world_size())[distributed.rank()]]


def timed(work: Callable[[], object]) -> float:
    """Return the seconds until the work is done in all processes."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def measure(processes: int, repeats: int, queue_size: int, stop: StopRequest) -> None:
    torch.set_num_threads(1)
    environment = distributed.environment_of(processes, 1)
    with distributed.process_group(environment, "gloo", timeout_minutes=10):
        torch.manual_seed(0)
        quiet = DistributedDataParallel(Encoder(queue_size), **{buffers_switch(): False})
        broadcasting = DistributedDataParallel(Encoder(queue_size), **{buffers_switch(): True})
        rows, images = torch.randn(64, 512), torch.randn(32, 3, 224, 224)
        work = {
            "step": partial(step, quiet, rows),
            "step, broadcasting buffers": partial(step, broadcasting, rows),
            "shuffling, each row to one": partial(each_row_to_one, images),
            "shuffling, all rows to all": partial(gathered_everywhere, images),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(repeats + 1):  # the first time of each is discarded
            for name, call in work.items():
                times[name].append(timed(call))
        if distributed.rank() == 0:
            for name, seconds in times.items():
                print(f"{name:32} {1000 * statistics.median(seconds[1:]):8.1f} ms")


def step(model: DistributedDataParallel, rows: Tensor) -> None:
    model(rows).square().mean().backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--queue-size", type=int, default=65536)
    arguments = parser.parse_args()
    given = (arguments.processes, arguments.repeats, arguments.queue_size)
    with StopRequest() as stop:
        run_on_devices(measure, given, arguments.processes, stop, Path())


if __name__ == "__main__":
    main()
