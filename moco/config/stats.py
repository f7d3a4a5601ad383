"""The settings of ``moco.stats``."""

from dataclasses import dataclass, field
from typing import Optional

from moco.config.data import StatsDataConfig
from moco.config.settings import setting


@dataclass
class StatsConfig:
    """Everything that ``python -m moco.stats`` can be told."""

    data: StatsDataConfig = field(default_factory=StatsDataConfig)
    low: float = setting(0.1, at_least=0, below=50)
    """Percentile of the values that data.value_range maps to 0. A band whose values are never
    negative starts at 0 if this percentile is near 0."""
    high: float = setting(99.9, above=50, at_most=100)
    """Percentile of the values that data.value_range maps to 1."""
    per_band: bool = False
    """Propose a value range for each band. By default all bands share one."""
    num_workers: Optional[int] = setting(None, at_least=0)
    """The same as data.num_workers, under its former name. Null: that decides."""
    output: Optional[str] = None
    """Where the figures are written as JSON. Null: stats.json in the run folder."""
