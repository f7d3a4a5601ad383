"""TensorBoard events straight in the run folder."""

from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger


class RunLogger(TensorBoardLogger):
    """Lightning's logger without its sub-folders and its empty ``hparams.yaml``: ``.hydra/config.yaml`` has them all.

    Args:
        folder: the run folder.
        purge_step: TensorBoard forgets what an earlier process wrote for this step and later ones, which come again.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        super().__init__(save_dir=str(folder), name="", version="", default_hp_metric=False, purge_step=purge_step)

    def save(self) -> None:
        self.experiment.flush()
