"""The schema of ``moco.pack``."""

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from moco.config.train import setting


@dataclass
class PackDataConfig:
    """See `DataConfig`."""

    name: str = MISSING
    root: Any = None
    download: bool = False
    resize: Optional[int] = setting(None, at_least=4)
    """Shorter side of the copy's images, px; smaller ones stay as they are. Null: all stay."""
    num_images: Optional[int] = setting(None, at_least=1)
    image_column: Optional[str] = None
    label_column: Optional[str] = None
    held_out: float = setting(0.1, at_least=0, at_most=1)
    pages: str = setting("first", choices=("each", "first"))
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1)
    max_image_pixels: int = setting(178_956_970, at_least=1)


@dataclass
class PackConfig:
    output: str = MISSING
    """A folder for the copy alone."""
    data: PackDataConfig = field(default_factory=PackDataConfig)
    format: str = setting("auto", choices=("array", "auto", "shards"))
    """array: pixels in one file that is mapped into memory; shards: tar files of JPEGs, for webdataset too; auto: array
    where it takes less than half of the free disk space."""
    quality: int = setting(95, at_least=1, at_most=100)
    """Of JPEGs in shards. A JPEG that keeps its size is copied as it is."""
    max_shard_bytes: int = setting(2**29, at_least=1)
    """A shard ends with the image that reaches so many; between two of them an interrupted copy goes on."""
    num_workers: int = setting(4, at_least=0)
    """Processes that read and encode; the copy does not depend on it."""
    check: bool = False
    """Write nothing; compare a finished copy with its checksums, and its names with the source's."""
