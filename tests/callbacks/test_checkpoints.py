import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moco.callbacks.checkpoints import Checkpoints
from moco.errors import InputError
from moco.runs.atomic_files import link_atomically
from moco.runs.checkpoint_files import AtomicCheckpointIO, read_checkpoint
from moco.training.random_states import random_states, set_random_states


def draws():
    return (
        torch.rand(3).tolist(),
        np.random.normal(size=3).tolist(),
        random.random(),
        random.gauss(0, 1),
    )


def test_random_states_survive_a_file_that_holds_no_code(tmp_path):
    random.gauss(0, 1)
    torch.save(random_states(), tmp_path / "states")
    expected = draws()
    set_random_states(torch.load(tmp_path / "states", weights_only=True))
    assert draws() == expected


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "damaged, or no checkpoint at all"),
        (b"text", "damaged, or no checkpoint at all"),
        (Bomb(), "it holds objects whose loading would run code"),
        (
            {"state_dict": {}},
            "not written by moco.train (it lacks config, figures, global_step, hyper_parameters, random_states)",
        ),
        ([1, 2], "not written by moco.train"),
        ("cut", "damaged"),
    ],
)
def test_files_that_are_no_checkpoint_of_ours_are_named_and_run_no_code(
    content, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        torch.save({"state_dict": {"w": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"checkpoint={path}: {message}")
    assert not (tmp_path / "exploded").exists()


def test_the_old_checkpoint_stays_only_where_the_disk_has_room(tmp_path, monkeypatch, caplog):
    files = AtomicCheckpointIO()
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for number in range(2):
        files.save_checkpoint({"number": number}, last)
    assert torch.load(previous, weights_only=True) == {"number": 0}
    size = last.stat().st_size
    # With the previous one's room it is enough for one checkpoint more, but not for two.
    usage = SimpleNamespace(free=size)
    monkeypatch.setattr("moco.runs.checkpoint_files.shutil.disk_usage", lambda _: usage)
    for number in (2, 3):
        files.save_checkpoint({"number": number}, last)
        assert not previous.exists()
    assert torch.load(last, weights_only=True) == {"number": 3}
    (message,) = caplog.messages
    assert "previous.ckpt is not kept: a checkpoint has" in message
    usage.free = 3 * size
    files.save_checkpoint({"number": 4}, last)
    assert torch.load(previous, weights_only=True) == {"number": 3}


def test_the_size_of_large_checkpoints_is_said(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(bytes(4000))
    weight = torch.nn.Parameter(torch.zeros(250))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.zeros(250)
    optimizer.step()
    callback = Checkpoints(tmp_path, {}, {}, None)
    trainer = SimpleNamespace(optimizers=[optimizer])
    callback._say_size(trainer)
    assert not caplog.messages
    monkeypatch.setattr("moco.callbacks.checkpoints.LARGE", 1000)
    callback._say_size(trainer)
    (message,) = caplog.messages
    assert message.startswith("a checkpoint has 4 kB, 2 kB of them the optimizer's state; ")


def test_best_keeps_its_content_when_last_is_replaced(tmp_path):
    last, best = tmp_path / "last", tmp_path / "best"
    last.write_bytes(b"one")
    link_atomically(last, best)
    (tmp_path / "new").write_bytes(b"two")
    (tmp_path / "new").replace(last)
    assert (last.read_bytes(), best.read_bytes()) == (b"two", b"one")
    link_atomically(last, best)
    assert best.read_bytes() == b"two"
