"""TensorBoard events straight in the run folder."""

from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger


class RunLogger(TensorBoardLogger):
    """Lightning's logger without its sub-folders and its empty ``hparams.yaml``: ``.hydra/config.yaml`` has them all."""

    def __init__(self, folder: Path) -> None:
        super().__init__(save_dir=str(folder), name="", version="", default_hp_metric=False)

    def save(self) -> None:
        self.experiment.flush()
