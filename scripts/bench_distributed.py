"""What the processes of a training pay for each other, in interleaved runs on gloo: a step with and without broadcasts.

    python scripts/bench_distributed.py [--processes 2] [--repeats 7] [--queue-size 65536]

Times, of one small encoder with MoCo's queue beside it: a step as we run it; the same with DistributedDataParallel's
default, which sends rank 0's buffers (queue and running statistics) to the others in every step; and shuffling the keys'
images with every row sent to the one process that needs it, against gathering all rows everywhere.
"""

import argparse
import statistics
import time
from functools import partial

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
    """Little to compute, a queue to broadcast."""

    def __init__(self, queue_size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
        )
        self.queue = KeyQueue(queue_size, 128)

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


def each_row_to_one(images: Tensor) -> Tensor:
    """Shuffling as this project does it."""
    return distributed.Shuffle(len(images), images.device).shuffled(images)


def gathered_everywhere(images: Tensor) -> Tensor:
    """Shuffling as the official code does it: every process gets all images and keeps its share."""
    everything = distributed.all_gather(images)
    order = torch.randperm(len(everything))
    dist.broadcast(order, src=0)
    return everything[order.chunk(distributed.world_size())[distributed.rank()]]


def timed(work: object) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()  # type: ignore[operator]
    dist.barrier()
    return time.perf_counter() - began


def measure(processes: int, repeats: int, queue_size: int, stop: StopRequest) -> None:
    torch.set_num_threads(1)
    environment = distributed.environment_of(processes, 1)
    with distributed.process_group(environment, "gloo", timeout_minutes=10):
        torch.manual_seed(0)
        models = {
            name: DistributedDataParallel(
                Encoder(queue_size), **{buffers_switch(): name == "step, broadcasting buffers"}
            )
            for name in ("step", "step, broadcasting buffers")
        }
        rows, images = torch.randn(64, 512), torch.randn(32, 3, 224, 224)
        work = {name: partial(step, model, rows) for name, model in models.items()}
        work |= {
            "shuffling, each row to one": partial(each_row_to_one, images),
            "shuffling, all rows to all": partial(gathered_everywhere, images),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(repeats + 1):  # the first of each is thrown away
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
    with StopRequest() as stop:
        run_on_devices(
            measure,
            tuple(vars(arguments).values()),
            arguments.processes,
            stop,
            lambda: "nothing was saved",
        )


if __name__ == "__main__":
    main()
