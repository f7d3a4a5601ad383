"""Pictures of images beside their masks and predictions."""

import torch

from moco.evaluation.reports.segmentation_plots import classes_in


def test_the_classes_with_most_pixels_are_named():
    names = [f"name {number}" for number in range(20)]
    numbers = torch.arange(20).repeat_interleave(torch.arange(20, 0, -1))
    found = classes_in(torch.cat([numbers, torch.full((30,), 255)]), names)
    assert [name for name, _ in found] == [*names[:11], "no class"]
    assert found[-1][1] == [128, 128, 128]
    assert classes_in(torch.tensor([[7, 7]]), names) == [("name 7", found[7][1])]
