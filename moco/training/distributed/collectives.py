"""What the processes of a training send to each other; the identity if there is one process.

There are three process groups. Tensors of the method travel in the default group (NCCL between
GPUs, gloo between CPUs). Other messages of every step travel in a second group over the CPU, with
the same time-out, so that a process that hangs ends the run. A third group, the control group, has
a long time-out: in it the others wait while one process works. In this file N is the number of rows
(images) of one process.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

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
"""Time-out of the control group: one process may search, write or be suspended for this long."""

ROWS_AT_ONCE = 2**10
"""The number of rows in one message of `gather_rows`: 8 MiB of ResNet-50's features."""

_control: dist.ProcessGroup | None = None
_steps: dist.ProcessGroup | None = None


def environment_of(num_devices: int, num_nodes: int) -> ClusterEnvironment:
    """Return who starts the processes: torchrun, srun with several tasks, or nobody.

    Raises:
        InputError: the launcher started another number of processes than the config has devices, or
            several nodes have no launcher.
    """
    environment: ClusterEnvironment
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if TorchElasticEnvironment.detect():
        environment, launcher = TorchElasticEnvironment(), "torchrun"
    elif "SLURM_STEP_ID" in os.environ and num_tasks > 1:
        # auto_requeue is Lightning's own answer to the scheduler's signal; we have another.
        environment, launcher = SLURMEnvironment(auto_requeue=False), "srun"
    elif num_nodes > 1:
        raise InputError(
            f"trainer.num_nodes={num_nodes}: start one process per device with srun or torchrun"
        )
    else:
        return LightningEnvironment()
    needed = num_devices * num_nodes
    if environment.world_size() != needed:
        raise InputError(
            f"{launcher} started {environment.world_size()} processes, but "
            f"trainer.devices={num_devices} on trainer.num_nodes={num_nodes} need {needed}"
        )
    return environment


@contextmanager
def process_group(
    environment: ClusterEnvironment, backend: str, timeout_minutes: float
) -> Iterator[None]:
    """Connect the processes that a launcher started, inside the ``with`` block.

    Args:
        environment: knows this process's rank; `LightningEnvironment` means that no launcher from
            outside started it.
        backend: of the default group: ``nccl`` or ``gloo``.
        timeout_minutes: how long a process may wait for the others in the default group.
    """
    global _control, _steps
    timeout = timedelta(minutes=timeout_minutes)
    if not isinstance(environment, LightningEnvironment):
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        rank, size = environment.global_rank(), environment.world_size()
        meeting_place = "env://"
    elif "MOCO_RENDEZVOUS" in os.environ:
        # Our own processes, see `moco.training.distributed.processes`, are all on this machine, and
        # nobody outside has to reach them.
        interfaces = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interfaces[0])
        rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        meeting_place = f"file://{os.environ['MOCO_RENDEZVOUS']}"
    else:
        yield  # this process is alone
        return
    dist.init_process_group(backend, meeting_place, timeout, world_size=size, rank=rank)
    _steps = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    _control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield
    finally:
        _control = None
        _steps = None
    # Not after an error: this would wait for processes that may be gone.
    dist.destroy_process_group()


def new_rendezvous() -> Path:
    """Return a file that does not exist yet, in a new folder, where local processes can meet."""
    return Path(tempfile.mkdtemp(prefix="moco-")) / "rendezvous"


def world_size() -> int:
    """Return how many processes train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def rank() -> int:
    """Return this process's number among them, from 0."""
    if world_size() == 1:
        return 0
    return dist.get_rank()


@contextmanager
def lost_peers_named() -> Iterator[None]:
    """Raise `PeerLost` when a connection breaks because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        is_of_gloo = "/gloo/" in text or "Connection closed by peer" in text
        is_lost = isinstance(error, dist.DistError) or is_of_gloo
        if world_size() == 1 or isinstance(error, RunError) or not is_lost:
            raise
        raise PeerLost(
            f"rank {rank()} lost the connection to another process, which has ended or hangs; "
            f"its own message, or that of srun or torchrun, says why ({text.splitlines()[0]})"
        ) from error


def collective(call: Callable[..., Any], output: Tensor, *inputs: Tensor, **options: Any) -> Any:
    """Call a collective of torch.distributed on contiguous memory, which NCCL and gloo need.

    Args:
        call: such as ``dist.broadcast``; it fills `output`, or changes it in place.
        output: gets the result, whatever its strides.
        inputs: copied first where they are not contiguous.
        options: of `call`, such as ``group``. With ``async_op`` the output has to be contiguous.

    Returns:
        What `call` returns.
    """
    dense = output.contiguous()
    returned = call(dense, *(tensor.contiguous() for tensor in inputs), **options)
    if dense is not output:
        output.copy_(dense)
    return returned


def exchanged(call: Callable[..., Any], rows: Tensor, num_rows: int, **options: Any) -> Tensor:
    """Return the rows that a collective gives this process for its own rows, in the same layout.

    Args:
        call: such as ``dist.all_gather_into_tensor``.
        rows: (N, ...) what this process sends.
        num_rows: the number of rows that it receives.
        options: of `call`.
    """
    is_channels_last = rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and not rows.is_contiguous():
        # Permuted to the order in memory, so that nothing is copied.
        permuted = rows.permute(0, 2, 3, 1)
        return exchanged(call, permuted, num_rows, **options).permute(0, 3, 1, 2)
    received = rows.new_empty(num_rows, *rows.shape[1:])
    collective(call, received, rows, **options)
    return received


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Return the rows of all processes in rank order, (N * world size, ...); no gradient."""
    if world_size() == 1:
        return tensor
    return exchanged(dist.all_gather_into_tensor, tensor, len(tensor) * world_size())


