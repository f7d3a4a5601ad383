"""How TensorBoard arranges the figures of a run: groups, their order, and overlaid charts.

A figure has one name in metrics.json, in metrics.csv and at every experiment tracker. TensorBoard
has no setting for the order of its cards. It sorts them by tag, makes a group of everything up to
the first slash, and opens the first two groups. So its tags are the names behind a numbered group,
and the cards of the first group are numbered, too: ``train/loss`` is ``1_main/1_train/loss``.
"""

from collections.abc import Mapping, Sequence

MAIN = "1_main"
"""What one looks at first: is it learning, and how fast."""
HEALTH = "2_health"
"""What explains the first group: are the embeddings healthy."""
TIME = "3_time"
"""Where the time goes."""
DEBUG = "4_debug"
"""What helps to find a mistake."""

MAIN_ORDER = {
    "train/loss": 1,
    "knn/top1": 2,
    "dense/knn_miou": 2,
    "probe/top1": 2,
    "segment/miou": 2,
    "train/learning_rate": 3,
    "contrast/top1": 4,
    "segment/dice": 4,
    "segment/pixel_accuracy": 4,
    "contrast/top5": 5,
    "images_per_second": 6,
    # Images.
    "knn/neighbors": 7,
    "knn/confusion": 8,
    "segment/confusion": 8,
    "views/query_above_key": 9,
}
"""The figures of the first group with the place of their cards."""

GROUP_OF = {
    "epoch/loss": HEALTH,
    "epoch/probe_top1": HEALTH,
    "train/loss_dense": HEALTH,
    "train/loss_global": HEALTH,
    "train/loss_of_chance": HEALTH,
    "train/skipped_steps": HEALTH,
    "data_wait": TIME,
    "epoch/images_per_second": TIME,
    "queue/drift_age": DEBUG,
    "queue/oldest_age": DEBUG,
    "train/gradient_norm": DEBUG,
    "train/key_momentum": DEBUG,
}
"""The groups of single figures. A user's own ``train/accuracy`` is none of them."""

BEFORE_PREFIX = {
    "image_truth_prediction/": f"{MAIN}/7_",
    "dense/": f"{HEALTH}/",
    "knn/": f"{HEALTH}/",
    "label_free/": f"{HEALTH}/",
    "queue/": f"{HEALTH}/",
    "segment/": f"{HEALTH}/",
    "similarity/": f"{HEALTH}/",
    "time/": f"{TIME}/",
    "encoder_distance/": f"{DEBUG}/",
    "gradient_norm/": f"{DEBUG}/",
}
"""What stands before the names that begin like this."""

Chart = Sequence[str]
"""The figures that one chart overlays."""


def tag_of(name: str) -> str:
    """Return TensorBoard's tag for the figure or image `name`.

    A name that this project does not give, such as those of a user's callback, stays as it is.
    """
    if name in MAIN_ORDER:
        return f"{MAIN}/{MAIN_ORDER[name]}_{name}"
    if name in GROUP_OF:
        return f"{GROUP_OF[name]}/{name}"
    for prefix, before in BEFORE_PREFIX.items():
        if name.startswith(prefix):
            return before + name
    return name


def charts_of(score: str) -> dict[str, dict[str, Chart]]:
    """Return the overlaid charts of a run: the names of their figures, by category and title.

    Args:
        score: the run's figure of merit: ``knn/top1`` in a pretraining, or one that begins with
            ``segment/``.
    """
    times: dict[str, Chart] = {
        "seconds of an epoch": [
            f"time/{part}" for part in ("steps", "data_wait", "monitors", "checkpoints", "logging")
        ]
    }
    if score.startswith("segment/"):
        return {
            "Is it learning?": {
                "loss: of steps, of epochs": ["train/loss", "epoch/loss"],
                "held-out images: mIoU, mean Dice, pixel accuracy": [
                    "segment/miou",
                    "segment/dice",
                    "segment/pixel_accuracy",
                ],
                "IoU of each class": ["segment/iou/.*"],
                "Dice of each class": ["segment/dice/.*"],
            },
            "Where does the time go?": times,
        }
    return {
        "Is it learning?": {
            "loss, and the loss of chance": ["train/loss", "train/loss_of_chance"],
            "contrast accuracy: top-1, top-5": ["contrast/top1", "contrast/top5"],
            "kNN accuracy: top-1, top-5": ["knn/top1", "knn/top5"],
        },
        "Are the embeddings healthy?": {
            "similarity: positive, negative": [
                "label_free/positive_similarity",
                "label_free/negative_similarity",
            ],
            "spread, and its target 1 / sqrt(C)": [
                "label_free/embedding_std",
                "label_free/embedding_std_if_spread",
            ],
            "effective rank: embeddings, features": [
                "label_free/rank_me",
                "label_free/feature_rank_me",
            ],
        },
        "Where does the time go?": times,
    }


def layout_of(score: str) -> dict[str, dict[str, list[object]]]:
    """Return `charts_of` as ``SummaryWriter.add_custom_scalars`` takes it, with tags for names."""
    layout: dict[str, dict[str, list[object]]] = {}
    for category, charts in charts_of(score).items():
        layout[category] = {}
        for title, names in charts.items():
            # TensorBoard reads the tags as regular expressions. No tag has a special character
            # besides the pattern of `charts_of`.
            layout[category][title] = ["Multiline", [tag_of(name) for name in names]]
    return layout


MAIN_SETTINGS = {
    "decoder": "decoder.name",
    "backbone": "backbone.name",
    "lr": "optimizer.lr",
    "T": "method.temperature",
    "K": "method.queue_size",
    "batch": "data.batch_size",
    "epochs": "trainer.max_epochs",
    "image size": "data.image_size",
    "checkpoint": "checkpoint",
}
"""Settings that the HPARAMS tab shows first, after the name of the method, by the name that it
shows. The decoder and the checkpoint are settings of moco.segment."""


def main_settings(
    flat: Mapping[str, float | str], method: str | None
) -> dict[str, tuple[str, float | str]]:
    """Return what the HPARAMS tab shows first: shown name and value, by key.

    The tab sorts settings by their key and ticks the first five. So the keys are numbered. The
    number of a setting is the same in all runs, because the tab compares runs by key.

    Args:
        flat: all settings of the run under dotted names.
        method: name of the method; None: there is none.
    """
    keyed: dict[str, tuple[str, float | str]] = {}
    if method is not None:
        keyed["10_method"] = ("method", method)
    for number, (shown, name) in enumerate(MAIN_SETTINGS.items(), 11):
        if name in flat:
            keyed[f"{number}_{shown}"] = (shown, flat[name])
    return keyed
