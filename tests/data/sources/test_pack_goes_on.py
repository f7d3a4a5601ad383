"""moco.pack into a folder that is not empty: an interrupted copy, a finished one, other files."""

import errno
import json
import os
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from moco.data.packing import LOCK, CopyWriter, chunk_loader
from moco.data.sources.registry import build_source
from moco.errors import InputError, Interrupted, RunError
from moco.runs.folder_lock import locked
from tests.data.sources.test_pack import files, run
from tests.processes import wait_until


class Stop:
    """Replaces `CopyWriter.add`: interrupts the program after some chunks."""

    def __init__(self, add, num_chunks):
        self.add = add
        self.num_left = num_chunks

    def __call__(self, writer, chunk):
        self.add(writer, chunk)
        self.num_left -= 1
        if self.num_left == 0:
            raise Interrupted(signal.SIGTERM, "stopped")


@pytest.mark.parametrize("form", ["array", "shards"])
def test_a_copy_that_was_interrupted_anywhere_ends_in_the_same_bytes(
    tmp_path, photographs, monkeypatch, form
):
    bytes_of_two_chunks = {"array": 100_000, "shards": 30_000}[form]
    arguments = [
        f"data.root={photographs}",
        f"format={form}",
        "data.resize=48",
        f"max_shard_bytes={bytes_of_two_chunks}",
    ]
    straight = files(run(tmp_path / "straight", *arguments))
    add, finish = CopyWriter.add, CopyWriter.finish

    def stop_before_finish(self):
        raise Interrupted(signal.SIGTERM, "stopped")

    def stop_after_finish(self):
        finish(self)
        raise Interrupted(signal.SIGTERM, "stopped")

    for num_chunks in (1, 3, 1):  # in the first part, in the second part, and there again
        stop = Stop(add, num_chunks)
        monkeypatch.setattr(CopyWriter, "add", lambda self, chunk, stop=stop: stop(self, chunk))
        with pytest.raises(Interrupted):
            run(tmp_path, *arguments)
    monkeypatch.setattr(CopyWriter, "add", add)
    for ending in (stop_before_finish, stop_after_finish):
        monkeypatch.setattr(CopyWriter, "finish", ending)
        with pytest.raises(Interrupted):
            run(tmp_path, *arguments)
    monkeypatch.setattr(CopyWriter, "finish", finish)
    assert files(run(tmp_path, *arguments)) == straight


def test_a_finished_part_is_not_done_again(tmp_path, photographs, monkeypatch):
    seen = []

    def watched(pool, index, start, num_workers):
        seen.append(start)
        return chunk_loader(pool, index, start, num_workers)

    monkeypatch.setattr("moco.data.packing.chunk_loader", watched)
    add = CopyWriter.add

    def broken(self, chunk):
        if self.num_done >= 16:
            raise Interrupted(signal.SIGINT, "stopped")
        add(self, chunk)

    arguments = [f"data.root={photographs}", "format=array", "max_shard_bytes=1"]
    monkeypatch.setattr(CopyWriter, "add", broken)
    with pytest.raises(Interrupted):
        run(tmp_path, *arguments)
    monkeypatch.setattr(CopyWriter, "add", add)
    run(tmp_path, *arguments)
    assert seen == [0, 16]


def test_the_same_command_after_the_end_changes_nothing(tmp_path, photographs):
    before = files(run(tmp_path, f"data.root={photographs}"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    assert files(run(tmp_path, f"data.root={photographs}")) == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()} == times


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.resize=32"], "data.resize: 48 there, 32 here"),
        (["format=shards"], "format: array there, shards here"),
        (["data=digits"], "data.name: images there, digits here"),
    ],
)
def test_another_source_or_setting_in_the_same_folder_is_refused(
    tmp_path, photographs, change, message
):
    run(tmp_path, f"data.root={photographs}", "format=array", "data.resize=48")
    with pytest.raises(InputError) as error:
        run(tmp_path, f"data.root={photographs}", "format=array", "data.resize=48", *change)
    assert message in str(error.value)
    assert "choose another folder" in str(error.value)


def test_a_source_that_has_grown_is_refused_and_fails_the_check(tmp_path, photographs):
    run(tmp_path, f"data.root={photographs}")
    Image.new("RGB", (9, 9)).save(photographs / "new.png")
    with pytest.raises(InputError, match="the source: 30 images there, 31 here"):
        run(tmp_path, f"data.root={photographs}")
    with pytest.raises(RunError, match="made of 30 images, and the source has 31"):
        run(tmp_path, f"data.root={photographs}", "check=true")


