"""The settings of ``moco.predict``: names, types, ranges and meaning."""

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from moco.config.data import DisplayConfig, ImageSourceConfig
from moco.config.pretrained import is_given
from moco.config.settings import setting
from moco.errors import InputError


@dataclass
class PredictDataConfig(ImageSourceConfig):
    """The images that get masks."""

    tile: Optional[int] = setting(None, at_least=4)
    """``images`` and ``image_folder``: read TIFF and .npy files of any size in parts, and not
    whole. Each file still gets one mask. Any number switches it on; the parts are as large as the
    windows of image_size."""
    bands: Any = None
    """Bands to take, in this order: numbers from 1, or names where the files have them. Null: as
    in the checkpoint's run."""
    value_range: Any = None
    """``[low, high]``: the values that become 0 and 1; or such a pair for each band. Null: as in
    the checkpoint's run."""
    nodata: Optional[float] = None
    """The value of pixels without data. They become the mean. Null: as in the checkpoint's run."""
    dicom_window: Optional[bool] = None  # type: ignore[assignment]
    """DICOM: apply the window that the file proposes for display. Null: as in the checkpoint's
    run."""
    max_bad_fraction: float = setting(1.0, at_least=0, at_most=1)
    """The program stops when more than this share of the images is unreadable. Images that cannot
    be read are named and left out."""
    ignore_index: int = setting(255, at_least=0, at_most=65535)
    """``voc2012`` and ``segmentation_folder``: the number of mask pixels without a class."""
    num_workers: Optional[int] = setting(None, at_least=0)
    """Loader processes. Null: 4, or the number of cores if that is smaller; none for images in
    memory."""


@dataclass
class PredictBackboneConfig:
    """What can be changed of the model's backbone."""

    window_size: Any = None
    """Swin: side of the attention windows, cells. One number, or a list with one per stage. Null:
    the checkpoint's."""
    target: Optional[str] = None
    """The function that makes a backbone of your own, as the checkpoint names it. It is imported
    then."""


@dataclass
class PredictConfig:
    """Everything that ``python -m moco.predict`` can be told."""

    checkpoint: str = MISSING
    """A checkpoint of moco.segment. A run folder stands for its ``last.ckpt``."""
    output: Optional[str] = None
    """The folder for masks/, overlays/, probabilities/ and classes.json. Null: a folder in
    predictions/ of the checkpoint's run folder. The same command goes on there."""
    data: PredictDataConfig = field(default_factory=PredictDataConfig)
    split: Optional[str] = setting(None, choices=("test", "train"))
    """train: all images that training would see. test: the held-out images. Null: test for data
    with masks, otherwise train."""
    inference: Optional[str] = setting(None, choices=("slide", "whole"))
    """whole: an image as it is. slide: windows of image_size that overlap by a third. Null: as in
    the checkpoint's run."""
    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the windows, px. Null: that of the checkpoint's run."""
    blend: bool = True
    """Windows fade into each other, so that no edge shows. false: all pixels of a window count
    alike, as in the figures of moco.segment and moco.evaluate."""
    tta: bool = False
    """Test-time augmentation: average the probabilities over scaled and mirrored copies."""
    tta_scales: list[float] = field(default_factory=lambda: [0.75, 1.0, 1.25])
    """tta: factors of height and width. Every window, or the whole image, is scaled."""
    tta_flip: bool = True
    """tta: also use the mirror image of each copy."""
    probabilities: str = setting("none", choices=("none", "npz", "tiff"))
    """Also write the probabilities. npz: an array (classes, height, width) of 16-bit floats from 0
    to 1. tiff: a 16-bit page for each class, of which 65535 is 1."""
    overlays: bool = False
    """Also write each image with the colours of its classes, as JPEG of at most 2,048 px a side."""
    batch_size: int = setting(8, at_least=1)
    """Images of one size, or windows of one image, in a forward pass."""
    max_forward_pixels: int = setting(4_194_304, at_least=1)
    """Pixels of a forward pass; less than batch_size images are taken if they would have more. An
    image with more pixels is predicted by windows, whatever `inference` says."""
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu", "mps"))
    """auto: CUDA if it works, else the CPU. mps (Apple's GPUs) is refused: it has no float64."""
    devices: Optional[int] = setting(None, at_least=1)
    """GPUs that share the images. Null: all that can be used."""
    backbone: PredictBackboneConfig = field(default_factory=PredictBackboneConfig)
    trust_targets: bool = False
    """Import the functions that the checkpoint names, see ``moco.evaluate --help trust_targets``.
    Only for files that you trust."""
    preview: DisplayConfig = field(default_factory=DisplayConfig)


def check_averaging(config: PredictConfig) -> None:
    """Check that no setting of test-time augmentation is given in vain, and that there is a scale.

    Raises:
        InputError: names the setting.
    """
    for key in ("tta_scales", "tta_flip"):
        if not config.tta and is_given(config, key):
            raise InputError(f"{key}: without tta=true it has no effect")
    if not config.tta_scales:
        raise InputError("tta_scales=[]: expected at least one number, such as 1")
    for scale in config.tta_scales:
        if not 0.1 <= scale <= 10:
            raise InputError(f"tta_scales={config.tta_scales}: expected numbers from 0.1 to 10")
