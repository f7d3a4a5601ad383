"""The linear protocol of the official MoCo code in ``moco.evaluate``: SGD on augmented images.

The encoder is frozen and in eval mode, so only the head learns.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data.loading.datamodule import check_unreadable
from moco.data.loading.loaders import LabelledViews
from moco.errors import InputError, RunError
from moco.evaluation.knn import (
    Votes,
    class_places,
    classes_of,
    refuse_several_classes,
    votes_of,
)
from moco.evaluation.knn_measurement import classification_findings, labelled_features
from moco.evaluation.linear_measurement import warn_of_unknown
from moco.evaluation.subject import Findings, Subject
from moco.phases import counted
from moco.runs.atomic_files import write_atomically

log = logging.getLogger(__name__)

# The state after every epoch, in the run folder.
HEAD_FILE = "linear_official.ckpt"


class OfficialProbe:
    """A linear layer, its optimizer, and how far they are trained.

    Args:
        width: of the features.
        num_classes: number of classes.
        settings: the fields of ``LinearOfficialConfig``.
        device: where to compute.
        path: the file that keeps the state after every epoch.
        key: of everything that the state depends on; a file with another key is not used.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        settings: dict[str, Any],
        device: torch.device,
        path: Path,
        key: str,
    ) -> None:
        self.settings = settings
        self.path = path
        self.key = key
        self.top1: list[float] = []
        """On the test part after every epoch so far."""
        generator = torch.Generator().manual_seed(settings["seed"])
        self.head = nn.utils.skip_init(nn.Linear, width, num_classes)
        nn.init.normal_(self.head.weight, std=settings["init_std"], generator=generator)
        nn.init.zeros_(self.head.bias)
        self.head.to(device)
        # Goyal et al. (arXiv 1706.02677): in proportion to the batch size.
        batch_for_lr = settings["lr_for_batch_size"] or settings["batch_size"]
        self.lr = settings["lr"] * settings["batch_size"] / batch_for_lr
        self.optimizer = torch.optim.SGD(
            self.head.parameters(),
            self.lr,
            settings["sgd_momentum"],
            weight_decay=settings["weight_decay"],
        )

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch's learning rate."""
        num_passed = sum(epoch >= milestone for milestone in self.settings["milestones"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.settings["step_factor"] ** num_passed

    def step(self, features: Tensor, classes: Tensor) -> Tensor:
        """Learn from a batch and return its mean loss.

        Args:
            features: (batch, width).
            classes: (batch,).
        """
        loss = F.cross_entropy(self.head(features), classes)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def save(self) -> None:
        """Keep the state at the end of an epoch."""
        state = {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "key": self.key,
            "top1": self.top1,
        }
        write_atomically(self.path, lambda file: torch.save(state, file))

    def load(self) -> None:
        """Continue from the file if it is there and of the same measurement."""
        if not self.path.is_file():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["key"] != self.key:
            log.warning(
                "%s is of another checkpoint, other data or settings: starting anew", self.path
            )
            return
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.top1 = state["top1"]
        log.info("continuing from %s after %d epochs", self.path, len(self.top1))


def measure_linear_official(subject: Subject) -> Findings:
    """Measure the accuracy on the test part after the last epoch.

    In the run folder of an interrupted measurement it continues after the last whole epoch, to the
    same bits.

    Raises:
        InputError: the dataset has no labels or no test part, or too many images cannot be read.
        RunError: the loss is not finite.
    """
    settings, feature = subject.settings["linear_official"], subject.settings["feature"]
    name = subject.data["name"]
    labelled = subject.bank
    test = subject.source.queries
    if test is None:
        raise InputError(
            f"data={name}: linear_official needs a test part, and this dataset has none; "
            "evaluation=linear keeps images for it"
        )
    is_known = labelled.labels >= 0
    if not is_known.all():
        log.warning(
            f"{(~is_known).sum():,} of {len(is_known):,} training images have no label, "
            "and are not trained on"
        )
    refuse_several_classes(labelled, "evaluation=linear_official")
    classes = classes_of(labelled.labels[is_known], name)
    views = LabelledViews(
        labelled,
        settings["view"],
        "evaluation.linear_official.view",
        **subject.augmentation,
        image_size=subject.data["image_size"],
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        num_workers=subject.data["num_workers"],
        device=subject.device,
    )
    queries = labelled_features(subject, test)[feature]
    warn_of_unknown(classes, queries.labels, name)
    query_rows = torch.from_numpy(queries.features).to(subject.device)
    query_classes = class_places(classes, queries.labels)

    # The key of the kept features names everything that the images and the encoder depend on.
    images_key = subject.cache.path(labelled, subject.data["root"]).name
    probe = OfficialProbe(
        width=query_rows.shape[1],
        num_classes=len(classes),
        settings=settings,
        device=subject.device,
        path=subject.folder / HEAD_FILE,
        key=json.dumps([settings, feature, images_key]),
    )
    probe.load()

    @torch.no_grad()
    def test_votes() -> Votes:
        scores = probe.head(query_rows).cpu().numpy()  # (queries, classes)
        return votes_of(scores, classes, query_classes)

    num_epochs = settings["num_epochs"]
    for epoch in range(len(probe.top1), num_epochs):
        started = time.monotonic()
        loss = train_epoch(probe, views, subject, classes, epoch)
        top1 = test_votes().accuracy(1)
        probe.top1.append(top1)
        probe.save()
        log.info(
            f"epoch {epoch + 1}/{num_epochs}: loss {loss:.4f}, test top-1 {top1:.4f}, "
            f"{time.monotonic() - started:.1f} s"
        )

    best = int(np.argmax(probe.top1))
    conditions = {
        "num_epochs": num_epochs,
        "lr": probe.lr,
        "batch_size": settings["batch_size"],
        "weight_decay": settings["weight_decay"],
        "best_top1": round(probe.top1[best], 6),
        "best_epoch": best + 1,
        "num_training": int(is_known.sum()),
        "num_queries": len(query_rows),
        "feature": feature,
        "encoder": subject.settings["encoder"],
    }
    return classification_findings(
        "linear_official",
        "Linear classification, official protocol, last epoch",
        test_votes(),
        queries,
        conditions,
        details={},
        tables=[],
    )


def num_of_views(batch: tuple[torch.Tensor, ...]) -> int:
    """Return the number of images of a batch of `LabelledViews`."""
    return len(batch[0])


def train_epoch(
    probe: OfficialProbe, views: LabelledViews, subject: Subject, classes: np.ndarray, epoch: int
) -> float:
    """Train on all training images once, and return the mean loss of the steps.

    Raises:
        InputError: too many images cannot be read.
        RunError: the loss is not finite.
    """
    labelled = subject.bank
    losses = []
    unreadable: set[int] = set()
    probe.begin_epoch(epoch)
    title = f"epoch {epoch + 1}/{probe.settings['num_epochs']}"
    total = len(views.labels)
    for images, labels, indices in counted(views.epoch(epoch), title, total, size=num_of_views):
        with torch.no_grad():
            features = subject.encoder.encode(images, subject.settings["feature"])
        places = class_places(classes, labels.cpu().numpy())
        known = (places < len(classes)).nonzero()[0]
        if len(known):
            own = torch.from_numpy(places[known]).to(subject.device)
            losses.append(probe.step(features[known], own))
        # The label of an unreadable image is replaced by -1.
        is_unreadable = labels.cpu() != views.labels[indices]
        unreadable.update(indices[is_unreadable].tolist())
    check_unreadable(unreadable, labelled.images, subject.data["max_bad_fraction"])
    loss = float(torch.stack(losses).mean())
    if not np.isfinite(loss):
        raise RunError(
            f"the loss is not finite in epoch {epoch + 1}; "
            "try a lower evaluation.linear_official.lr"
        )
    return loss
