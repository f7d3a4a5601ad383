"""Write the table of published methods in docs/methods.md from conf/.

    python scripts/method_table.py

It composes at least one experiment of every method and writes the table between the two markers of
the page.
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
"""At least one experiment of each method, on ImageNet as published."""
COLUMNS = (
    "method",
    "backbone",
    "head",
    "predictor",
    "negatives",
    "symmetric",
    "T",
    "K",
    "dim",
    "m",
    "batch norm",
    "optimizer",
    "views",
)


def composed(experiment: str) -> tuple[dict[str, str], TrainConfig]:
    """Return the chosen name of each config group, and the config."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        overrides = [f"+experiment={experiment}", "data.root=."]
        config = compose("train", overrides, return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    keys = [key for key in config if key != "hydra"]
    return choices, parse(OmegaConf.masked_copy(config, keys), TrainConfig)


def row(experiment: str) -> dict[str, str]:
    """Return the cells of an experiment's row, by column."""
    choices, config = composed(experiment)
    method, optimizer = config.method, config.optimizer
    crop = config.augmentation.query["random_resized_crop"]
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
    """Return a projector or predictor in words."""
    if settings.num_layers == 0:
        return "none"
    if settings.num_layers == 1:
        return "linear"
    words = f"{settings.num_layers} layers"
    if settings.hidden_dim:
        words += f", {settings.hidden_dim} wide"
    if settings.hidden_batch_norm:
        words += ", BN"
        if settings.last_batch_norm:
            words += ", last too"
    return words


def negatives(config: TrainConfig) -> str:
    method = config.method
    if method.negatives == "batch":
        return "batch"
    words = "queue" if method.num_queues == 1 else "2 queues"
    if method.dense_weight:
        words += f", {method.dense_weight:g} dense"
    return words


def symmetric(config: TrainConfig) -> str:
    method = config.method
    words = method.symmetric_reduction if method.symmetric else "no"
    if method.loss_times_2t:
        words += ", times 2T"
    return words


def table() -> str:
    """Return the table in Markdown."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for experiment in EXPERIMENTS:
        texts = row(experiment)
        lines.append([texts[column] for column in COLUMNS])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def renewed(page: str) -> str:
    """Return the page with the table of the present conf/."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
    print(table(), end="")
