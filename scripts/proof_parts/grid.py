"""What the proof compares: data sets, rows, ways of fine-tuning, and how long all of it trains."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Budget:
    """How long a data set's networks train, and on images of which size. Every row has the same."""

    image_size: int
    """Side of the pretraining's views, px."""
    window: int
    """Side of the attention windows in pretraining, cells."""
    new_image_size: int
    """Side of the fine-tuning's crops, px."""
    new_window: int
    """Side of the attention windows in fine-tuning, cells."""
    tile: int
    """Side of the tiles that the pretraining images are cut into, px."""
    pretraining_steps: int
    pretraining_batch: int
    queue_size: int
    tuning_steps: dict[str, int]
    """Optimizer steps of each way of fine-tuning."""
    tuning_batch: int
    minutes: float
    """The longest run of the data set on two cores, or on one GPU with --full, about."""


@dataclass(frozen=True)
class DataSet:
    """Images with masks, and the images that are pretrained on."""

    name: str
    title: str
    root: str
    """The folder of the images with masks, below ``--data``."""
    sources: tuple[str, ...]
    """The folders whose training images are pretrained on, below ``--data``."""
    held_out: str
    """The folder of the images that the results are measured on: ``test``, or ``val``."""
    monitor_image_size: int
    """The shorter side of the images of ``monitor.dense``, px: about their own size."""
    label_fractions: tuple[float, ...]
    budgets: dict[str, Budget]
    """By the name of the scale."""
    flips: bool = False
    """There is no up and down in these images: pretraining also turns them over."""


@dataclass(frozen=True)
class Row:
    """A network with its pretraining, and how its windows grow."""

    name: str
    title: str
    backbone: str
    """``resnet``, ``swin`` or ``swin_v2``; `SCALES` says which networks these are."""
    pretraining: str | None
    """A key of `PRETRAININGS`; None: from scratch."""
    windows: str = "exact"
    """What a larger window does to Swin's position biases. exact: offsets that both windows have
    keep their bias (a table is resized bicubically). stretched: the coordinates are normalised by
    the new window. table: the biases become a table, which is resized bicubically."""


@dataclass(frozen=True)
class Scale:
    """The networks of one size, and the seeds."""

    backbones: dict[str, tuple[str, ...]]
    """The settings that choose each row's network."""
    accelerator: str
    num_workers: int


@dataclass(frozen=True)
class Cell:
    """One figure of the results."""

    data_set: DataSet
    row: Row
    tuning: str
    """A key of `TUNINGS`."""
    label_fraction: float
    seed: int

    def __str__(self) -> str:
        fraction = f"{self.label_fraction:g}"
        return f"{self.data_set.name}/{self.row.name}/{self.tuning}/{fraction}/{self.seed}"


DENSE = ("method.dense_weight=0.5",)
# The settings of each pretraining that differ from those of the plain method, by name.
PRETRAININGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "resnet": ("resnet", ()),
    "resnet_dense": ("resnet", DENSE),
    "v1": ("swin", ()),
    "v2": ("swin_v2", ()),
    "v2_dense": ("swin_v2", DENSE),
    "v2_location": ("swin_v2", (*DENSE, "method.dense_match=location")),
    "v2_local_crops": ("swin_v2", (*DENSE, "method.local_crops=2")),
    "v2_neighbours": ("swin_v2", (*DENSE, "method.neighbours=5")),
    "v2_fpn": ("swin_v2", (*DENSE, "method.decoder=fpn", "method.decoder_channels=128")),
    "v2_norm_pre": ("swin_v2", ("backbone.norm=pre",)),
    "v2_dot": ("swin_v2", ("backbone.attention=dot",)),
    "v2_bias_table": ("swin_v2", ("backbone.position_bias=table",)),
    "v2_linear_cpb": ("swin_v2", ("backbone.position_bias=linear_cpb",)),
}
ROWS = (
    Row("scratch_resnet", "ResNet from scratch", "resnet", None),
    Row("resnet", "MoCo v2, ResNet", "resnet", "resnet"),
    Row("resnet_dense", "MoCo v2 + dense term, ResNet", "resnet", "resnet_dense"),
    Row("scratch_v2", "Swin V2 from scratch", "swin_v2", None),
    Row("v1", "Swin V1, table resized bicubically", "swin", "v1"),
    Row("v2_stretched", "Swin V2, normaliser stretched", "swin_v2", "v2", "stretched"),
    Row("v2_table", "Swin V2, biases resized as a table", "swin_v2", "v2", "table"),
    Row("v2", "Swin V2, re-windowed", "swin_v2", "v2"),
    Row("v2_dense", "+ dense term", "swin_v2", "v2_dense"),
    Row("v2_location", "+ dense term, dense_match=location", "swin_v2", "v2_location"),
    Row("v2_local_crops", "+ dense term, local_crops=2", "swin_v2", "v2_local_crops"),
    Row("v2_neighbours", "+ dense term, neighbours=5", "swin_v2", "v2_neighbours"),
    Row("v2_fpn", "+ dense term, decoder=fpn", "swin_v2", "v2_fpn"),
    Row("v2_norm_pre", "Swin V2 with norm=pre", "swin_v2", "v2_norm_pre"),
    Row("v2_dot", "Swin V2 with attention=dot", "swin_v2", "v2_dot"),
    Row("v2_bias_table", "Swin V2 with position_bias=table", "swin_v2", "v2_bias_table"),
    Row("v2_linear_cpb", "Swin V2 with position_bias=linear_cpb", "swin_v2", "v2_linear_cpb"),
)
# What is compared, row by row: a row, and the row that it should be better than.
COMPARISONS = (
    ("resnet", "scratch_resnet"),
    ("resnet_dense", "scratch_resnet"),
    ("v2", "scratch_v2"),
    ("v2_dense", "scratch_v2"),
    ("v2", "resnet"),
    ("v2", "v2_stretched"),
    ("v2", "v2_table"),
    ("v2", "v1"),
    ("resnet_dense", "resnet"),
    ("v2_dense", "v2"),
    ("v2_location", "v2_dense"),
    ("v2_local_crops", "v2_dense"),
    ("v2_neighbours", "v2_dense"),
    ("v2_fpn", "v2_dense"),
    ("v2", "v2_norm_pre"),
    ("v2", "v2_dot"),
    ("v2", "v2_bias_table"),
    ("v2", "v2_linear_cpb"),
)
# The ways of fine-tuning, and what is set for each. layer_decay is 1 for every row, because its
# default is another one for a pretrained Swin.
TUNINGS: dict[str, tuple[str, ...]] = {
    "fine-tuned": ("decoder=fpn", "decoder.channels=128"),
    "frozen": ("freeze_backbone=true", "decoder=linear"),
}
LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "fine-tuned": (3e-4, 1e-3, 3e-3),
    "frozen": (3e-3, 1e-2, 3e-2),
}
"""The learning rates of `--search`; the middle one is used where nothing was searched."""

