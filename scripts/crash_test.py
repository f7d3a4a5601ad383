"""Kill a pretraining run again and again, and compare its end with that of an undisturbed run.

    python scripts/crash_test.py --kills 50 [--seed 0] [--folder FOLDER]

The run is the quickstart with a short queue. Each process is killed with SIGKILL, together with its
child processes. The moment is drawn from the seed: while it starts, after some steps, and in every
third kill while it writes a checkpoint. Each restart has the same command; every fifth also has a
loader process. The script prints its figures as one JSON object. It ends with exit code 1 and the
reason if

- a restart fails, or does not mention the checkpoint that exists;
- more is lost than the steps since a checkpoint was due by `checkpoint.every_n_minutes`;
- a temporary file is left in the end;
- the two ends differ in a bit of the weights, queues, optimizer, generators, figures, best
  checkpoint or the curves of TensorBoard.

50 kills took 20 minutes on 2 CPU cores that were busy with other work.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH_SIZE = 16
STEPS_PER_EPOCH = 1437 // BATCH_SIZE
STEPS_PER_LIFE = 40  # a process is killed within this number of steps
STEPS_PER_KILL = 24  # what the run gains by one process, on average at most
INTERVAL_MINUTES = 0.01
RUN = [
    "+experiment=quickstart",
    f"data.batch_size={BATCH_SIZE}",
    "method.queue_size=200",
    "evaluation.every_n_epochs=1",
    "evaluation.baselines=false",
    "checkpoint.every_n_epochs=1",
    f"checkpoint.every_n_minutes={INTERVAL_MINUTES}",
    "trainer.log_every_n_steps=1",
]
OF_THE_CLOCK = ("images_per_second", "data_wait", "epoch/images_per_second")
# "config" differs in the processes that had a loader process.
NOT_COMPARED = (*OF_THE_CLOCK, "seconds", "train/seconds", "config")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="folder of the two runs; default: a temporary folder"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        generator = random.Random(arguments.seed)
        figures = crash_test(folder.resolve(), arguments.kills, generator)
        print(json.dumps(figures, indent=2))


def crash_test(folder: Path, kills: int, generator: random.Random) -> dict[str, Any]:
    """Run the test and return its figures; `folder` gets the runs ``whole`` and ``killed``."""
    num_epochs = math.ceil(kills * STEPS_PER_KILL / STEPS_PER_EPOCH)
    command = [*RUN, f"trainer.max_epochs={num_epochs}"]
    begun = time.monotonic()
    whole = Life(folder / "whole", command)
    whole.finish()
    losses: list[tuple[int, float]] = []
    writing = 0
    for number in range(kills):
        life = Life(folder / "killed", [*command, f"data.num_workers={int(number % 5 == 4)}"])
        if number % 3 == 0:
            life.wait_for_writing(generator)
        elif generator.random() < 0.2:
            time.sleep(generator.uniform(0, whole.startup_seconds))
        else:
            life.wait_for_steps(generator)
        writing += life.kill()
        losses.append(life.loss())
        steps, seconds = losses[-1]
        print(
            f"kill {number + 1}: at step {life.reached}, lost {steps} of {seconds:.1f} s",
            file=sys.stderr,
        )
    last = Life(folder / "killed", command)
    last.finish()
    check_ends(folder / "whole", folder / "killed")
    return {
        "kills": kills,
        "kills_while_writing": writing,
        "steps": last.reached,
        "largest_loss_steps": max(steps for steps, _ in losses),
        "largest_loss_seconds": round(max(seconds for _, seconds in losses), 2),
        "seconds": round(time.monotonic() - begun),
    }


class Life:
    """One process of a run, from its start to its end, with the steps that it takes.

    Args:
        run: the run folder.
        overrides: its command line.
    """

    def __init__(self, run: Path, overrides: list[str]) -> None:
        self.run = run
        self.checkpoint = run / "checkpoints" / "last.ckpt"
        self.had_checkpoint = self.checkpoint.is_file()
        self.log = run.with_name(f"{run.name}-{time.monotonic_ns()}")
        self.started = time.time()
        with self.log.with_suffix(".output").open("w") as output:
            command = [sys.executable, __file__, "--record", str(self.log), *overrides]
            self.process = subprocess.Popen(
                [*command, f"hydra.run.dir={run}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def steps(self) -> list[tuple[int, float]]:
        """Return pairs (step, time).

        The first step is the one that the training continued from. The others are done.
        """
        if not self.log.is_file():
            return []
        whole_lines = self.log.read_text().rpartition("\n")[0].splitlines()
        found = []
        for line in whole_lines:
            step, second = line.split()
            found.append((int(step), float(second)))
        return found

    @property
    def reached(self) -> int:
        return self.steps[-1][0] if self.steps else 0

    @property
    def startup_seconds(self) -> float:
        return self.steps[0][1] - self.started

    def wait(self, is_reached: Callable[[], bool], seconds: float = 300.0) -> None:
        """Wait until the condition holds, or for `seconds`.

        Raises:
            RuntimeError: the process has ended by itself.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until and not is_reached():
            self.check_alive()
            time.sleep(0.002)

    def wait_for_steps(self, generator: random.Random) -> None:
        """Wait into the middle of one of the next steps."""
        number = generator.randint(1, STEPS_PER_LIFE)
        self.wait(lambda: len(self.steps) >= number)
        time.sleep(generator.uniform(0, 0.1))

    def wait_for_writing(self, generator: random.Random) -> None:
        """Stop the process while it writes a checkpoint."""
        number = generator.randint(1, STEPS_PER_LIFE // 2)
        self.wait(lambda: len(self.steps) >= number)
        while True:
            self.wait(lambda: any(self.temporary_files()))
            time.sleep(generator.uniform(0, 0.01))
            os.kill(self.process.pid, signal.SIGSTOP)
            time.sleep(0.01)  # the process stops within this time
            if any(self.temporary_files()):
                return
            os.kill(self.process.pid, signal.SIGCONT)

    def temporary_files(self) -> Iterator[Path]:
        return self.checkpoint.parent.glob(".last.ckpt.*.tmp")

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            code = self.process.returncode
            raise RuntimeError(f"the process ended by itself with code {code}: {self.output()}")

    def output(self) -> str:
        return self.log.with_suffix(".output").read_text()

    def kill(self) -> bool:
        """Kill the process and its children; return whether it was writing a checkpoint.

        Raises:
            RuntimeError: it had ended before, or its log does not mention the checkpoint.
        """
        self.check_alive()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.had_checkpoint and self.steps and "going on from" not in self.output():
            raise RuntimeError(f"the run did not resume {self.checkpoint}: {self.output()}")
        return any(self.temporary_files())

    def finish(self) -> None:
        """Wait for the end of the process.

        Raises:
            RuntimeError: its exit code is not 0.
        """
        if self.process.wait() != 0:
            code = self.process.returncode
            raise RuntimeError(f"the process failed with code {code}: {self.output()}")

    def loss(self) -> tuple[int, float]:
        """Return how many steps the kill has undone, and their seconds since the checkpoint.

        Raises:
            RuntimeError: a checkpoint was due, and a step has ended since without writing it.
        """
        if not self.steps:
            return 0, 0.0
        saved = step_of(self.checkpoint) if self.checkpoint.is_file() else 0
        begun = self.steps[0][1]
        since = max(begun, self.checkpoint.stat().st_ctime) if saved else begun
        lost = [(step, second) for step, second in self.steps if step > saved]
        overdue = [step for step, second in lost[:-1] if second > since + 60 * INTERVAL_MINUTES]
        if overdue:
            raise RuntimeError(
                f"no checkpoint was written after step {overdue[0]}, when one was due: "
                f"{self.steps}, saved {saved}"
            )
        return len(lost), lost[-1][1] - since if lost else 0.0


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps of a checkpoint."""
    import torch

    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


def check_ends(whole: Path, killed: Path) -> None:
    """Compare the two runs.

    Raises:
        RuntimeError: they differ, or the second one has left temporary files.
    """
    import torch

    found = [f"{path} was left behind" for path in killed.rglob(".*.tmp")]
    for name in ("last.ckpt", "best.ckpt"):
        one = torch.load(whole / "checkpoints" / name, map_location="cpu", weights_only=True)
        other = torch.load(killed / "checkpoints" / name, map_location="cpu", weights_only=True)
        found += differences(one, other, name)
    figures = json.loads((whole / "metrics.json").read_text())
    other_figures = json.loads((killed / "metrics.json").read_text())
    found += differences(figures, other_figures, "metrics.json")
    found += differences(curves(whole), curves(killed), "TensorBoard")
    if found:
        raise RuntimeError("\n".join(found))


def differences(one: Any, other: Any, place: str) -> list[str]:
    """Return the places at which two nested values are not equal in every bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [f"{place} differs"]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        found = []
        for key in one:
            if key not in NOT_COMPARED:
                found += differences(one[key], other[key], f"{place}: {key}")
        return found
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        found = []
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            found += differences(left, right, f"{place}[{number}]")
        return found
    return [] if one == other else [f"{place}: {str(one)[:200]} and {str(other)[:200]}"]


def curves(run: Path) -> dict[str, Any]:
    """Return TensorBoard's points by name, each as (step, value).

    The times of an epoch are left out. They are written after its checkpoint, and a run that is
    killed between the two has none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from moco.training.board_layout import tag_of

    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    points: dict[str, Any] = {}
    of_the_clock = [tag_of(name) for name in OF_THE_CLOCK]
    for tag in tags["scalars"]:
        if not tag.startswith(tag_of("time/")):
            points[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for name, tag in zip(OF_THE_CLOCK, of_the_clock, strict=True):
        points[f"steps of {name}"] = [step for step, _ in points.pop(tag)]
    for tag in tags["images"]:
        points[tag] = [event.step for event in events.Images(tag)]
    return points


def record_steps(path: Path) -> None:
    """Write to a file the step that the training starts from, and each step that is done.

    It runs in the training process.
    """
    from moco.methods.moco import MoCo

    file = path.open("a", buffering=1)  # a line survives a kill once it is written

    def note(self: MoCo, *_: Any) -> None:
        file.write(f"{self.trainer.global_step} {time.time()}\n")

    MoCo.on_train_start = MoCo.on_train_batch_end = note


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        from moco.train import main as train

        record_steps(Path(sys.argv[2]))
        del sys.argv[1:3]
        train()
    else:
        main()
