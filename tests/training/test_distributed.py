"""Two processes that train together: their messages, and that they end where one does."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from moco.data.loading.loaders import EpochSampler, ResumableLoader
from moco.errors import InputError, Interrupted, PeerLost, RunError
from moco.methods.key_queue import KeyQueue
from moco.runs.interrupts import StopRequest
from moco.training.distributed import collectives as distributed
from moco.training.distributed.collectives import Agreement, Shuffle, all_gather
from moco.training.distributed.processes import Child, first_failure, run_on_devices
from tests.conftest import REPOSITORY, Runner
from tests.processes import call_on_two, on_two

NO_CHECKPOINT = Path("folder without a checkpoint")


def exchange(rank):
    torch.manual_seed(rank)
    own = torch.arange(4.0)[:, None] + 10 * rank  # rank 0: 0 to 3, rank 1: 10 to 13
    assert all_gather(own)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    maps = (
        torch.arange(24.0).view(2, 3, 4).transpose(1, 2) + 100 * rank
    )  # not contiguous, as cells of a map are
    assert torch.equal(all_gather(maps)[2 * rank : 2 * rank + 2], maps)
    foreign = 0
    for _ in range(20):
        shuffle = Shuffle(len(own), own.device)
        share = shuffle.shuffled(own)
        assert sorted(all_gather(share)[:, 0].tolist()) == [0, 1, 2, 3, 10, 11, 12, 13]
        assert torch.equal(shuffle.unshuffled(share * 2), own * 2)
        foreign += int(((share >= 10) != (rank == 1)).sum())
    assert foreign > 20  # of 80 rows, half are expected to come from the other rank
    for strided in (
        torch.randn(4, 3, 5).transpose(1, 2),
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4).T,
        torch.randn(4, 1).expand(4, 5),
    ):
        shuffle = Shuffle(4, own.device)
        share, plain_share = shuffle.shuffled(strided), shuffle.shuffled(strided.contiguous())
        assert torch.equal(share, plain_share)
        assert torch.equal(shuffle.unshuffled(share), strided)
        assert torch.equal(all_gather(share)[4 * rank : 4 * rank + 4], share)
        is_channels_last = strided.dim() == 4
        assert not is_channels_last or share.is_contiguous(memory_format=torch.channels_last)

    torch.manual_seed(0)
    queue = KeyQueue(11, 1, keeps_groups=True)
    for step in range(3):
        groups = (own[:, 0] + step).long()
        queue.enqueue(all_gather(own + step), all_gather(groups))
    assert torch.equal(queue.groups, queue.keys[:, 0].long())
    assert torch.equal(all_gather(queue.keys)[:11], all_gather(queue.keys)[11:])
    assert int(queue.pointer) == 24 % 11

    assert distributed.largest([rank, -rank]) == [1, 0]
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    agreement = Agreement()
    assert [agreement.exchange([3 * rank, step]) for step in range(3)] == [[0, 0], [3, 0], [3, 1]]
    assert distributed.from_rank_zero(lambda: f"of rank {rank}") == "of rank 0"
    with pytest.raises(InputError, match="seen on rank 0"):
        distributed.from_rank_zero(partial(refuse, rank))
    with mock.patch.object(distributed, "ROWS_AT_ONCE", 16):  # several messages
        rows = distributed.gather_rows(np.full((50 + rank, 3), rank, dtype=np.float32))
    assert rows[:, 0].tolist() == [0] * 50 + [1] * 51 if rank == 0 else len(rows) == 0
    tensors = [torch.full((2,), float(rank)), torch.full((2, 3), float(rank)).T]
    distributed.copy_from_rank_zero(tensors)
    assert [tensor.abs().sum() for tensor in tensors] == [0, 0]


def refuse(rank):
    raise InputError(f"seen on rank {rank}")


def normalise_keys(rank):
    """BatchNorm of keys sees the other rank's images; each key comes back to its place."""
    torch.manual_seed(7)
    everything = torch.randn(16, 3, 4, 4, dtype=torch.float64)
    own = everything[8 * rank : 8 * rank + 8]
    shuffle = Shuffle(len(own), own.device)
    normalised = shuffle.unshuffled(nn.BatchNorm2d(3, dtype=torch.float64)(shuffle.shuffled(own)))
    expected = torch.empty_like(everything)
    for places in shuffle.order.chunk(
        2
    ):  # what each rank normalises together, computed here by hand
        together = everything[places]
        mean, variance = together.mean(dim=(0, 2, 3)), together.var(dim=(0, 2, 3), unbiased=False)
        expected[places] = (together - mean.view(3, 1, 1)) / (variance.view(3, 1, 1) + 1e-5).sqrt()
        assert {bool(place < 8) for place in places} == {True, False}
    assert torch.allclose(normalised, expected[8 * rank : 8 * rank + 8], atol=1e-12)
    unshuffled_alone = nn.BatchNorm2d(3, dtype=torch.float64)(own)
    assert not torch.allclose(normalised, unshuffled_alone, atol=0.01)


