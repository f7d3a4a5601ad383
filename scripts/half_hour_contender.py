"""One contender of scripts/half_hour.py, which trains in turns and embeds the images after each.

    python scripts/half_hour_contender.py NAME NPZ FEATURES SECONDS [--batch-size N]
        [--num-workers N] [--seed N] [--experiment NAME] [KEY=VALUE ...]

It embeds the images with the untrained backbone. Then it reads a number of seconds from standard
input, trains for this time, writes the backbone's features of all images to FEATURES and answers
with a line of JSON. SECONDS is the time of all turns. The schedules of `lightly` and `official` end
with it.
"""

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet18

CIFAR_NORMALISATION = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
IMAGENET_NORMALISATION = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Turns:
    """Ends the turns of a training loop, and counts their seconds and images.

    Args:
        total: seconds of all turns together.
        answers: the file that gets a line of JSON at the end of a turn.
        embed: writes the features of the images.
    """

    def __init__(self, total: float, answers: Any, embed: Callable[[nn.Module], None]) -> None:
        self.total = total
        self.answers = answers
        self.embed = embed
        self.spent = 0.0
        self.images = 0

    def begin(self, backbone: nn.Module) -> None:
        """Embed the images before training, and wait for the first turn."""
        self.embed(backbone)
        self._answer({"seconds": 0.0, "images": 0, "finished": False})

    @property
    def share(self) -> float:
        """Return the share of the total time that has passed, 0 to 1."""
        return min(1.0, (self.spent + time.perf_counter() - self.since) / self.total)

    def step_done(self, images: int, backbone: nn.Module, is_last: bool = False) -> None:
        """Count a step. At the end of a turn, embed the images and wait for the next turn."""
        self.images += images
        now = time.perf_counter()
        if now - self.since < self.seconds and not is_last:
            return
        self.spent += now - self.since
        self.embed(backbone)
        self._answer({"seconds": self.spent, "images": self.images, "finished": is_last})

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)
        line = sys.stdin.readline()
        if not line:  # no more turns
            os._exit(0)
        self.seconds = float(line)
        self.since = time.perf_counter()


class Views(Dataset[list[Tensor]]):
    """Two views of each image.

    Args:
        images: (images, side, side, 3), uint8.
        transform: from a Pillow image to both views.
    """

    def __init__(
        self, images: np.ndarray, transform: Callable[[Image.Image], list[Tensor]]
    ) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


class Twice:
    """Makes two views with one transform."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]


def endless(
    images: np.ndarray, transform: Any, batch_size: int, num_workers: int
) -> Iterator[list[Tensor]]:
    """Yield shuffled batches, epoch after epoch."""
    views = Views(images, transform)
    loader = DataLoader(
        views,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    while True:
        yield from loader


def from_cosine(start: float, end: float, share: float) -> float:
    """Return the value of half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def lightly(images: np.ndarray, turns: Turns, batch_size: int, num_workers: int) -> None:
    """Train as the MoCo example of lightly's documentation.

    It has torchvision's ResNet-18, a head 512-512-128, MoCoV2Transform, batch 256, a memory
    bank of 4,096, SGD with lr 0.06, and a key momentum from 0.996 to 1. Differs to its benefit: the
    learning rate, which is constant there, follows a cosine to 0.
    Source: https://docs.lightly.ai/self-supervised-learning/examples/moco.html
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.moco_transform import MoCoV2Transform

    backbone = nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())
    query_encoder = nn.Sequential(backbone, MoCoProjectionHead(512, 512, 128))
    key_encoder = copy.deepcopy(query_encoder)
    deactivate_requires_grad(key_encoder)
    criterion = NTXentLoss(memory_bank_size=(4096, 128))
    optimizer = torch.optim.SGD(query_encoder.parameters(), lr=0.06)
    transform = MoCoV2Transform(input_size=images.shape[1])
    batches = endless(images, transform, batch_size or 256, num_workers)
    batch = next(batches)
    turns.begin(backbone)
    while True:
        optimizer.param_groups[0]["lr"] = from_cosine(0.06, 0, turns.share)
        update_momentum(query_encoder, key_encoder, m=from_cosine(0.996, 1, turns.share))
        query_view, key_view = batch
        loss = criterion(query_encoder(query_view), key_encoder(key_view).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turns.step_done(len(query_view), backbone)
        batch = next(batches)


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm that normalises eight groups of a batch separately, as on eight devices."""

    GROUPS = 8

    def forward(self, images: Tensor) -> Tensor:
        """Normalise (batch, channels, height, width), which eight groups must fit in training."""
        if not self.training:
            return super().forward(images)
        assert self.running_mean is not None
        assert self.running_var is not None
        mean = self.running_mean.repeat(self.GROUPS)
        var = self.running_var.repeat(self.GROUPS)
        weight = self.weight.repeat(self.GROUPS)
        bias = self.bias.repeat(self.GROUPS)
        num, channels, height, width = images.shape
        grouped = images.reshape(num // self.GROUPS, self.GROUPS * channels, height, width)
        normed = F.batch_norm(
            grouped, mean, var, weight, bias, True, self.momentum or 0.0, self.eps
        )
        self.running_mean.copy_(mean.view(self.GROUPS, channels).mean(0))
        self.running_var.copy_(var.view(self.GROUPS, channels).mean(0))
        return normed.view(images.shape)


def official(images: np.ndarray, turns: Turns, batch_size: int, num_workers: int) -> None:
    """Train as the official CIFAR-10 notebook.

    It has a ResNet-18 with a 3x3 stem, one linear layer to 128, split BatchNorm with shuffled keys,
    batch 512, K 4,096, T 0.1, m 0.99, SGD with lr 0.06 and weight decay 5e-4, and Pillow images one
    by one. Differs to its benefit: the cosine ends with the time.
    Source: github.com/facebookresearch/moco, branch colab-notebook
    """
    query_encoder = resnet18(num_classes=128, norm_layer=SplitBatchNorm)
    query_encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    query_encoder.maxpool = nn.Identity()
    key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
    queue = F.normalize(torch.randn(4096, 128))  # (K, C) unit norm
    pointer = 0
    optimizer = torch.optim.SGD(
        query_encoder.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4
    )
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(images.shape[1], scale=(0.08, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(*CIFAR_NORMALISATION),
        ]
    )
    batches = endless(images, Twice(view), batch_size or 512, num_workers)
    batch = next(batches)
    turns.begin(query_encoder)
    while True:
        optimizer.param_groups[0]["lr"] = from_cosine(0.06, 0, turns.share)
        query_view, key_view = batch
        query = F.normalize(query_encoder(query_view))  # (N, C)
        with torch.no_grad():
            for key_weight, query_weight in zip(
                key_encoder.parameters(), query_encoder.parameters(), strict=True
            ):
                key_weight.lerp_(query_weight, 0.01)
            order = torch.randperm(len(key_view))
            key = F.normalize(key_encoder(key_view[order]))[order.argsort()]  # (N, C)
        positive = (query * key).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ queue.T], 1) / 0.1  # (N, 1+K)
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[(pointer + torch.arange(len(key))) % len(queue)] = key
        pointer = (pointer + len(key)) % len(queue)
        turns.step_done(len(query), query_encoder)
        batch = next(batches)