def test_a_folder_with_other_files_is_refused(tmp_path, photographs):
    with pytest.raises(InputError, match="holds other files; choose an empty folder"):
        run(photographs.parent, f"data.root={photographs}", f"output={photographs}")
    with pytest.raises(InputError, match=r"output=.*: Not a directory|output=.*: File exists"):
        run(tmp_path, f"data.root={photographs}", f"output={photographs / 'a' / '00.jpg'}")


def test_two_processes_do_not_pack_into_one_folder(tmp_path, photographs):
    (tmp_path / "copy").mkdir()
    with (
        locked(tmp_path / "copy" / LOCK, "the copy"),
        pytest.raises(InputError, match="another process is at work there"),
    ):
        run(tmp_path, f"data.root={photographs}")


def test_a_full_disk_is_one_line_and_the_copy_goes_on_later(tmp_path, photographs, monkeypatch):
    add, arguments = (
        CopyWriter.add,
        [f"data.root={photographs}", "format=array", "max_shard_bytes=1"],
    )

    def full(self, chunk):
        if self.num_done >= 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, chunk)

    monkeypatch.setattr(CopyWriter, "add", full)
    with pytest.raises(
        RunError, match=r"No space left on device; free some space .* the same command goes on"
    ):
        run(tmp_path, *arguments)
    monkeypatch.setattr(CopyWriter, "add", add)
    assert len(build_source("packed", str(run(tmp_path, *arguments))).train) == 30


def test_a_full_disk_at_the_first_write_is_one_line_and_what_it_leaves_is_not_in_the_way(
    tmp_path, photographs, monkeypatch
):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(
            RunError, match=r"No space left on device; free some space .* the same command goes on"
        ):
            run(tmp_path, f"data.root={photographs}")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {LOCK, ".index.json.tmp"}
    folder = run(tmp_path, f"data.root={photographs}")
    assert len(build_source("packed", str(folder)).train) == 30
    assert not (folder / ".index.json.tmp").exists()


INTERRUPTED = "interrupted: the parts that are whole are kept; the same command goes on there"


def test_sigterm_ends_the_program_and_the_same_command_goes_on(
    tmp_path, photographs, monkeypatch, capsys
):
    arguments = [f"data.root={photographs}", "max_shard_bytes=1", "format=array"]
    add = CopyWriter.add

    def add_and_receive_signal(self, chunk):
        add(self, chunk)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CopyWriter, "add", add_and_receive_signal)
    with pytest.raises(Interrupted, match="the same command goes on there") as error:
        run(tmp_path, *arguments)
    assert error.value.signal_number == signal.SIGTERM
    assert num_parts(tmp_path) == 1
    monkeypatch.setattr(CopyWriter, "add", add)
    folder = run(tmp_path, *arguments)
    assert len(build_source("packed", str(folder)).train) == 30
    printed = capsys.readouterr().out
    assert "30 to train on" in printed
    assert f"data=packed data.root={folder}" in printed


def num_parts(folder):
    """Return the number of whole parts; -1 before there is an index."""
    index = folder / "copy" / "index.json"
    if not index.exists():
        return -1
    return len(json.loads(index.read_text())["parts"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["array", "shards"])
def test_a_program_that_is_killed_again_and_again_ends_in_the_same_bytes(
    tmp_path, image_tree, generator, start_program, form
):
    for number in range(100, 1500):
        pixels = generator.integers(0, 256, (90, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image_tree / f"{number}.png")
    arguments = [
        f"data.root={image_tree}",
        "max_shard_bytes=2000000",
        f"format={form}",
        "data.resize=64",
    ]
    straight = files(run(tmp_path / "straight", *arguments))
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        parts_before = num_parts(tmp_path)
        output = f"output={tmp_path / 'copy'}"
        command = ["-m", "moco.pack", *arguments, "num_workers=2", output]
        program = start_program(sys.executable, *command, cwd=tmp_path)
        wait_until(
            lambda: program.poll() is not None or num_parts(tmp_path) > parts_before,  # noqa: B023
            "another part",
        )
        program.send_signal(number)
        code = program.wait()
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
            program.end()  # its worker processes
        else:
            assert code == 128 + number
            assert program.errors().strip() == INTERRUPTED
    assert num_parts(tmp_path) < num_parts(tmp_path / "straight")
    assert files(run(tmp_path, *arguments)) == straight