def both(rank):
    exchange(rank)
    normalise_keys(rank)


def test_two_processes_exchange_shuffle_agree_and_gather():
    on_two(both)


def end_on_rank_one(how, stop):
    environment = distributed.environment_of(2, 1)
    with (
        distributed.lost_peers_named(),
        distributed.process_group(environment, "gloo", timeout_minutes=5),
    ):
        if distributed.rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("a bad image")
        all_gather(torch.zeros(1))


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (
            "killed",
            RunError,
            r"rank 1 of 2 \(process \d+\) was killed by SIGKILL: .*there is no checkpoint yet",
        ),
        ("failed", InputError, "^a bad image$"),
    ],
)
@pytest.mark.slow
def test_the_process_that_failed_first_says_why_the_training_ended(how, kind, message):
    with StopRequest() as stop, pytest.raises(kind, match=message):
        run_on_devices(end_on_rank_one, (how,), 2, stop, NO_CHECKPOINT)


def ended_child(rank, exit_code, error=None):
    """What the parent knows of a process that has ended."""
    process = SimpleNamespace(exitcode=exit_code, pid=100 + rank)
    is_cause = not isinstance(error, PeerLost)
    return Child(rank, process, connection=None, error=error, is_cause=is_cause)


def test_an_error_counts_more_than_the_connections_that_it_broke():
    lost = PeerLost("rank 0 lost the connection")
    failed = InputError("a bad image")
    children = [ended_child(0, 1, lost), ended_child(1, 1, failed)]
    assert first_failure(children, NO_CHECKPOINT) is failed
    killed = [ended_child(0, 1, lost), ended_child(1, -signal.SIGKILL)]
    assert "rank 1 of 2" in str(first_failure(killed, NO_CHECKPOINT))
    assert first_failure([ended_child(0, 1, lost), ended_child(1, 0)], NO_CHECKPOINT) is lost
    assert first_failure([ended_child(0, 0), ended_child(1, 0)], NO_CHECKPOINT) is None


def test_on_one_process_collectives_are_the_identity_and_shuffling_is_undone():
    rows = torch.arange(6.0)[:, None]
    assert all_gather(rows) is rows
    shuffle = Shuffle(6, rows.device)
    assert not torch.equal(shuffle.shuffled(rows), rows)
    assert torch.equal(shuffle.shuffled(rows), rows[shuffle.order])
    assert torch.equal(shuffle.unshuffled(shuffle.shuffled(rows)), rows)
    assert Agreement().exchange([2, 0]) == [2, 0]
    assert distributed.largest([2, 0]) == [2, 0]
    assert distributed.from_rank_zero(lambda: 3) == 3


def test_collectives_get_contiguous_tensors(monkeypatch):
    """NCCL refuses others. Rows picked from a Swin's feature map keep its strides."""
    asked = []

    def checked(*tensors, **options):
        asked.append([tensor.is_contiguous() for tensor in tensors])

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for name in ("all_gather_into_tensor", "all_to_all_single", "broadcast"):
        monkeypatch.setattr(distributed.dist, name, checked)
    cells = torch.randn(4, 8, 3).transpose(1, 2)  # (N, S, C) of a map (N, C, S)
    assert not cells[torch.tensor([2, 0, 3, 1])].is_contiguous()
    shuffle = Shuffle(4, cells.device)
    shuffle.shuffled(cells)
    shuffle.unshuffled(cells)
    all_gather(cells)
    distributed.copy_from_rank_zero([torch.randn(3, 4).T])
    assert asked == [[True], [True, True], [True, True], [True, True], [True]]


def global_batches(world_size, resume_from=None):
    """Return each global batch of an epoch in rank order, and the loader's state after three."""
    batches, state = [], None
    loaders = []
    for rank in range(world_size):
        sampler = EpochSampler(100, 12, seed=3, rank=rank, world_size=world_size)
        dataset = {(0, index): torch.tensor(index) for index in range(100)}
        loaders.append(ResumableLoader(dataset, sampler, 12 // world_size))
        if resume_from:
            loaders[-1].load_state_dict(resume_from)
    for number, parts in enumerate(zip(*loaders, strict=True)):
        batches.append(torch.cat(parts).tolist())
        if number == 2:
            state = loaders[0].state_dict()
    return batches, state


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 1)])
def test_another_number_of_processes_goes_on_with_the_same_global_batches(before, after):
    whole, _ = global_batches(1)
    batches, state = global_batches(before)
    assert batches == whole
    assert global_batches(after, resume_from=state)[0] == whole[3:]


