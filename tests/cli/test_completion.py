"""Completion by the tab key: what is offered, and real shells."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

from moco.cli import completion
from moco.cli.completion import answer_shell, offers, shell_code
from moco.config.parsing import CONFIG_DIR
from moco.errors import InputError
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("da", ["data.", "data="]),
        ("data.ro", ["data.root="]),
        ("method.pro", ["method.projector."]),
        ("method.projector.n", ["method.projector.num_layers="]),
        ("+exp", ["+experiment="]),
        ("experiment=cifar10_speedrun", ["experiment=cifar10_speedrun", "experiment=cifar10_speedrun_90"]),
        ("+experiment=qui", ["+experiment=quickstart"]),
        ("hydra/launcher=", ["hydra/launcher=slurm"]),
        ("backbone=swin_t,swin_v2_tiny", ["backbone=swin_t,swin_v2_tiny_patch2", "backbone=swin_t,swin_v2_tiny_patch4"]),
        ("trainer.compile=", ["trainer.compile=false", "trainer.compile=null", "trainer.compile=true"]),
        ("trainer.precision=b", ["trainer.precision=bf16-mixed"]),
        ("method.temperature=", ["method.temperature=0.2"]),
        ("optimizer.warmup_epochs=1", []),
        ("--help", ["--help", "--help-all"]),
        # The shell offers files.
        ("data.root=", []),
        ("data.root=pictures/b", []),
        ("init_from=", []),
        ("resume=runs", []),
        ("no_such_key=", []),
    ],
)  # fmt: skip
def test_what_is_offered(word, expected):
    assert offers("train", word) == expected


def test_each_program_offers_its_own():
    assert offers("evaluate", "evaluation=linear") == [
        "evaluation=linear",
        "evaluation=linear_official",
    ]
    assert offers("segment", "data=") == ["data=segmentation_folder", "data=voc2012"]
    assert offers("pack", "method") == []
    assert offers("sweep", "--c") == ["--csv"]
    assert offers("sweep", "runs") == []


def test_every_experiment_and_every_key_is_offered():
    names = {path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")}
    assert offers("train", "experiment=") == sorted(f"experiment={name}" for name in names)
    top = offers("train", "")
    assert {"data.", "data=", "seed=", "experiment=", "hydra.run.dir="} <= set(top)


def test_experiments_of_the_users_own_folder_are_offered(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    line = f"moco-train --config-dir={tmp_path} experiment=mi"
    assert offers("train", "experiment=mi", line.split()) == ["experiment=mine"]


def test_the_code_for_a_shell_is_asked_for_by_name(capsys):
    assert answer_shell(["--shell-completion", "install=bash"])
    code = capsys.readouterr().out
    assert f"_moco_python='{sys.executable}'" in code
    assert not re.search(r"@[A-Z]+@", code)
    assert not answer_shell(["experiment=quickstart"])
    with pytest.raises(InputError, match=r"unknown shell 'bsh'; did you mean 'bash'"):
        answer_shell(["-sc", "install=bsh"])
    with pytest.raises(InputError, match="expected one of install=bash, install=fish, install=zsh"):
        answer_shell(["-sc"])


class Terminal:
    """An interactive shell in a pseudo-terminal."""

    def __init__(self, command, folder):
        self.screen, inside = pty.openpty()
        environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "PS1": "> ", "HOME": str(folder)}
        self.process = subprocess.Popen(
            command,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(inside)

    def type(self, keys, expected):
        """Type, and wait until what appears after it matches a pattern."""
        os.write(self.screen, keys.encode())
        shown = ""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if select.select([self.screen], [], [], 1)[0]:
                shown += os.read(self.screen, 65536).decode()
            if re.search(expected, shown):
                return
        raise AssertionError(f"{keys!r}: {expected!r} does not appear in {shown!r}")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.fixture
def bash(tmp_path):
    """A bash with the completion, in a folder with two folders."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "photos of 2024").mkdir()
    (tmp_path / "completion.bash").write_text(shell_code("bash"))
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], tmp_path)
    terminal.type(
        ". ./completion.bash && bind 'set show-all-if-ambiguous on' && echo rea''dy\n", "ready"
    )
    yield terminal
    terminal.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_scripts_and_modules(bash):
    clear = "\x15"
    for command in ("moco-train", "python -m moco.train", "/usr/bin/python3 -X dev -m moco.train"):
        bash.type(f"{command} data.ro\t", r"data\.root=$")
        bash.type(f"{clear}{command} backbone=resnet_t\t", "backbone=resnet_tiny ")
        bash.type(f"{clear}{command} +experiment=qui\t", r"\+experiment=quickstart ")
        bash.type(f"{clear}{command} data.root=pi\t", "data.root=pictures/")
        bash.type(f"{clear}{command} data.root=ph\t", r"data.root=photos\\ of\\ 2024/")
        bash.type(f"{clear}{command} data.root=photos\\ of\\ 2024/ se\t", "2024/ seed=")
        bash.type(f"{clear}{command} method=moco_v\t", "moco_v2_plus +moco_v3")
        bash.type(clear, "")
    bash.type("python -m moco.tr\t", "python -m moco.train ")
    bash.type(f"{clear}python pic\t", "python pictures/")


@pytest.mark.slow
def test_bash_completes_where_hydra_has_removed_the_equals_sign(bash):
    bash.type("COMP_WORDBREAKS=${COMP_WORDBREAKS//=}; echo do''ne\n", "done")
    bash.type("moco-train data.root=ph\t", r"data.root=photos\\ of\\ 2024/")
    bash.type("\x15moco-train backbone=resnet_t\t", "backbone=resnet_tiny ")


def test_the_code_for_bash_can_be_read_by_bash():
    for shell in completion.SHELLS:
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=shell_code(shell), text=True, check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_scripts_and_modules(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "completion.fish").write_text(shell_code("fish"))
    for line, expected in {
        "moco-train data.ro": "data.root=",
        "python -m moco.train +experiment=qui": "+experiment=quickstart",
        "python -m moco.train data.root=pi": "data.root=pictures/",
        "python -m moco.tr": "moco.train",
    }.items():
        command = f"source completion.fish; complete -C '{line}'"
        done = subprocess.run(
            ["fish", "-N", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{expected}\n"


def test_a_tab_starts_nothing_that_computes():
    # A second for each press of the key would be too long. Hydra alone takes half of it.
    code = (
        "import sys; sys.argv = ['', 'train', 'data.ro', '']; import moco.cli.completion as completion; completion.main();"
        "assert not {'torch', 'hydra', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "data.root=\n"
