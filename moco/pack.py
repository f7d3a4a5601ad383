"""Write a copy of a dataset that trains faster.

``python -m moco.pack data=images data.root=PATH output=FOLDER data.resize=256``
"""

import dataclasses
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from moco.cli.launch import hydra_files, launch
from moco.config.pack import PackConfig
from moco.errors import InputError
from moco.phases import LOADING, phase

if TYPE_CHECKING:
    from moco.data.packing import Pool


def run(config: PackConfig, folder: Path) -> None:
    """Write the copy, or check it with `check`; `folder` keeps a record of the config.

    Raises:
        InputError: the source cannot be read, or the output folder holds something else.
        RunError: the disk is full, or images of the copy differ.
    """
    with phase(LOADING, unit=""):
        from moco.data.packing import LOCK, Pool, check_copy, prepare_folder
        from moco.data.sources.registry import build_source
        from moco.data.sources.source import reading_of
        from moco.runs.failures import failures_without_training_named
        from moco.runs.folder_lock import locked
        from moco.runs.interrupts import PARTS_KEPT, ending_at_once
        from moco.runs.run_folder import claimed

    output = Path(config.output)
    data = dataclasses.asdict(config.data)
    for name in ("value_range", "nodata"):
        if data.pop(name) is not None:
            raise InputError(f"data.{name}: a copy keeps the values; give it to those who read it")
    # These are settings of the copy, and not of the source.
    for name in ("dicom_window", "max_bad_fraction", "num_workers", "resize"):
        del data[name]
    source = build_source(**data)
    source.read_as(reading_of(vars(config.data)))
    pool = Pool(source)
    if config.check:
        with phase("checking the copy", len(pool)) as say:
            for num_done in check_copy(output, pool):
                say(num_done)
    else:
        prepare_folder(output)
        failures_named = failures_without_training_named("data.resize", PARTS_KEPT)
        lock = locked(output / LOCK, f"output={output}")
        with failures_named, lock, ending_at_once():
            pack(config, output, pool)
    with claimed(folder, dataclasses.asdict(config), hydra_files()):
        pass  # a record of the settings


def pack(config: PackConfig, output: Path, pool: "Pool") -> None:
    """Write the copy, or what is missing of it, and print what it holds.

    Raises:
        InputError: too many images are unreadable.
    """
    from moco.cli.closing_tables import print_plain, print_table
    from moco.data.packing import CopyWriter, chunk_loader, describe_copy, open_copy
    from moco.runs.interrupts import ENDING, held_back
    from moco.runs.run_folder import as_override
    from moco.screen import screen

    # What must stay the same while a copy is written.
    settings = dataclasses.asdict(config)
    for name in ("output", "num_workers", "check"):
        del settings[name]
    del settings["data"]["num_workers"]
    num_workers = config.data.num_workers
    if config.num_workers is not None:
        num_workers = config.num_workers
    if isinstance(config.data.root, str):  # the command may go on from another working directory
        settings["data"]["root"] = os.path.abspath(config.data.root)
    index = open_copy(output, settings, pool)
    if index["complete"]:
        return
    with closing(CopyWriter(output, index, pool, config.data.max_bad_fraction)) as writer:
        loader = chunk_loader(pool, index, writer.num_done, num_workers)
        with held_back(ENDING):  # a loader that is interrupted while it starts prints a traceback
            chunks = iter(loader)
        with phase("packing", len(pool), start=writer.num_done) as say:
            for chunk in chunks:
                writer.add(chunk)
                say(writer.num_done)
        writer.finish()
    print_table(screen.console, "Packed", describe_copy(index, pool))
    root = as_override("data.root", output)
    print_plain(screen.console, f"train with data=packed {root}")


def main() -> None:
    """Entry point of ``moco-pack``; ``--check`` is another way to say ``check=true``."""
    sys.argv = ["check=true" if argument == "--check" else argument for argument in sys.argv]
    launch(run, "pack")


if __name__ == "__main__":
    main()