SEARCHED = ("scratch_resnet", "resnet", "scratch_v2", "v2")
"""The rows with which `--search` tries them. The other rows share what it finds."""

SCALES: dict[str, Scale] = {
    "cpu": Scale(
        {
            "resnet": ("backbone=resnet18_half",),
            "swin": ("backbone=swin_tiny_patch4",),
            "swin_v2": ("backbone=swin_v2_tiny_patch4",),
        },
        accelerator="cpu",
        num_workers=0,
    ),
    "full": Scale(
        {
            "resnet": ("backbone=resnet50",),
            "swin": ("backbone=swin_t",),
            "swin_v2": ("backbone=swin_v2_t",),
        },
        accelerator="auto",
        num_workers=8,
    ),
}

ON_CPU = Budget(
    image_size=64,
    window=4,
    new_image_size=128,
    new_window=8,
    tile=96,
    pretraining_steps=1000,
    pretraining_batch=64,
    queue_size=512,
    tuning_steps={"fine-tuned": 60, "frozen": 60},
    tuning_batch=8,
    minutes=20,
)
AT_FULL_SIZE = Budget(
    image_size=224,
    window=7,
    new_image_size=448,
    new_window=14,
    tile=360,
    pretraining_steps=20_000,
    pretraining_batch=256,
    queue_size=4096,
    tuning_steps={"fine-tuned": 1000, "frozen": 1000},
    tuning_batch=16,
    minutes=240,
)
DATA_SETS = (
    DataSet(
        "camvid",
        "CamVid",
        root="camvid",
        monitor_image_size=360,
        sources=("camvid",),
        held_out="test",
        label_fractions=(0.05, 0.2, 1.0),
        budgets={"cpu": ON_CPU, "full": AT_FULL_SIZE},
    ),
    DataSet(
        "camvid_tiny_imagenet",
        "CamVid, pretrained on Tiny ImageNet",
        root="camvid",
        monitor_image_size=360,
        sources=("tiny_imagenet",),
        held_out="test",
        label_fractions=(0.05, 0.2, 1.0),
        budgets={
            # The images have 64 px, and are whole.
            "cpu": ON_CPU,
            "full": replace(
                AT_FULL_SIZE, image_size=64, window=4, new_image_size=128, new_window=8
            ),
        },
    ),
    DataSet(
        "dsb2018",
        "DSB2018",
        root="dsb2018",
        monitor_image_size=256,
        sources=("dsb2018",),
        held_out="test",
        label_fractions=(0.05, 0.2, 1.0),
        budgets={
            "cpu": ON_CPU,
            "full": replace(AT_FULL_SIZE, tile=256),
        },
        flips=True,
    ),
    DataSet(
        "drive",
        "DRIVE",
        root="drive",
        monitor_image_size=565,
        sources=("drive", "dsb2018"),
        # It has no third part. No setting was chosen on it.
        held_out="val",
        label_fractions=(0.2, 1.0),
        budgets={
            "cpu": replace(
                ON_CPU,
                image_size=224,
                window=7,
                new_image_size=565,
                new_window=18,
                tile=224,
                pretraining_steps=500,
                pretraining_batch=32,
                tuning_steps={"fine-tuned": 100, "frozen": 100},
                tuning_batch=4,
                minutes=120,
            ),
            "full": replace(
                AT_FULL_SIZE, new_image_size=565, new_window=18, tile=224, tuning_batch=4
            ),
        },
        flips=True,
    ),
)


def cells_of(seeds: Sequence[int], patterns: Sequence[str] = ()) -> Iterator[Cell]:
    """Yield the cells of the grid, all of a seed before those of the next.

    So a grid that is stopped early has the same seeds in every row.

    Args:
        seeds: of pretraining, fine-tuning and the choice of labelled images.
        patterns: shell patterns of the names of cells, such as ``camvid/v2*/frozen/*``. A cell that
            fits one of them is in. None: all cells.
    """
    for seed in seeds:
        for data_set in DATA_SETS:
            for row in ROWS:
                for tuning in TUNINGS:
                    for fraction in data_set.label_fractions:
                        cell = Cell(data_set, row, tuning, fraction, seed)
                        if not patterns or fits(str(cell), patterns):
                            yield cell


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name fits one of several shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
