"""Models of moco.segment with random weights, which tests write without training."""

import dataclasses

import torch

from moco.config.data import DataConfig
from moco.segmentation.segmenter import Segmenter
from moco.training.random_states import random_states

NAMES = ["wall", "disc", "square"]


def build_random_segmenter(class_names=NAMES, bands=3, ignore_index=255, **backbone):
    """A tiny ResNet with a linear decoder, whose classes differ between pixels."""
    settings = {"name": "resnet_tiny", "in_channels": bands, **backbone}
    torch.manual_seed(0)
    segmenter = Segmenter(
        settings,
        {"name": "linear"},
        {"lr": 0.1, "layer_decay": 1.0},
        len(class_names),
        ignore_index,
        False,
        32,
        list(class_names),
        [0.5],
        [0.25],
    )
    for parameter in segmenter.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return segmenter.eval()


def write_run(folder, class_names=NAMES, inference="whole", data=None, **settings):
    """Write what moco.predict reads of a run folder of moco.segment. Return the folder."""
    segmenter = build_random_segmenter(class_names, **settings)
    of_data = dataclasses.asdict(DataConfig(name="segmentation_folder", root="nowhere"))
    content = {
        "state_dict": segmenter.state_dict(),
        "hyper_parameters": dict(segmenter.hparams),
        "config": {"data": of_data | (data or {}), "inference": inference},
        "figures": {"epoch": 3},
        "random_states": [random_states()],
        "global_step": 7,
    }
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return folder
