"""A package of the user's own, outside the checkout, with moco installed from its wheel."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import REPOSITORY, run_program

pytestmark = pytest.mark.slow

NETS = '''
from torch import nn


class Net(nn.Module):
    """Two convolutions, with feature maps for dense tasks."""

    feature_map_strides = [2, 4]

    def __init__(self, width=8):
        super().__init__()
        self.feature_dim = 2 * width
        self.feature_map_dims = [width, 2 * width]
        self.first = self.layer(3, width)
        self.second = self.layer(width, 2 * width)

    def layer(self, inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def feature_maps(self, images):
        first = self.first(images)
        return [first, self.second(first)]

    def forward(self, images):
        return self.feature_maps(images)[-1].mean((2, 3))
'''
DATA = '''
import torch


class Shades:
    """Noise around the shade of a class."""

    def __init__(self, number, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(number) % 4
        noise = torch.rand(number, 3, 16, 16, generator=generator)
        self.images = noise * 0.5 + self.targets[:, None, None, None] / 8

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.targets[index])


def build(number=96):
    return {"train": Shades(number), "queries": Shades(20, seed=1)}
'''
AUGS = '''
from dataclasses import dataclass
from typing import ClassVar

import moco


@dataclass
class Darker(moco.Operation):
    """Multiply all pixels by a factor between `lowest` and 1."""

    lowest: float = 0.5
    num_draws: ClassVar[int] = 1

    def draw(self, draws, sizes):
        return {"factor": self.lowest + (1 - self.lowest) * draws[:, 0]}

    def on_batch(self, images, drawn):
        return images * drawn["factor"].to(images)[:, None, None, None]
'''
CALLBACKS = '''
import os
import signal

from pytorch_lightning import Callback


class StopAt(Callback):
    """Count the steps, and interrupt the run once if MY_STOP says after which."""

    def __init__(self, every=1):
        self.every = every
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        if self.steps == int(os.environ.get("MY_STOP", 0)):
            os.kill(os.getpid(), signal.SIGINT)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]
'''
TRAIN = [
    "data=custom",
    "data.target=my_package.data:build",
    "data.options={number: 96}",
    "backbone=custom",
    "backbone.target=my_package.nets:Net",
    "backbone.options={width: 4}",
    "augmentation=cifar",
    "+augmentation.query.darker={target: my_package.augs:Darker, lowest: 0.3}",
    "+callbacks.stop={target: my_package.callbacks:StopAt, options: {every: 2}}",
    "data.batch_size=16",
    "data.num_workers=2",
    "data.engine=worker",
    "method.queue_size=32",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
]
STEPS = 12


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of installed packages that holds moco alone."""
    folder = tmp_path_factory.mktemp("installed")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run(
        [*uv, "build", "--quiet", "--wheel", "--out-dir", folder, REPOSITORY], check=True
    )
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run(
        [*uv, "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], check=True
    )
    return site


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with my_package, and images with masks."""
    home = tmp_path_factory.mktemp("home")
    package = home / "my_package"
    package.mkdir()
    sources = {"__init__": "", "nets": NETS, "data": DATA, "augs": AUGS, "callbacks": CALLBACKS}
    for name, text in sources.items():
        (package / f"{name}.py").write_text(text)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (home / "masked" / kind / split).mkdir(parents=True)
        for number in range(6):
            mask = (generator.random((32, 32)) > 0.5).astype(np.uint8)
            image = np.stack([mask * 200] * 3, axis=2)
            Image.fromarray(image).save(home / "masked" / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(home / "masked" / "masks" / split / f"{number}.png")
    return home


@pytest.fixture(scope="module")
def program(site, home):
    """A function that runs a program of the wheel in the user's folder."""

    def run(name, *arguments, code=0, **environment):
        done = run_program(
            f"moco.{name}", *arguments, cwd=home, PYTHONPATH=str(site), **environment
        )
        assert done.returncode == code, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def trained(program):
    """The output of a run that was interrupted and resumed, and of one that was not."""
    program("train", *TRAIN, "hydra.run.dir=whole")
    program("train", *TRAIN, "hydra.run.dir=parts", MY_STOP="4", code=128 + signal.SIGINT)
    return program("train", *TRAIN, "hydra.run.dir=parts").stdout


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_an_interrupted_run_ends_in_the_same_bits(trained, home):
    whole, parts = last(home / "whole"), last(home / "parts")
    assert whole["global_step"] == parts["global_step"] == STEPS
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][name]), name
    steps = [
        state["steps"]
        for states in (whole["callbacks"], parts["callbacks"])
        for state in states.values()
        if "steps" in state
    ]
    assert steps == [STEPS, STEPS]
    figures = [
        json.loads((home / run / "metrics.json").read_text())["knn/top1"]
        for run in ("whole", "parts")
    ]
    assert figures[0] == figures[1]


