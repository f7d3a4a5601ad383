"""Images with masks at the size that a frozen backbone sees, their masks as they are.

Letters: M images, N batch, h w pixels of the scaled image, H W pixels of the mask.
"""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from moco.data.augment.views import Normalized
from moco.data.files.images import UnreadableImage
from moco.data.loading.lost_workers import LastRead, WatchedLoader
from moco.data.loading.workers import CPU, loader_options
from moco.segmentation.mask_batches import MaskBatch, batches_of_one_size
from moco.segmentation.mask_sources import MaskedImages

LONGEST = 8  # times image_size: a stripe of one pixel by a million would take gigabytes otherwise


def scaled_size(size: Sequence[int], image_size: int, stride: int) -> tuple[int, int]:
    """Height and width with a shorter side of about `image_size`, both multiples of `stride`, px.

    So the cells of every map cover the image to its edges, and none reaches beyond. The longer side has at most `LONGEST`
    times `image_size`.
    """
    factor = min(image_size / min(size), LONGEST * image_size / max(size))
    height, width = (stride * max(1, round(side * factor / stride)) for side in size)
    return height, width


class ScaledDataset(Dataset[MaskBatch]):
    """Images scaled to `scaled_size` and normalised, by index: images (3, h, w), classes (H, W).

    Args:
        num_workers: processes that will read from this object at the same time.
    """

    def __init__(
        self,
        images: MaskedImages,
        image_size: int,
        stride: int,
        normalize: Normalized,
        num_workers: int = 0,
    ) -> None:
        self.last_read = LastRead(num_workers)
        self.images = images
        self.image_size = image_size
        self.stride = stride
        self.normalize = normalize

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> MaskBatch:
        self.last_read.note(self.images.images.name(index))
        size = self.images.sizes[index].tolist()
        scaled = scaled_size(size, self.image_size, self.stride)
        try:
            raw, mask = self.images[index]
        except UnreadableImage:
            nothing = torch.zeros(3, *scaled), torch.zeros(size, dtype=torch.int64)
            return MaskBatch(*nothing, torch.tensor(index), torch.tensor(True))
        image = self.normalize(v2.functional.resize(raw, list(scaled)))
        return MaskBatch(
            image, torch.from_numpy(mask).long(), torch.tensor(index), torch.tensor(False)
        )


def scaled_loader(
    images: MaskedImages,
    rows: Sequence[int],
    image_size: int,
    stride: int,
    normalize: Normalized,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device = CPU,
) -> WatchedLoader:
    """Batches of the images `rows` for `device`, each of images of one size.

    Their order does not depend on `batch_size`.
    """
    places = batches_of_one_size(images.sizes[list(rows)], batch_size)
    batches = [[rows[place] for place in batch] for batch in places]
    options = loader_options(num_workers, device) | {"persistent_workers": False}
    dataset = ScaledDataset(images, image_size, stride, normalize, num_workers)
    return WatchedLoader(dataset, batch_sampler=batches, **options)
