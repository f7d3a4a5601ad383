"""What a run is held to before its first step."""

from types import SimpleNamespace

import pytest

from moco.checks import check_same_pictures
from moco.data.streams import ShardedPictures
from moco.errors import InputError


def identity_of(pictures, monkeypatch):
    """What a process tells the others about its pictures."""
    told = []
    monkeypatch.setattr("moco.training.distributed.world_size", lambda: 2)
    monkeypatch.setattr("moco.training.distributed.gather_objects", lambda value: told.append(value) or [value] * 2)
    check_same_pictures(SimpleNamespace(source=SimpleNamespace(train=pictures)))
    return told[0]


def sharded(shards, num_images):
    return ShardedPictures(shards, num_images, num_streams=1, shuffle_buffer=1, max_image_pixels=1)


def test_processes_with_other_shards_or_another_number_do_not_see_the_same(monkeypatch):
    identities = [
        identity_of(sharded(*of), monkeypatch)
        for of in ((["a.tar", "b.tar"], 8), (["a.tar", "c.tar"], 8), (["b.tar", "a.tar"], 8), (["a.tar", "b.tar"], 9))
    ]
    assert len(set(identities)) == 4
    assert identity_of(sharded(["a.tar", "b.tar"], 8), monkeypatch) == identities[0]
    monkeypatch.setattr("moco.training.distributed.gather_objects", lambda value: identities[:2])
    with pytest.raises(InputError, match="do not see the same pictures"):
        check_same_pictures(SimpleNamespace(source=SimpleNamespace(train=sharded(["a.tar"], 8))))


def test_a_billion_pictures_in_shards_are_not_gone_through_one_by_one(monkeypatch):
    identity_of(sharded(["a.tar"], 10**9), monkeypatch)
