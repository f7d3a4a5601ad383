"""Two gloo processes: what they gather, shuffle and enqueue."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moco.methods.key_queue import KeyQueue
from moco.training.distributed import all_gather, shuffled_across, unshuffled


def on_each_rank(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        torch.manual_seed(rank)
        own = torch.arange(4.0)[:, None] + 10 * rank  # rank 0: 0 to 3, rank 1: 10 to 13
        assert all_gather(own)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
        maps = torch.arange(24.0).view(2, 3, 4).transpose(1, 2) + 100 * rank  # not contiguous, as cells of a map are
        assert torch.equal(all_gather(maps)[2 * rank : 2 * rank + 2], maps)
        foreign = 0
        for _ in range(20):
            share, order = shuffled_across(own)
            assert sorted(all_gather(share)[:, 0].tolist()) == [0, 1, 2, 3, 10, 11, 12, 13]
            assert torch.equal(unshuffled(share * 2, order), own * 2)
            foreign += int(((share >= 10) != (rank == 1)).sum())
        assert foreign > 20  # of 80 rows, half are expected to come from the other rank
        torch.manual_seed(0)
        queue = KeyQueue(11, 1)
        for step in range(3):
            queue.enqueue(all_gather(own + step))
        assert torch.equal(all_gather(queue.keys)[:11], all_gather(queue.keys)[11:])
        assert int(queue.pointer) == 24 % 11
    finally:
        dist.destroy_process_group()


def test_two_processes_share_keys_and_shuffle_across_each_other(tmp_path):
    mp.spawn(on_each_rank, args=(tmp_path / "rendezvous",), nprocs=2)


def test_on_one_process_collectives_are_the_identity_and_shuffling_is_undone():
    rows = torch.arange(6.0)[:, None]
    assert all_gather(rows) is rows
    shuffled, order = shuffled_across(rows)
    assert not torch.equal(shuffled, rows)
    assert torch.equal(unshuffled(shuffled, order), rows)
