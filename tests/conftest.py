import copy
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.errors import encodable
from tests.processes import PATIENCE, program_environment, run_to_end
from tests.processes import start_program as start_program  # a fixture
from tests.warm_start import Listener, end_warm_process, run_warm

REPOSITORY = Path(__file__).resolve().parent.parent

# These start programs or train, which takes most of the suite's time: begun first, they leave no test process idle.
LONGEST_FIRST = ("test_interrupts.py", "test_train.py", "test_resume.py", "test_segment.py")


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: (
            LONGEST_FIRST.index(item.path.name) if item.path.name in LONGEST_FIRST else 99
        )
    )


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Compute with one thread, also in fixtures of a module: sums depend on the number of threads."""
    import torch  # the process that xdist's test processes wait for would import it, too

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def pillows_limit(monkeypatch):
    """Put Pillow's limit on the size of images back; reading an image sets it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.fixture
def image_tree(tmp_path, generator):
    """24 RGB images of 20 x 16 px at three depths."""
    root = tmp_path / "images"
    for number in range(24):
        folder = root / ("a", "b", "b/deeper")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        array = generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of untrained encoders where a run has it, without the rest of a run folder; not to be changed."""
    import torch

    from tests.weights.test_export import write_checkpoint

    path = tmp_path_factory.mktemp("made") / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.manual_seed(0)
    write_checkpoint(Runner(path.parent), path)
    return path


@pytest.fixture
def photographs(tmp_path, generator):
    """30 JPEGs of various sizes, smooth as photographs are, in two folders."""
    root = tmp_path / "photographs"
    for number in range(30):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        path = root / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((60 + number, 90 - number), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escape the bytes of names that are not UTF-8 in what a test logged: xdist cannot send them."""
    report = yield
    report.sections = [(title, encodable(text)) for title, text in report.sections]
    return report


def thinned(cases, every):
    """Parameters of which each `every`-th runs by default; the others, of the same kind, are slow."""
    parameters = []
    for number, case in enumerate(cases):
        if hasattr(case, "marks"):  # it says for itself whether it is slow
            parameters.append(case)
            continue
        values = case if isinstance(case, tuple) else (case,)
        marks = [pytest.mark.slow] if number % every else []
        parameters.append(pytest.param(*values, marks=marks))
    return parameters


# Python and its libraries read these when they start.
READ_AT_START = ("LD_", "MALLOC_", "OMP_", "PYTHON")


def run_program(module, *arguments, cwd, **environment):
    """Run a program of ours in its own process, as a user starts it."""
    arguments = [str(argument) for argument in arguments]
    if any(name.startswith(READ_AT_START) for name in environment):
        return run_to_end(sys.executable, "-m", module, *arguments, cwd=cwd, **environment)
    return run_warm(module, arguments, cwd, program_environment(environment), PATIENCE)


@pytest.fixture(autouse=True, scope="session")
def ended_warm_process():
    yield
    end_warm_process()


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in the test processes that xdist starts
        listener = Listener(program_environment({}))
        config.add_cleanup(listener.end)


@cache
def small_training(overrides):
    """The config of `Runner` with these overrides, which is not to be changed."""
    from tests.configs import composed

    small = [
        "+experiment=quickstart",
        "method.queue_size=48",
        "data.batch_size=32",
        "trainer.max_epochs=2",
        "trainer.max_steps=3",
        "evaluation.baselines=false",
        # Plots take longer than the training of a test.
        "evaluation.plots_every_n_epochs=null",
        "evaluation.projector_images=0",
        "trainer.precision=32-true",  # alike on CPUs that are faster in bf16
    ]
    return composed("train", *small, *overrides)


class Runner:
    """MoCo under Lightning on the digits, small enough for a test."""

    def __init__(self, folder):
        self.folder = folder

    def config(self, *overrides):
        """A small training. What is composed once is copied afterwards: composing takes long."""
        return copy.deepcopy(small_training(overrides))

    def method(self, config):
        import dataclasses

        import torch

        from moco.cli.build_pretraining import build_method

        torch.manual_seed(config.seed)
        return build_method(dataclasses.asdict(config))

    def fit(self, config, callbacks=(), ckpt_path=None, **trainer_options):
        """The trained method."""
        import dataclasses

        import pytorch_lightning as pl

        from moco.cli.build_pretraining import build_data
        from moco.training.trainer import OURS

        method, data = self.method(config), build_data(config)
        settings = dataclasses.asdict(config.trainer) | {"precision": "32-true"} | trainer_options
        settings = {name: value for name, value in settings.items() if name not in OURS}
        trainer = pl.Trainer(
            **settings,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=any(
                isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks
            ),
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=self.folder,
        )
        trainer.fit(method, datamodule=data, ckpt_path=ckpt_path)
        return method


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path)