class Route:
    """The way on which row i of all processes' rows comes to place ``places[i]``.

    With one process the rows only change places.

    Args:
        places: (N * world size,) a permutation, on the CPU and equal everywhere. Place p is on
            process p // N.
        num_rows: N, the rows of this process.
        device: of the rows.
    """

    def __init__(self, places: Tensor, num_rows: int, device: torch.device) -> None:
        own = slice(rank() * num_rows, (rank() + 1) * num_rows)
        targets = places[own]  # the places to which our rows go
        # Rows are sent in the order of the processes that they go to, and of their places there.
        sending = targets.argsort()
        taking = sending  # of no use with one process
        if world_size() > 1:
            target_ranks = targets // num_rows
            source_ranks = places.argsort()[own] // num_rows  # where our places' rows come from
            self.num_sent = target_ranks.bincount(minlength=world_size()).tolist()
            self.num_received = source_ranks.bincount(minlength=world_size()).tolist()
            taking = source_ranks.argsort(stable=True).argsort()
        indices = torch.stack([sending, taking])
        if device.type == "cuda":
            indices = indices.pin_memory()  # so that the host does not wait for the GPU
        self.sending, self.taking = indices.to(device, non_blocking=True)

    @torch.no_grad()
    def send(self, rows: Tensor) -> Tensor:
        """Send this process's rows; return the rows (N, ...) that come to it."""
        outgoing = rows[self.sending]
        if world_size() == 1:
            return outgoing
        sizes = {"output_split_sizes": self.num_received, "input_split_sizes": self.num_sent}
        return exchanged(dist.all_to_all_single, outgoing, len(rows), **sizes)[self.taking]


class Shuffle:
    """A random order of the rows of all processes, and the way back.

    Rank 0 draws the order and sends it to the others. Each row travels to one process only, so that
    a process receives N rows, whatever the number of processes. With one process it is a
    permutation of the batch.

    Args:
        num_rows: N, the rows of this process.
        device: of the rows.

    Attributes:
        order: (N * world size,) on the CPU. Row i of all shuffled rows is row order[i] of the
            original rows.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.order = torch.randperm(num_rows * world_size())
        if world_size() > 1:
            collective(dist.broadcast, self.order, src=0, group=_steps)
        self.there = Route(self.order.argsort(), num_rows, device)
        self.back = Route(self.order, num_rows, device)

    def shuffled(self, rows: Tensor) -> Tensor:
        """Return this process's share (N, ...) of the shuffled rows; no gradient."""
        return self.there.send(rows)

    def unshuffled(self, rows: Tensor) -> Tensor:
        """Return this process's own rows (N, ...) from the share of `shuffled`; no gradient."""
        return self.back.send(rows)


@torch.no_grad()
def copy_from_rank_zero(tensors: Sequence[Tensor]) -> None:
    """Make these tensors equal to rank 0's, in place."""
    if world_size() > 1:
        for tensor in tensors:
            collective(dist.broadcast, tensor, src=0)


def largest(numbers: Sequence[int]) -> list[int]:
    """Return for each number the largest of all processes; this waits for them."""
    if world_size() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers)
    collective(dist.all_reduce, tensor, op=dist.ReduceOp.MAX, group=_control)
    return tensor.tolist()


class Agreement:
    """Tells all processes what each of them wants, one step later, so that nobody has to wait.

    With one process it is known at once.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, Any] | None = None

    def exchange(self, numbers: Sequence[int]) -> list[int]:
        """Send these numbers, and return the largest of all processes' numbers in the last call.

        The first call returns zeros.
        """
        if world_size() == 1:
            return list(numbers)
        answer = [0] * len(numbers)
        if self._sent is not None:
            tensor, work = self._sent
            work.wait()
            answer = tensor.tolist()
        tensor = torch.tensor(numbers)
        options: dict[str, Any] = {"op": dist.ReduceOp.MAX, "group": _steps, "async_op": True}
        work = collective(dist.all_reduce, tensor, **options)
        self._sent = (tensor, work)
        return answer


def from_rank_zero(work: Callable[[], T]) -> T:
    """Call `work` on rank 0, and return its result on every process. The others wait for it.

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
    """Return the values of all processes in rank order. They are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Return the rows of all processes one after the other on rank 0, and no rows on the others.

    Args:
        rows: (M, ...) this process's; M may differ between processes.
    """
    if world_size() == 1:
        return rows
    shapes = gather_objects(rows.shape)
    row_shape = max(shapes)[1:]  # the shape of a process that has rows, if any has
    if rank() > 0:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            message = np.ascontiguousarray(rows[start : start + ROWS_AT_ONCE])
            dist.send(torch.from_numpy(message), dst=0, group=_control)
        return rows[:0]
    num_rows = sum(shape[0] for shape in shapes)
    gathered = np.empty((num_rows, *row_shape), dtype=rows.dtype)
    place = len(rows)
    if place:
        gathered[:place] = rows
    for source in range(1, world_size()):
        end = place + shapes[source][0]
        for start in range(place, end, ROWS_AT_ONCE):
            message = gathered[start : min(start + ROWS_AT_ONCE, end)]
            dist.recv(torch.from_numpy(message), src=source, group=_control)
        place = end
    return gathered
