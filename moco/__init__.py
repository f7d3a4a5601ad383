"""Momentum Contrast (MoCo): self-supervised pretraining, arXiv 1911.05722 and its successors.

The public names are imported when they are first used, so `import moco` is fast and changes
nothing. ``docs/python.md`` shows how they go together.
"""

import importlib

TYPE_CHECKING = False  # as type checkers read it; importing typing would take longer than json

if TYPE_CHECKING:
    from moco.callbacks.knn_monitor import KNNMonitor as KNNMonitor
    from moco.cli.from_python import pretrain as pretrain
    from moco.data.augment.operation import Operation as Operation
    from moco.data.augment.operations import register_operation as register_operation
    from moco.data.augment.views import ViewPair as ViewPair
    from moco.data.sources.registry import register_source as register_source
    from moco.errors import InputError as InputError
    from moco.errors import Interrupted as Interrupted
    from moco.errors import RunError as RunError
    from moco.evaluation.knn import knn_accuracy as knn_accuracy
    from moco.methods.key_queue import KeyQueue as KeyQueue
    from moco.methods.losses import info_nce as info_nce
    from moco.methods.moco import MoCo as MoCo
    from moco.methods.momentum import update_key_encoder as update_key_encoder
    from moco.models.backbones import build_backbone as build_backbone
    from moco.models.backbones import register_backbone as register_backbone
    from moco.models.swin.window_change import rewindow as rewindow
    from moco.weights.load_encoder import load_encoder as load_encoder
    from moco.weights.load_segmenter import load_segmenter as load_segmenter

__version__ = "0.1.0"

MODULES = {
    "InputError": "moco.errors",
    "Interrupted": "moco.errors",
    "KNNMonitor": "moco.callbacks.knn_monitor",
    "KeyQueue": "moco.methods.key_queue",
    "MoCo": "moco.methods.moco",
    "Operation": "moco.data.augment.operation",
    "RunError": "moco.errors",
    "ViewPair": "moco.data.augment.views",
    "build_backbone": "moco.models.backbones",
    "info_nce": "moco.methods.losses",
    "knn_accuracy": "moco.evaluation.knn",
    "load_encoder": "moco.weights.load_encoder",
    "load_segmenter": "moco.weights.load_segmenter",
    "pretrain": "moco.cli.from_python",
    "register_backbone": "moco.models.backbones",
    "register_operation": "moco.data.augment.operations",
    "register_source": "moco.data.sources.registry",
    "rewindow": "moco.models.swin.window_change",
    "update_key_encoder": "moco.methods.momentum",
}
"""The public names, and where they are."""


def __getattr__(name: str) -> object:
    if name not in MODULES:
        raise AttributeError(f"module 'moco' has no attribute '{name}'")
    return getattr(importlib.import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