def test_the_printed_command_evaluates_it(trained, program, home):
    line = trained.splitlines()[-1]
    command = line.removeprefix("next: python -m moco.").split()
    assert command[0] == "evaluate"
    program(*command, "output=evaluated.json")
    evaluated = json.loads((home / "evaluated.json").read_text())
    of_run = json.loads((home / "parts" / "metrics.json").read_text())
    assert evaluated["knn/top1"] == of_run["knn/top1"]


def test_it_is_embedded_segmented_and_loaded(trained, program, home, site):
    checkpoint = "checkpoint=parts/checkpoints/last.ckpt"
    program("embed", checkpoint, "trust_targets=true", "output=features.npz")
    features = np.load(home / "features.npz")["features"]
    assert features.shape == (96, 8)
    program(
        "segment", checkpoint, "backbone.target=my_package.nets:Net", "data.root=masked",
        "image_size=32", "data.batch_size=2", "data.num_workers=0", "trainer.max_epochs=1",
        "hydra.run.dir=segmented",
    )  # fmt: skip
    assert "segment/miou" in json.loads((home / "segmented" / "metrics.json").read_text())
    code = (
        "import moco, numpy, torch\n"
        "from my_package.data import Shades\n"
        "encoder = moco.load_encoder('parts/checkpoints/last.ckpt', trust_targets=True)\n"
        "print(moco.__file__, encoder.encode(Shades(4).images).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.stdout.split() == [str(site / "moco" / "__init__.py"), "torch.Size([4,", "8])"]


NOTEBOOK = [
    """
import moco
from my_package.augs import Darker
from my_package.callbacks import StopAt
from my_package.data import Shades
from my_package.nets import Net
from pytorch_lightning.loggers import CSVLogger

moco.register_operation("darker", Darker)
stop = StopAt()
overrides = [
    "augmentation=cifar", "+augmentation.query.darker={lowest: 0.3}", "data.batch_size=16",
    "data.num_workers=0", "method.queue_size=32", "trainer.max_epochs=2",
    "trainer.accelerator=cpu", "backbone=resnet_tiny",
]
result = moco.pretrain(
    [override for override in overrides if not override.startswith("backbone=")],
    dataset=Shades(96), queries=Shades(20, seed=1), backbone=Net(4), callbacks=[stop],
    logger=CSVLogger("logged"), folder="from_notebook",
)
""",
    """
import torch

encoder = result.method.query_encoder.eval()
with torch.no_grad():
    features = encoder.encode(Shades(4).images)
loaded = moco.load_encoder("from_notebook/checkpoints/last.ckpt", backbone=Net(4))
with torch.no_grad():
    again = loaded.encode(Shades(4).images)
print(stop.steps, tuple(features.shape), bool((features == again).all()))
print(0 <= result.figures["knn/top1"] <= 1, result.folder)
""",
]


def test_the_same_in_a_notebook(home, site, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(site))
    cells = [nbformat.v4.new_code_cell(source) for source in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(home)}}
    )
    client.execute()
    (output,) = [cell for cell in cells[1]["outputs"] if cell["output_type"] == "stream"]
    assert output["text"].splitlines() == [f"{STEPS} (4, 8) True", "True from_notebook"]
