"""The rows of the table: the work, its sizes and the unit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.nets import GPU_CHECK, ON_A_GPU, TINY, TINY_GPU_CHECK, Net

PARTS = {
    "tests": "Tests that need a GPU",
    "waits": "What the host waits for",
    "resume": "A resumed run against an uninterrupted one",
    "step": "The training step",
    "loss": "The loss",
    "knn": "kNN classification",
    "data": "Augmentation on the GPU",
    "end_to_end": "Training with data",
    "speed_run": "A speed run",
}
"""Headings by part, in the order in which the parts run: the most important first."""

LIGHTLY, OFFICIAL = "lightly", "official"
BOUND, BOUND_AGAIN = "lower bound", "lower bound, again"
OURS, OURS_SHUFFLED = "ours", "ours, batch_norm=shuffle"
TORCHVISION = "lower bound of torchvision's Swin"
COMPILED, WITH_GRAPHS = "ours, compiled", "ours, compiled with CUDA graphs"
AND_COMPILED = ", compiled"
"""Ends the name of a case of `step` in which ours is compiled."""
PRODUCTS, PLAIN = "two matrix products", "plain form"
KNN_PRODUCT = "product"
BATCH_ENGINE, PILLOW = "ours, batch engine", "official pipeline (Pillow), one process"
STEP_ALONE, WITH_DATA = "our step alone", "ours, with data"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
WAITS, DIFFERENT = "waits between logged steps", "tensors that differ"
EAGER = "eager"
FIRST_STEP, SPEED = "until the first step has ended", "speed after it"


@dataclass(frozen=True)
class Row:
    """One figure."""

    part: str
    case: str
    """The work, with its sizes."""
    contender: str
    unit: str


@dataclass(frozen=True)
class Batches:
    """Images in memory that become two views."""

    augmentation: str
    """In ``conf/augmentation``."""
    stored_size: int
    """Side of an image in memory, px."""
    view_size: int
    """Side of a view, px."""
    num_images: int
    batch_size: int


@dataclass(frozen=True)
class Sizes:
    """How large the work of each part is. The keys are the names of its cases."""

    nets: Mapping[str, Net]
    losses: Mapping[str, tuple[int, int]]
    """N and K."""
    banks: Mapping[str, tuple[int, int, int]]
    """Rows and width of the bank, queries."""
    batches: Mapping[str, Batches]
    trainings: Mapping[str, Net]
    training_steps: int
    """Of one turn of a training with data."""
    speed_run_seconds: float
    repeats: int
    """Rounds of contenders in turns."""

    @property
    def speed_run(self) -> str:
        """The name of its only case."""
        return f"cifar10_speedrun, its first {self.speed_run_seconds:g} s"

    @property
    def speed_marks(self) -> list[float]:
        """Seconds of the speed run after which loss and kNN are looked at."""
        return [self.speed_run_seconds * quarter / 4 for quarter in (1, 2, 3, 4)]


FULL = Sizes(
    nets=GPU_CHECK,
    losses={f"N {n}, K {k:,}": (n, k) for n in (256, 512) for k in (4096, 65536)},
    banks={
        "bank 50,000 x 128, 10,000 queries": (50_000, 128, 10_000),
        "bank 200,000 x 512, 10,000 queries": (200_000, 512, 10_000),
    },
    batches={
        "two views of 32 px": Batches("cifar", 32, 32, 4096, 512),
        "two views of 224 px of images of 256 px": Batches("moco_v2", 256, 224, 512, 128),
    },
    trainings={"ResNet-18, 32 px, batch 512": ON_A_GPU["resnet18 K 4096"]},
    training_steps=50,
    speed_run_seconds=60,
    repeats=5,
)
TINY_SIZES = Sizes(
    nets=TINY_GPU_CHECK,
    losses={f"N {n}, K {k}": (n, k) for n in (8, 16) for k in (64, 128)},
    banks={
        "bank 1,000 x 16, 50 queries": (1000, 16, 50),
        "bank 2,000 x 32, 50 queries": (2000, 32, 50),
    },
    batches={
        "two views of 16 px": Batches("cifar", 16, 16, 16, 8),
        "two views of 24 px of images of 32 px": Batches("moco_v2", 32, 24, 8, 4),
    },
    trainings={"tiny ResNet, 16 px, batch 16": TINY["resnet_tiny"]},
    training_steps=2,
    speed_run_seconds=2,
    repeats=1,
)

WAITING = (
    "MoCo v2, SGD, settings of speed at their defaults",
    "AdamW, gradients clipped",
    "symmetric, dense term",
)
RESUMED = (EAGER, "compiled with CUDA graphs")


def rows(sizes: Sizes) -> list[Row]:
    """Return every row of the check, part by part."""
    return [row for part in PARTS for row in rows_of(part, sizes)]


def rows_of(part: str, sizes: Sizes) -> list[Row]:
    """Return the rows of one part, in the order of the table."""
    if part == "tests":
        return table(part, ["tests marked gpu"], (PASSED, FAILED, SKIPPED), "tests")
    if part == "waits":
        return table(part, WAITING, (WAITS,), "per step")
    if part == "resume":
        return table(part, RESUMED, (DIFFERENT,), "tensors")
    if part == "step":
        return step_rows(part, sizes)
    if part == "loss":
        return table(part, sizes.losses, (PRODUCTS, OURS, PLAIN, LIGHTLY), "ms")
    if part == "knn":
        return table(part, sizes.banks, (KNN_PRODUCT, OURS, LIGHTLY), "ms")
    if part == "data":
        return table(part, sizes.batches, (BATCH_ENGINE, PILLOW), "images/s")
    if part == "end_to_end":
        contenders = (STEP_ALONE, WITH_DATA, OFFICIAL, LIGHTLY)
        return table(part, sizes.trainings, contenders, "images/s")
    return speed_run_rows(part, sizes)


def table(part: str, cases: Iterable[str], contenders: Sequence[str], unit: str) -> list[Row]:
    """Return a row for each contender of each case."""
    return [Row(part, case, contender, unit) for case in cases for contender in contenders]


def step_rows(part: str, sizes: Sizes) -> list[Row]:
    """Return the rows of every net, first eager and then compiled, which takes most of the time."""
    found = []
    for case, net in sizes.nets.items():
        contenders = [BOUND, BOUND_AGAIN, OURS]
        if net.has_batch_norm:
            contenders.append(OURS_SHUFFLED)
        if net.window_size:
            contenders.append(TORCHVISION)
        found += table(part, [case], [*contenders, OFFICIAL, LIGHTLY], "images/s")
    compiled = [case + AND_COMPILED for case in sizes.nets]
    return found + table(part, compiled, (BOUND, COMPILED, WITH_GRAPHS), "images/s")


def speed_run_rows(part: str, sizes: Sizes) -> list[Row]:
    case = sizes.speed_run
    found = [Row(part, case, FIRST_STEP, "s"), Row(part, case, SPEED, "images/s")]
    for seconds in sizes.speed_marks:
        found.append(Row(part, case, loss_after(seconds), "nats"))
        found.append(Row(part, case, knn_after(seconds), "%"))
    return found


def loss_after(seconds: float) -> str:
    return f"loss after {seconds:g} s"


def knn_after(seconds: float) -> str:
    return f"kNN top-1 after {seconds:g} s"
