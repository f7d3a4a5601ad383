"""The pyramid of feature maps, and its decoders with and without a head."""

import sys

import pytest
import torch

from moco.errors import InputError
from moco.extras import install_command
from moco.models.backbones import build_backbone
from moco.models.pyramid import (
    PyramidDecoder,
    check_pyramid,
    check_pyramid_library,
    pad_to_exact_doubles,
    pyramid_stride,
    resample_to_pyramid,
)


def test_maps_are_padded_to_exact_doubles_for_the_fpn():
    maps = [torch.randn(1, 1, side, side + 1) for side in (9, 5, 3, 2)]
    padded = pad_to_exact_doubles(maps)
    assert [tuple(x.shape[-2:]) for x in padded] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for x, y in zip(maps, padded, strict=True):
        height, width = x.shape[-2:]
        assert torch.equal(y[..., :height, :width], x)


def test_maps_of_one_stride_become_a_pyramid_of_the_same_places():
    num_rows, num_columns = 6, 8
    centres = torch.arange(num_rows) + 0.5  # the rows' centres, in cells
    rows = centres.view(1, 1, -1, 1).expand(1, 1, num_rows, num_columns)
    pyramid = resample_to_pyramid([rows] * 4)
    assert [tuple(x.shape[2:]) for x in pyramid] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    for x, cells in zip(pyramid, (1 / 4, 1 / 2, 1, 2), strict=True):
        centres = (torch.arange(x.shape[2]) + 0.5) * cells
        # The first and last half cell repeat the outermost one.
        inner = (centres > 0.5) & (centres < num_rows - 0.5)
        torch.testing.assert_close(x[0, 0, inner, 0], centres[inner])


def test_the_coarsest_map_of_a_pyramid_averages_the_cells_that_there_are():
    pyramid = resample_to_pyramid([torch.ones(1, 1, 5, 1)] * 4)
    assert [tuple(x.shape[2:]) for x in pyramid] == [(20, 4), (10, 2), (5, 1), (3, 1)]
    assert (pyramid[-1] == 1).all()


@pytest.mark.parametrize("backbone", ["resnet_tiny", "swin_v2_tiny_patch2", "vit_tiny_patch4"])
def test_a_decoder_without_a_head_gives_the_features_that_a_head_would_get(backbone):
    pytest.importorskip("segmentation_models_pytorch")
    net = build_backbone(backbone)
    with_head = PyramidDecoder("fpn", net, 3, channels=128).eval()
    decoder = PyramidDecoder("fpn", net, None, channels=128, dropout=0.0)
    weights = with_head.state_dict()
    for name in ("head.weight", "head.bias"):
        del weights[name]
    decoder.load_state_dict(weights)  # the same names
    maps = net.eval().feature_maps(torch.randn(2, 3, 37, 50))
    features = decoder(maps)
    assert features.shape == (2, decoder.width, *with_head(maps).shape[2:])
    assert decoder.stride == with_head.stride == pyramid_stride(net.feature_map_strides)
    torch.testing.assert_close(with_head.head(features), with_head(maps))


class Maps:
    def __init__(self, *strides):
        self.feature_map_strides = strides


def test_maps_that_form_no_pyramid_are_named():
    check_pyramid(Maps(4, 8, 16, 32), "fpn", "decoder=fpn")
    check_pyramid(Maps(16, 16, 16, 16), "fpn", "decoder=fpn")
    check_pyramid(Maps(2, 4), "upernet", "decoder=upernet")
    with pytest.raises(InputError, match=r"two or more feature maps .*, or four that are all the"):
        check_pyramid(Maps(2, 8), "upernet", "decoder=upernet")
    for strides in ((4, 8, 16), (8, 16, 16, 32), (2, 8, 32, 128)):
        with pytest.raises(InputError) as error:
            check_pyramid(Maps(*strides), "fpn", "decoder=fpn")
        assert str(error.value) == (
            "decoder=fpn: needs four feature maps whose strides double, or are all the same; Maps "
            f"has the strides {list(strides)}"
        )


def test_a_missing_library_is_named_with_its_setting(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError) as error:
        check_pyramid_library("method.decoder=fpn")
    assert str(error.value) == (
        "method.decoder=fpn: segmentation_models_pytorch is not installed: "
        f"{install_command('segment')}"
    )
