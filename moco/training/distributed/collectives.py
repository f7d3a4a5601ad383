"""What the processes of a training say to each other; on one process everything is the identity. N: batch per process.

Tensors of the method travel in the default process group (NCCL between GPUs, gloo between CPUs). What else is said in every
step travels in a second group, over the CPU; with the same time-out, so that a process that hangs ends the run. What the
others wait for while one process works travels in a third, the control group, whose time-out is long.
"""

import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor

from moco.errors import InputError, PeerLost, RunError

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""Of the control group: so long may the others wait while one process searches, writes or is suspended."""

ROWS_AT_ONCE = 2**26
"""Bytes of one message of `gather_rows`."""

_control: dist.ProcessGroup | None = None
_steps: dist.ProcessGroup | None = None


def environment_of(num_devices: int, num_nodes: int) -> ClusterEnvironment:
    """Who starts the processes: torchrun, srun with several tasks, or else nobody.

    Raises:
        InputError: they started another number of processes than the config has devices, or nodes need a launcher.
    """
    environment: ClusterEnvironment
    if TorchElasticEnvironment.detect():
        environment, launcher = TorchElasticEnvironment(), "torchrun"
    elif "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # auto_requeue would be Lightning's own answer to the scheduler's signal, beside ours.
        environment, launcher = SLURMEnvironment(auto_requeue=False), "srun"
    elif num_nodes > 1:
        raise InputError(
            f"trainer.num_nodes={num_nodes}: start one process per device with srun or torchrun"
        )
    else:
        return LightningEnvironment()
    if environment.world_size() != num_devices * num_nodes:
        raise InputError(
            f"{launcher} started {environment.world_size()} processes, but trainer.devices={num_devices} on "
            f"trainer.num_nodes={num_nodes} need {num_devices * num_nodes}"
        )
    return environment


@contextmanager
def process_group(
    environment: ClusterEnvironment, backend: str, timeout_minutes: float
) -> Iterator[None]:
    """Inside, the processes that a launcher started can talk to each other.

    Args:
        environment: knows this process's rank; `LightningEnvironment` stands for one process alone.
        backend: of the default group: ``nccl`` or ``gloo``.
        timeout_minutes: so long may a process wait for the others in the default group.
    """
    global _control, _steps
    if isinstance(environment, LightningEnvironment) and "MOCO_RENDEZVOUS" not in os.environ:
        yield
        return
    timeout = timedelta(minutes=timeout_minutes)
    if isinstance(
        environment, LightningEnvironment
    ):  # started by moco.training.distributed.processes, all on this machine
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, loopback())  # nobody outside has to reach them
        rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        place = f"file://{os.environ['MOCO_RENDEZVOUS']}"
        dist.init_process_group(
            backend, init_method=place, rank=rank, world_size=size, timeout=timeout
        )
    else:
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        rank, size = environment.global_rank(), environment.world_size()
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    _steps = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    _control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield
    finally:
        _control = _steps = None
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def loopback() -> str:
    """The name of the network interface that leads back to this machine."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def new_rendezvous() -> Path:
    """A file that does not exist yet, in a folder of its own, where processes of this machine can meet."""
    return Path(tempfile.mkdtemp(prefix="moco-")) / "rendezvous"


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def lost_peers_named() -> Iterator[None]:
    """Inside, a connection that breaks because another process ended becomes a `PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and is_lost_connection(error):
            raise PeerLost(
                f"rank {rank()} lost the connection to another process, which has ended or hangs; its own message, or "
                f"that of srun or torchrun, says why ({str(error).splitlines()[0]})"
            ) from error
        raise


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because a process on the other side did."""
    of_gloo = "/gloo/" in str(error) or "Connection closed by peer" in str(error)
    return not isinstance(error, RunError) and (isinstance(error, dist.DistError) or of_gloo)


def collective(call: Callable[..., Any], output: Tensor, *inputs: Tensor, **options: Any) -> Any:
    """Call a collective of torch.distributed on contiguous memory, which NCCL and gloo ask for; return what it returns.

    Args:
        call: such as ``dist.broadcast``; it fills `output`, or changes it in place.
        output: gets the result, whatever its strides.
        inputs: copied first where they are not contiguous.
        options: of `call`, such as ``group``. With ``async_op`` the output has to be contiguous.
    """
    dense = output.contiguous()
    returned = call(dense, *(tensor.contiguous() for tensor in inputs), **options)
    if dense is not output:
        output.copy_(dense)
    return returned


def exchanged(call: Callable[..., Any], rows: Tensor, num_rows: int, **options: Any) -> Tensor:
    """Return the `num_rows` rows that a collective gives this process for its own `rows` (N, ...), in their layout."""
    is_channels_last = rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and not rows.is_contiguous():
        inner = exchanged(
            call, rows.permute(0, 2, 3, 1), num_rows, **options
        )  # as they lie in memory: no copy
        return inner.permute(0, 3, 1, 2)
    received = rows.new_empty(num_rows, *rows.shape[1:])
    collective(call, received, rows, **options)
    return received


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Return the rows of every process in rank order: (N, ...) to (N * world size, ...); no gradient."""
    if world_size() == 1:
        return tensor
    return exchanged(dist.all_gather_into_tensor, tensor, len(tensor) * world_size())


class Route(NamedTuple):
    """How rows travel between the processes. On one process they only change places."""

    sending: Tensor
    """(N,) this process's rows in the order in which they are sent."""
    taking: Tensor | None = None
    """(N,) which received row comes to each place; None on one process."""
    num_sent: list[int] | None = None
    """Rows for each process."""
    num_received: list[int] | None = None
    """Rows from each process."""


