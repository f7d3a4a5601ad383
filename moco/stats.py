"""Measure the values of a dataset: ``python -m moco.stats data=images data.root=PATH``.

It looks at every band, and prints the lines to paste: ``data.value_range``, ``augmentation.mean``
and ``augmentation.std``.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.checks import check_output
from moco.cli.launch import hydra_files, launch
from moco.config.stats import StatsConfig
from moco.errors import InputError, printable
from moco.phases import LOADING, phase

if TYPE_CHECKING:
    from moco.data.band_statistics import Statistics
    from moco.data.sources.source import DataSource

log = logging.getLogger(__name__)

COLUMNS = ("band", "min", "0.1 %", "median", "99.9 %", "max", "mean", "std", "zeros", "no data")


def run(config: StatsConfig, folder: Path) -> None:
    """Look at every image once, print the figures, and write them as JSON.

    Raises:
        InputError: the dataset cannot be read, or too many of its images.
    """
    with phase(LOADING, unit=""):
        from moco.cli.closing_tables import print_plain
        from moco.data.band_statistics import figures_of
        from moco.data.sources.pixel_values import checked_selection
        from moco.data.sources.registry import build_source
        from moco.data.sources.sample import chosen_bands
        from moco.data.sources.source import reading_of
        from moco.evaluation.subject import table_of
        from moco.runs.atomic_files import write_json
        from moco.runs.failures import failures_without_training_named
        from moco.runs.interrupts import ending_at_once
        from moco.runs.run_folder import claimed
        from moco.screen import screen

    output = Path(config.output) if config.output else folder / "stats.json"
    check_output(output)
    if not config.high > config.low:
        raise InputError(f"high={config.high}: expected more than low={config.low}")
    selection = checked_selection(chosen_bands(vars(config.data)))
    data = dataclasses.asdict(config.data)
    for name in ("dicom_window", "value_range", "nodata", "max_bad_fraction", "num_workers"):
        del data[name]  # these are no settings of the source
    source = build_source(**data)
    source.read_as(reading_of(vars(config.data)))
    console = screen.console
    with failures_without_training_named("data.num_workers"), ending_at_once():
        statistics = measured(source, selection, config)
    figures = figures_of(statistics, selection, config.low, config.high, per_band=config.per_band)
    console.print(
        table_of(title_of(figures), COLUMNS, map(row_of, figures["bands"]), texts=("band",))
    )
    print_plain(console, "settings for these images:")
    for key, value in figures["settings"].items():
        print_plain(console, f"  {key}={value}".replace(", ", ","))
    with claimed(folder, dataclasses.asdict(config), hydra_files()):
        write_json(output, figures)
    print_plain(console, f"written to {os.path.relpath(output)}")


def measured(
    source: "DataSource", selection: tuple[int | str, ...] | None, config: StatsConfig
) -> "Statistics":
    """Return the counts of all images to train on."""
    from moco.data.band_statistics import Reading, Statistics
    from moco.data.files.images import check_bad_fraction
    from moco.data.loading.every_image import image_set

    images = image_set(source.train)
    statistics = Statistics()
    problems: dict[str, str] = {}
    reading = Reading(selection, config.data.nodata)
    num_workers = config.data.num_workers
    if config.num_workers is not None:
        num_workers = config.num_workers
    with phase("measuring", len(images)) as say:
        for number, read in enumerate(images.each(reading, num_workers), start=1):
            problem = read.problem
            if not problem:
                problem = statistics.add(read.value)
                if problem:
                    problem = f"{printable(read.name)}: {problem}"
            if problem:
                problems[read.name] = problem
                log.warning("left out an image: %s", problem)
                check_bad_fraction(problems, len(images), config.data.max_bad_fraction)
            say(number)
    if statistics.num_images == 0:
        raise InputError(f"data.root={config.data.root}: no image in there can be read")
    statistics.finish()
    return statistics


def title_of(figures: Mapping[str, Any]) -> str:
    """Return the title of the table."""
    return f"{figures['images']:,} images, {figures['pixels']:,} pixels of {figures['type']}"


def row_of(band: Mapping[str, Any]) -> list[str]:
    """Return the row of one band, in the order of `COLUMNS`."""
    low, median, high = band["percentiles"].values()
    numbers = (band["min"], low, median, high, band["max"], band["mean"], band["std"])
    shares = (band["share_of_zeros"], band["share_without_data"])
    row = [str(band["band"])]
    row += map(short, numbers)
    row += [f"{share:.2%}" for share in shares]
    return row


def short(number: float) -> str:
    """Return a number with four digits; large ones have no exponent."""
    return f"{number:.0f}" if 1000 <= abs(number) < 1e7 else f"{number:.4g}"


def main() -> None:
    """Entry point of ``moco-stats``."""
    launch(run, "stats")


if __name__ == "__main__":
    main()
