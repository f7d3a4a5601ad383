"""What is about to be trained, on what and where: the panel before the first step."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moco.cli.closing_tables import print_plain
from moco.cli.preset_choice import PRESET_FILE, Preset
from moco.cli.run_names import key_of, parsed
from moco.cli.training_run import Run
from moco.config.segment import SegmentConfig
from moco.config.train import TrainConfig
from moco.errors import printable
from moco.runs.shell_quotes import shell_quoted

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from moco.data.loading.datamodule import PretrainingData
    from moco.data.sources.source import DataSource, Images
    from moco.methods.moco import MoCo

Row = tuple[str, str]
NUM_MEASURED = 32
"""So many images, evenly spaced, are opened for their size. Only their headers are read."""
NUM_NAMED = 1000
"""So many names, evenly spaced, are looked at for the formats."""
MOST_FORMATS = 3
COPIED = ("run folder", "watch it")
"""Rows that a user copies."""
FRAME_WIDTH = 8
"""Characters of the panel's frame and of its gaps."""


def print_start(
    run: Run, trainer: "pl.Trainer", method: "MoCo", data: "PretrainingData", step: int | None
) -> None:
    """Print what a pretraining is about to do: a panel, or plain lines without a terminal.

    Args:
        run: the run.
        trainer: its Trainer.
        method: its method.
        data: its data.
        step: number of optimizer steps that are done already; None for a new run.
    """
    print_rows(run, "Pretraining", start_rows(run, trainer, method, data, step))


def print_rows(run: Run, title: str, rows: Sequence[Row]) -> None:
    """Print what a training is about to do: a panel, or plain lines without a terminal.

    Args:
        run: the run.
        title: of the panel.
        rows: names and texts.
    """
    width = max(len(name) for name, _ in rows)
    if not run.console.is_terminal:
        for name, text in rows:
            line = printable(f"{name:{width}}  {text}")
            run.console.print(line, soft_wrap=True, highlight=False, markup=False)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    below = []
    for name, text in rows:
        # A path or command that the frame would break cannot be copied.
        if name in COPIED and width + len(text) + FRAME_WIDTH > run.console.width:
            below.append((name, text))
            continue
        # As Text, brackets in a path are no markup.
        table.add_row(name, Text(printable(text)))
    run.console.print(Panel(table, title=title, title_align="left", expand=False))
    for name, text in below:
        print_plain(run.console, printable(f"{name}: {text}"))


def start_rows(
    run: Run, trainer: "pl.Trainer", method: "MoCo", data: "PretrainingData", step: int | None
) -> list[Row]:
    """Return the names and texts of the panel's rows; see `print_start`."""
    config: TrainConfig = run.config
    names = chosen_names(run.files)
    source = data.source
    rows = [
        ("method", named(names.get("method"), describe_method(config))),
        ("backbone", describe_backbone(config, method)),
        ("images", describe_images(source)),
    ]
    size = config.method.queue_size
    if size is not None:
        rows.append(("queue", describe_queue(config, len(source.train))))
        if step is None:
            rows.append(("loss", describe_loss(config, method.loss_of_chance(size))))
    if source.bank is not None and source.queries is not None:
        num_bank = len(source.bank.images)
        num_queries = len(source.queries.images)
        rows.append(("kNN", f"{num_bank:,} images in the bank, {num_queries:,} queries"))
    operations = ", ".join(name.replace("_", " ") for name in config.augmentation.query or {})
    views = f"views of {data.image_size} px; {operations}"
    rows += [
        ("augmentation", named(names.get("augmentation"), views)),
        ("steps", describe_steps(config, len(source.train), step)),
        ("batch", describe_batch(config, trainer)),
        ("precision", str(trainer.precision)),
    ]
    if "experiment" in names:
        rows.insert(0, ("experiment", names["experiment"]))
    return rows + rows_of_folder(run)


def rows_of_folder(run: Run) -> list[Row]:
    """Return the run folder, and the command that shows the run in TensorBoard if it is there."""
    folder = os.path.relpath(run.folder)
    rows = [("run folder", folder)]
    if "tensorboard" in (run.config.logger or ()):
        rows.append(("watch it", f"tensorboard --logdir {shell_quoted(folder)}"))
    return rows


def named(name: str | None, text: str) -> str:
    """Return ``name: text``, or the text alone without a name."""
    return text if name is None else f"{name}: {text}"


def chosen_names(files: Mapping[str, str]) -> dict[str, str]:
    """Return what each config group was chosen to be, such as ``{"method": "moco_v2"}``.

    Args:
        files: the texts of the folder's ``.hydra``, by name. `moco.pretrain` has none of Hydra's.
    """
    choices = {}
    if "hydra.yaml" in files:
        choices = yaml.safe_load(files["hydra.yaml"])["hydra"]["runtime"]["choices"]
    if PRESET_FILE in files:
        preset = yaml.safe_load(files[PRESET_FILE])
        for item in parsed(preset.pop("overrides")):
            if "." not in key_of(item):  # a group, and no value in one
                choices[key_of(item)] = item.get_value_element_as_str()
        choices["experiment"] = Preset(**preset).name
    return {group: str(name) for group, name in choices.items() if name is not None}


