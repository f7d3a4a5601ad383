"""`moco.pretrain` trains as the program does, on objects of the caller."""

import json

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from torch import nn

import moco
from moco.errors import InputError
from tests.conftest import run_program, thinned

SMALL = [
    "+experiment=quickstart",
    "method.queue_size=48",
    "data.batch_size=32",
    "data.num_workers=0",
    "trainer.max_steps=3",
    "evaluation.baselines=false",
    "evaluation.plots_every_n_epochs=null",
    "evaluation.projector_images=0",
    "trainer.precision=32-true",
]
ON_ARRAYS = [*SMALL, "data.image_size=16"]


class Images:
    """A map-style dataset of noise in two classes."""

    def __init__(self, number=64):
        self.images = torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8)
        self.targets = torch.arange(number) % 2

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.targets[index])


class Steps(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)


@pytest.mark.slow
def test_it_trains_to_the_bits_of_the_program(tmp_path):
    result = moco.pretrain(SMALL, folder=tmp_path / "here")
    done = run_program("moco.train", *SMALL, f"hydra.run.dir={tmp_path / 'there'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "there" / "metrics.json").read_text())
    assert result.figures["knn/top1"] == figures["knn/top1"]
    assert result.folder == tmp_path / "here"
    path = tmp_path / "there" / "checkpoints" / "last.ckpt"
    theirs = torch.load(path, weights_only=True)["state_dict"]
    ours = result.method.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_objects_of_the_caller_take_part_and_a_finished_run_comes_back(tmp_path):
    def net():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        module.feature_dim = 8
        return module

    images, counted = Images(), Steps()
    arguments = {"dataset": images, "bank": images, "queries": Images(10), "folder": tmp_path}
    logger = CSVLogger(tmp_path / "logged")
    result = moco.pretrain(
        ON_ARRAYS, backbone=net(), callbacks=[counted], logger=logger, **arguments
    )
    assert counted.steps == [1, 2, 3]
    assert 0 <= result.figures["knn/top1"] <= 1
    assert result.figures["knn/bank_size"] == len(images)
    assert list((tmp_path / "logged").rglob("metrics.csv"))
    again = moco.pretrain(ON_ARRAYS, backbone=net(), **arguments)
    for name, tensor in result.method.state_dict().items():
        assert torch.equal(tensor, again.method.state_dict()[name]), name
    loaded = moco.load_encoder(tmp_path / "checkpoints" / "last.ckpt", backbone=net())
    pixels = torch.randn(2, 3, 16, 16)
    encoder = result.method.query_encoder.eval()
    assert torch.equal(loaded.eval().encode(pixels), encoder.encode(pixels))


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    thinned(
        [
            ("seed=1", {}, r"expected a list of texts"),
            (["sed=1"], {}, r"unknown key 'sed'; did you mean 'seed'"),
            ([*SMALL, "seed=-1"], {}, r"seed=-1: expected a number at least 0"),
            (SMALL, {"bank": Images()}, r"bank, queries: they need dataset="),
            (
                [*SMALL, "data=digits"],
                {"dataset": Images()},
                r"data=digits: dataset= is given, too",
            ),
            (["backbone=resnet18"], {"backbone": nn.Identity()}, r"backbone= is given, too"),
            (
                [*SMALL, "trainer.devices=2", "trainer.accelerator=cpu"],
                {},
                r"moco.pretrain trains on",
            ),
            (ON_ARRAYS, {"dataset": Images(8)}, r"data.batch_size=32: there are only 8 images"),
            (
                SMALL,
                {"callbacks": ["EMA"]},
                r"callbacks: expected callbacks of Lightning, got 'EMA'",
            ),
            (SMALL, {"logger": "csv"}, r"logger: expected loggers of Lightning, got 'csv'"),
        ],
        every=3,
    ),
)
def test_mistakes_are_one_line(overrides, options, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        moco.pretrain(overrides, folder=tmp_path / "run", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