LAYER_NORM = [
    "backbone=swin_v2_tiny_patch2",
    "backbone.stochastic_depth=0",
    "data.image_size=16",
    "data.batch_size=32",
    "method.queue_size=100",
    "method.queue_start=random",
    "optimizer.schedule=constant",
    "trainer.max_epochs=9",
    "evaluation.every_n_epochs=100",
]
"""With SGD: AdamW divides gradients that are zero but for rounding by their own size."""


def train_and_dump(config, folder):
    """Train, then write this rank's final state beside the run folder."""
    from moco.cli.pretraining import train
    from moco.methods.moco import MoCo

    def on_train_end(self):
        torch.save(self.state_dict(), folder.parent / f"{folder.name}_rank{distributed.rank()}.pt")

    with mock.patch.object(MoCo, "on_train_end", on_train_end), StopRequest() as stop:
        train(config, folder, {}, stop)


def trained(runner, folder, steps, devices):
    """Return the final state of every rank; the run's figures are in the folder."""
    config = runner.config(*LAYER_NORM, f"trainer.max_steps={steps}", f"trainer.devices={devices}")
    if devices == 1:
        train_and_dump(config, folder)
    else:
        call_on_two(train_and_dump, config, folder)
    return [torch.load(folder.parent / f"{folder.name}_rank{rank}.pt") for rank in range(devices)]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    differences = []
    for name, value in one.items():
        differences.append(float((value.double() - other[name].double()).abs().max()))
    return max(differences)


STEPS = 8


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The final state of a run on one process, and its folder."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    (state,) = trained(Runner(folder.parent), folder, STEPS, 1)
    return state, folder


def figures_in(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_two_processes_end_where_one_does(alone, runner, tmp_path):
    state, folder = alone
    together = trained(runner, tmp_path / "together", STEPS, 2)
    assert largest_difference(state, together[0]) < 1e-5
    for name in ("queue.keys", "queue.pointer", "queue.filled"):
        assert torch.equal(together[0][name], together[1][name]), name
    assert largest_difference(together[0], together[1]) == 0
    figures = [figures_in(folder), figures_in(tmp_path / "together")]
    # The search of 360 queries.
    assert figures[0]["knn/top1"] == pytest.approx(figures[1]["knn/top1"], abs=0.01)
    assert figures[0]["train/loss"] == pytest.approx(figures[1]["train/loss"], abs=1e-5)


@pytest.mark.slow
def test_a_run_may_go_on_with_another_number_of_processes(alone, runner, tmp_path):
    trained(runner, tmp_path / "changing", 3, 2)
    trained(runner, tmp_path / "changing", 6, 1)
    changing = trained(runner, tmp_path / "changing", STEPS, 2)
    assert largest_difference(alone[0], changing[0]) < 1e-5
    checkpoint = torch.load(tmp_path / "changing" / "checkpoints" / "last.ckpt", weights_only=True)
    states = checkpoint["random_states"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


@pytest.fixture
def two_process_run(start_program, tmp_path):
    """The program on two processes, after its first epoch."""
    program = start_program(
        sys.executable,
        "-m",
        "moco.train",
        "+experiment=quickstart",
        "trainer.devices=2",
        "trainer.max_epochs=1000",
        "evaluation.baselines=false",
        f"hydra.run.dir={tmp_path / 'run'}",
        cwd=REPOSITORY,
    )
    program.wait_for_output("epoch    2/")
    return program


@pytest.mark.slow
def test_a_killed_process_ends_the_run_at_once_and_is_named(two_process_run, tmp_path):
    os.kill(two_process_run.children("spawn_main")[1], signal.SIGKILL)
    assert two_process_run.wait() == 1
    (line,) = two_process_run.errors().splitlines()
    assert line.startswith("failed: rank 1 of 2 (process ")
    assert "was killed by SIGKILL" in line
    assert "there is no checkpoint yet" in line  # every 10 epochs
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], f"failed: {status['message']}") == ("failed", line)


@pytest.mark.slow
def test_a_signal_to_the_parent_stops_all_with_a_checkpoint(two_process_run, tmp_path):
    children = two_process_run.children("spawn_main")
    two_process_run.send_signal(signal.SIGTERM)
    assert two_process_run.wait() == 128 + signal.SIGTERM
    (line,) = two_process_run.errors().splitlines()
    assert line.startswith("interrupted: in epoch ")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_launcher_that_started_another_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        InputError,
        match=r"torchrun started 4 processes, but trainer\.devices=2 on trainer\.num_nodes=1 need 2",
    ):
        distributed.environment_of(2, 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(
        InputError,
        match=r"trainer\.num_nodes=2: start one process per device with srun or torchrun",
    ):
        distributed.environment_of(2, 2)


def test_an_interrupt_can_be_sent_from_process_to_process():
    import pickle

    error = pickle.loads(pickle.dumps(Interrupted(15, "in epoch 3")))
    assert (error.signal_number, str(error)) == (15, "in epoch 3")
