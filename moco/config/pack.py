"""The settings of ``moco.pack``."""

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

from moco.config.data import PackDataConfig
from moco.config.settings import setting


@dataclass
class PackConfig:
    """Everything that ``python -m moco.pack`` can be told."""

    output: str = MISSING
    """A folder for the copy alone."""
    data: PackDataConfig = field(default_factory=PackDataConfig)
    format: str = setting("auto", choices=("array", "auto", "shards"))
    """array: pixels in one file that is mapped into memory. shards: tar files of JPEGs, which
    webdataset reads too. auto: array if it takes less than half of the free disk space."""
    quality: int = setting(95, at_least=1, at_most=100)
    """JPEG quality in shards. A JPEG that keeps its size is copied as it is."""
    max_shard_bytes: int = setting(2**29, at_least=1)
    """A shard ends with the image that reaches this size. An interrupted copy goes on after its
    last complete shard."""
    num_workers: Optional[int] = setting(None, at_least=0)
    """The same as data.num_workers, under its former name. Null: that decides."""
    check: bool = False
    """Write nothing. Compare a finished copy with its checksums and with the source's names."""
