"""``train.log``: everything that was logged, also before there was a run folder, and after a resume."""

import logging

import pytest

from moco.errors import RunError
from moco.runs.log_file import LogFile, write_to_log_files
from moco.runs.run_folder import claimed


@pytest.fixture
def program(request):
    """A process's log."""
    log = logging.getLogger("moco")
    files = []

    def start(command):
        for file in files:
            log.removeHandler(file)
        files.append(LogFile("train", command))
        log.addHandler(files[-1])
        return log

    log.setLevel(logging.INFO)
    yield start
    log.removeHandler(files[-1])
    log.setLevel(logging.NOTSET)


def test_a_run_and_its_resume_write_one_file(program, tmp_path):
    log = program("moco.train seed=1")
    log.info("before there is a folder: caf\udce9")

    def fail():
        with claimed(tmp_path, {}):
            write_to_log_files("epoch    1/2  loss 1.0")
            raise RunError("the disk is full")

    with pytest.raises(RunError):
        fail()
    program("moco.train seed=1 again")
    with claimed(tmp_path, {}):
        log.warning("on %s", "a[/b]")
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == [
        "started: moco.train seed=1",
        "INFO before there is a folder: caf\\udce9",
        "epoch    1/2  loss 1.0",
        "ended: the disk is full",
        "started: moco.train seed=1 again",
        "WARNING on a[/b]",
        "finished",
    ]


def test_a_refused_run_writes_nothing(program, tmp_path):
    program("moco.train").info("a message")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_ends_no_run(program, tmp_path):
    log = program("moco.train")
    (tmp_path / "train.log").mkdir()
    with claimed(tmp_path, {}):
        log.info("a message")