class Shuffle:
    """One random order of the rows of all processes, for every tensor of a view: the way there and back.

    The order is drawn on rank 0 and sent to the others. Every row travels to one process only, so a process receives N rows
    however many processes there are. On one process it is a permutation of the batch. A GPU is not waited for: all indices
    go to it in one copy from pinned memory.

    Args:
        num_rows: N, rows of this process.
        device: theirs.

    Attributes:
        order: (N * world size,) on the CPU: row i of the shuffled whole is row order[i] of the original.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.order = torch.randperm(num_rows * world_size())
        if world_size() == 1:
            routes = [Route(self.order), Route(self.order.argsort())]
        else:
            collective(dist.broadcast, self.order, src=0, group=_steps)
            routes = [route_to(self.order.argsort(), num_rows), route_to(self.order, num_rows)]
        self.there, self.back = on_device(routes, device)

    def shuffled(self, rows: Tensor) -> Tensor:
        """Return this process's share (N, ...) of all processes' rows in the new order; no gradient."""
        return sent_along(self.there, rows)

    def unshuffled(self, rows: Tensor) -> Tensor:
        """Undo `shuffled` for rows (N, ...) computed from its share: this process's own rows; no gradient."""
        return sent_along(self.back, rows)


def route_to(places: Tensor, num_rows: int) -> Route:
    """Return the route on which row i of all processes' rows comes to place ``places[i]``, its indices on the CPU.

    Args:
        places: (N * world size,) a permutation, on the CPU and equal everywhere; place p is on process p // N.
        num_rows: N, rows of this process.
    """
    own = slice(rank() * num_rows, (rank() + 1) * num_rows)
    going = places[own]
    coming = places.argsort()[own]  # the rows that belong in our places, from process coming // N
    num_sent = (going // num_rows).bincount(minlength=world_size()).tolist()
    num_received = (coming // num_rows).bincount(minlength=world_size()).tolist()
    arriving = (coming // num_rows).argsort(stable=True)  # the place of each received row
    # Rows are sent in the order of the processes that they go to, and of their places there.
    return Route(going.argsort(), arriving.argsort(), num_sent, num_received)


def on_device(routes: Sequence[Route], device: torch.device) -> list[Route]:
    """Return the same routes with their indices on a device, after one copy."""
    indices = [
        index for route in routes for index in (route.sending, route.taking) if index is not None
    ]
    together = torch.stack(indices)
    if device.type == "cuda":
        together = together.pin_memory()
    there = iter(together.to(device, non_blocking=True))
    moved = []
    for route in routes:
        sending = next(there)
        taking = None if route.taking is None else next(there)
        moved.append(route._replace(sending=sending, taking=taking))
    return moved


@torch.no_grad()
def sent_along(route: Route, rows: Tensor) -> Tensor:
    """Return the rows (N, ...) that come to this process when every process sends its own on the route."""
    outgoing = rows[route.sending]
    if route.taking is None:
        return outgoing
    sizes = {"output_split_sizes": route.num_received, "input_split_sizes": route.num_sent}
    return exchanged(dist.all_to_all_single, outgoing, len(rows), **sizes)[route.taking]


@torch.no_grad()
def copy_from_rank_zero(tensors: Sequence[Tensor]) -> None:
    """Make these tensors equal to rank 0's, in place."""
    if world_size() > 1:
        for tensor in tensors:
            collective(dist.broadcast, tensor, src=0)


def largest(numbers: Sequence[int]) -> list[int]:
    """For each number the largest of all processes; waits for them."""
    if world_size() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers)
    collective(dist.all_reduce, tensor, op=dist.ReduceOp.MAX, group=_control)
    return tensor.tolist()


class Agreement:
    """What every process wants, known to all one step later: nobody waits for it, least of all a GPU.

    On one process it is known at once.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, Any] | None = None

    def exchange(self, numbers: Sequence[int]) -> list[int]:
        """Send these numbers; for each, the largest that any process sent in the call before (zeros in the first)."""
        if world_size() == 1:
            return list(numbers)
        answer = [0] * len(numbers)
        if self._sent is not None:
            tensor, work = self._sent
            work.wait()
            answer = tensor.tolist()
        tensor = torch.tensor(numbers)
        work = collective(
            dist.all_reduce, tensor, op=dist.ReduceOp.MAX, group=_steps, async_op=True
        )
        self._sent = (tensor, work)
        return answer


def from_rank_zero(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, given to every process; the others wait for as long as it takes.

    Raises:
        InputError, RunError: on every process, if `work` raised it.
    """
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except (InputError, RunError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=_control)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def gather_objects(value: T) -> list[T]:
    """Every process's value, in rank order, on every process. It is pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of every process, (M, ...) with M of its own each, one after the other on rank 0; on the others none."""
    if world_size() == 1:
        return rows
    shapes = gather_objects(rows.shape)
    counts = [shape[0] for shape in shapes]
    row = max(shapes)[1:]  # that of a process which has rows, if any has
    per_message = max(1, ROWS_AT_ONCE // max(1, rows.itemsize * math.prod(row)))
    if rank() > 0:
        for start in range(0, len(rows), per_message):
            dist.send(
                torch.from_numpy(np.ascontiguousarray(rows[start : start + per_message])),
                dst=0,
                group=_control,
            )
        return rows[:0]
    everything = np.empty((sum(counts), *row), dtype=rows.dtype)
    if counts[0]:
        everything[: counts[0]] = rows
    place = counts[0]
    for source in range(1, world_size()):
        for start in range(0, counts[source], per_message):
            count = min(per_message, counts[source] - start)
            dist.recv(
                torch.from_numpy(everything[place : place + count]), src=source, group=_control
            )
            place += count
    return everything
