"""The table of docs/methods.md: what each published variant is, taken from conf/.

    python scripts/method_table.py

Composes one experiment of every method and writes the table between the two marks of the page.
"""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.train import ProjectorConfig, TrainConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- table of scripts/method_table.py -->\n", "<!-- end of the table -->\n"
EXPERIMENTS = (
    "imagenet_moco_v1_resnet50",
    "imagenet_moco_v2_resnet50",
    "imagenet_moco_v2_plus_resnet50",
    "imagenet_moco_v3_resnet50",
    "imagenet_moco_v3_vit_s",
    "imagenet_moby_swin_t",
    "imagenet_densecl_resnet50",
)
"""At least one of each method, on ImageNet as published."""
COLUMNS = (
    "method", "backbone", "head", "predictor", "negatives", "symmetric", "T", "K", "dim", "m", "batch norm", "optimizer",
    "views",
)  # fmt: skip


def composed(experiment: str) -> tuple[dict[str, str], TrainConfig]:
    """The names chosen in each group, and the config."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose(
            "train", [f"+experiment={experiment}", "data.root=."], return_hydra_config=True
        )
    choices = dict(config.hydra.runtime.choices)
    return choices, parse(
        OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), TrainConfig
    )


def row(experiment: str) -> dict[str, str]:
    """What the experiment's method is, by column."""
    choices, config = composed(experiment)
    method, optimizer, crop = (
        config.method,
        config.optimizer,
        config.augmentation.query["random_resized_crop"],
    )
    batch_size = optimizer.lr_for_batch_size or config.data.batch_size
    texts = {
        "method": f"`{choices['method']}`",
        "backbone": choices["backbone"],
        "head": head(method.projector),
        "predictor": head(method.predictor),
        "negatives": negatives(config),
        "symmetric": symmetric(config),
        "T": f"{method.temperature:g}",
        "K": "" if method.queue_size is None else str(method.queue_size),
        "dim": str(method.embedding_dim),
        "m": f"{method.key_momentum:g}",
        "batch norm": method.batch_norm,
        "optimizer": f"{optimizer.name} {optimizer.lr:g} for batch {batch_size}",
        "views": f"{choices['augmentation']}, crops from {crop['scale'][0]:g}",
    }
    if method.key_momentum_schedule == "cosine":
        texts["m"] += f" to {method.key_momentum_end:g}"
    return texts


def head(settings: ProjectorConfig) -> str:
    """A projector or predictor in words."""
    if settings.num_layers < 2:
        return ("none", "linear")[settings.num_layers]
    width = f"{settings.num_layers} layers" + (
        f", {settings.hidden_dim} wide" if settings.hidden_dim else ""
    )
    norms = {(True, False): ", BN", (True, True): ", BN, last too"}
    return width + norms.get((settings.hidden_batch_norm, settings.last_batch_norm), "")


def negatives(config: TrainConfig) -> str:
    method = config.method
    if method.negatives == "batch":
        return "batch"
    of_cells = f", {method.dense_weight:g} dense" if method.dense_weight else ""
    return ("queue", "2 queues")[method.num_queues - 1] + of_cells


def symmetric(config: TrainConfig) -> str:
    method = config.method
    return (method.symmetric_reduction if method.symmetric else "no") + (
        ", times 2T" if method.loss_times_2t else ""
    )


def table() -> str:
    """In Markdown, its lines ended."""
    rows = [row(experiment) for experiment in EXPERIMENTS]
    cells = [
        COLUMNS,
        ["---"] * len(COLUMNS),
        *([texts[column] for column in COLUMNS] for texts in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def renewed(page: str) -> str:
    """The page with the table as conf/ has it now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
    print(table(), end="")