def ours(npz: str, turns: Turns, experiment: str, seed: int, overrides: list[str]) -> None:
    """Train an experiment with all that moco.train does, except for the kNN monitor."""
    import pytorch_lightning as pl
    from hydra import compose, initialize_config_dir
    from rich.console import Console

    from moco.cli.build_pretraining import build_data, build_method, build_trainer
    from moco.cli.training_run import Run
    from moco.config.parsing import CONFIG_DIR, parse, register_schemas
    from moco.config.train import TrainConfig
    from moco.runs.interrupts import StopRequest

    class TakeTurns(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            turns.begin(pl_module.query_encoder.backbone)

        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            is_last = trainer.global_step == pl_module.num_steps
            turns.step_done(len(batch.indices), pl_module.query_encoder.backbone, is_last)

    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        given = [
            f"+experiment={experiment}",
            "data=npz",
            f"data.root={npz}",
            f"seed={seed}",
            "evaluation.every_n_epochs=100000",
        ]
        config = parse(compose("train", [*given, *overrides]), TrainConfig)
    pl.seed_everything(config.seed, verbose=False)
    data = build_data(config)
    config.data.image_size = data.image_size
    with tempfile.TemporaryDirectory() as folder, StopRequest([]) as stop:
        run = Run(config, Path(folder), stop, console=Console(quiet=True))
        trainer = build_trainer(run)
        trainer.callbacks.insert(0, TakeTurns())  # type: ignore[attr-defined]
        trainer.fit(build_method(run.plain), datamodule=data)


def embedding(
    npz: dict[str, np.ndarray], normalisation: Any, path: str
) -> Callable[[nn.Module], None]:
    """Return a function that writes a backbone's features of all images to `path`.

    They are computed in eval mode and fp32.
    """
    mean = torch.tensor(normalisation[0]).view(1, 3, 1, 1)
    std = torch.tensor(normalisation[1]).view(1, 3, 1, 1)

    @torch.no_grad()
    def features(backbone: nn.Module, images: np.ndarray) -> np.ndarray:
        blocks = torch.from_numpy(images).permute(0, 3, 1, 2).split(250)
        return torch.cat([backbone((block / 255 - mean) / std) for block in blocks]).numpy()

    def embed(backbone: nn.Module) -> None:
        classifier = getattr(backbone, "fc", None)
        if classifier is not None:
            backbone.fc = nn.Identity()
        backbone.eval()
        bank = features(backbone, npz["train_images"])
        queries = features(backbone, npz["test_images"])
        np.savez(path, bank=bank, queries=queries)
        backbone.train()
        if classifier is not None:
            backbone.fc = classifier

    return embed


def main() -> None:
    parser = argparse.ArgumentParser(description="One contender of half_hour.py.")
    parser.add_argument("name", choices=("lightly", "official", "ours"))
    parser.add_argument("npz")
    parser.add_argument("features")
    parser.add_argument("seconds", type=float)
    parser.add_argument(
        "--batch-size", type=int, default=0, help="of lightly and official; 0: as published"
    )
    parser.add_argument(
        "--num-workers", type=int, default=2, help="loader processes of lightly and official"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experiment", default="cifar10_cpu", help="of ours")
    parser.add_argument("overrides", nargs="*", help="settings of ours, KEY=VALUE")
    given = parser.parse_intermixed_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print, and that is not an answer
    torch.manual_seed(given.seed)
    arrays = dict(np.load(given.npz))
    normalisation = IMAGENET_NORMALISATION if given.name == "lightly" else CIFAR_NORMALISATION
    turns = Turns(given.seconds, answers, embedding(arrays, normalisation, given.features))
    if given.name == "ours":
        ours(given.npz, turns, given.experiment, given.seed, given.overrides)
    else:
        train = {"lightly": lightly, "official": official}[given.name]
        train(arrays["train_images"], turns, given.batch_size, given.num_workers)


if __name__ == "__main__":
    main()