def describe_method(config: TrainConfig) -> str:
    """Return the switches of the method in words."""
    method = config.method
    if method.queue_size is None:
        negatives = "negatives from the batch"
    else:
        negatives = f"queue of {method.queue_size:,} keys"
    momentum = f"momentum {method.key_momentum:g}"
    if method.key_momentum_schedule != "constant":
        momentum += f" to {method.key_momentum_end:g}"
    parts = [negatives, f"temperature {method.temperature:g}", momentum]
    if method.symmetric:
        parts.append("symmetric loss")
    if method.dense_weight > 0:
        dense_term = f"dense term of weight {method.dense_weight:g}"
        if method.decoder is not None:
            dense_term += f" on an {method.decoder.upper()}"
        parts.append(dense_term)
    if method.neighbours > 0:
        parts.append(f"nearest {method.neighbours} keys of the queue as positives")
    return ", ".join(parts)


def describe_queue(config: TrainConfig, num_images: int) -> str:
    """Return the size of the queue, and how it stands to the images and the batch."""
    from moco.runs.checkpoint_files import in_bytes

    size = config.method.queue_size
    assert size is not None
    num_bytes = config.method.num_queues * size * config.method.embedding_dim * 4  # float32
    share = "at most a tenth of the images"
    if size > num_images // 10:
        share = "more than a tenth of the images"
    text = f"{size:,} keys ({in_bytes(num_bytes)}), {share}: see K in docs/recipes.md"
    if size < config.data.batch_size:
        text += "; it may be smaller than a batch"
    return text


def describe_loss(config: TrainConfig, loss_of_chance: float) -> str:
    """Return the loss of chance, and why the first losses may be lower.

    A queue holds random vectors or nothing at first. An encoder that maps all images close
    together, as it does before training, tells its keys from random vectors at once.
    """
    keys_per_step = config.data.batch_size
    if config.method.symmetric and config.method.num_queues == 1:
        keys_per_step *= 2  # one queue gets the keys of both views
    num_steps = -(-(config.method.queue_size or 0) // keys_per_step)
    steps = "the first step has" if num_steps == 1 else f"the first {num_steps:,} steps have"
    return (
        f"{loss_of_chance:.2f} is chance; it may begin near 0 and rise, until {steps} filled the "
        "queue with real keys"
    )


def describe_backbone(config: TrainConfig, method: "MoCo") -> str:
    """Return the backbone's name, its number of parameters and the width of its features."""
    backbone: Any = method.query_encoder.backbone
    number = sum(weight.numel() for weight in backbone.parameters())
    name = config.backbone.model or config.backbone.target or config.backbone.name
    text = f"{name}, {number / 1e6:.1f} million parameters, {backbone.feature_dim:,} features"
    if config.init_from is not None:
        text += f", from {config.init_from}"
    return text


def describe_images(source: "DataSource") -> str:
    """Return how many images there are, in which formats and of which sizes."""
    from moco.data.files.listing import by_count
    from moco.data.sources.source import ArrayImages, FileImages

    train = source.train
    parts = [f"{len(train):,}"]
    if isinstance(train, FileImages):
        formats = by_count(formats_of(train))
        parts.append(", ".join(ending for ending, _ in formats[:MOST_FORMATS]))
        if len(formats) > MOST_FORMATS:
            parts[-1] += ", ..."
    if isinstance(train, (FileImages, ArrayImages)):
        sizes = sizes_of(train)
        if sizes:
            parts.append(sizes)
    return "; ".join(parts)


def formats_of(images: "Images") -> Counter[str]:
    """Return how many images there are of each ending, among some of them."""
    from moco.data.files.listing import NO_ENDING, ending_of

    formats: Counter[str] = Counter()
    for index in range(0, len(images), max(1, len(images) // NUM_NAMED)):
        path, _, _ = images.name(index).partition("#")  # a page of a file follows the sign
        formats[ending_of(path) or NO_ENDING] += 1
    return formats


def sizes_of(images: "Images") -> str:
    """Return the smallest and the largest size among some images; nothing if none can be read."""
    found = []
    for height, width in measured_sizes(images):
        found.append((width * height, width, height))
    if not found:
        return ""
    shown = []
    for _, width, height in (min(found), max(found)):
        shown.append(f"{width} x {height}")
    sizes = " to ".join(dict.fromkeys(shown)) + " px"
    if len(images) // NUM_MEASURED > 1:
        sizes += f" ({len(found)} of them looked at)"
    return sizes


def measured_sizes(images: "Images") -> list[tuple[int, int]]:
    """Return (height, width), px, of some images, evenly spaced, without the unreadable ones."""
    from moco.data.files.images import UnreadableImage

    stride = max(1, len(images) // NUM_MEASURED)
    sizes = []
    for index in range(0, len(images), stride):
        try:
            sizes.append(images.opened(index).size)
        except UnreadableImage:
            continue
    return sizes


def describe_steps(config: TrainConfig | SegmentConfig, num_images: int, step: int | None) -> str:
    """Return steps per epoch, epochs, all steps, and how many are done already."""
    per_epoch = num_images // config.data.batch_size
    epochs = config.trainer.max_epochs
    total = per_epoch * epochs
    text = f"{per_epoch:,} an epoch x {epochs:,} epoch{'s' if epochs > 1 else ''} = {total:,}"
    if 0 < config.trainer.max_steps < total:
        text += f", ended by trainer.max_steps={config.trainer.max_steps:,}"
    if step is not None:
        text += f"; {step:,} are done"
    return text


def describe_batch(config: TrainConfig | SegmentConfig, trainer: "pl.Trainer") -> str:
    """Return the number of images of an optimizer step and the devices that share them."""
    import torch

    number = trainer.world_size
    device = trainer.strategy.root_device
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        where = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if number > 1:
        where = f"{number} devices ({where})"
    text = f"{config.data.batch_size:,} images on {where}"
    num_parts = config.trainer.accumulate_grad_batches
    if num_parts > 1:
        text += f", in {num_parts} parts"
    return text
