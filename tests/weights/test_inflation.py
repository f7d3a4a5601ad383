"""Weights of RGB networks for images of other bands."""

import pytest
import torch

from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.weights.inflation import fit_bands, inflated, widen_stem


@pytest.mark.parametrize("bands", [1, 4, 13])
def test_equal_bands_give_the_result_of_a_grey_image(bands):
    weight = torch.randn(6, 3, 5, 5)
    grey = torch.rand(2, 1, 9, 9)
    of_rgb = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    of_bands = torch.nn.functional.conv2d(grey.expand(-1, bands, -1, -1), inflated(weight, bands))
    torch.testing.assert_close(of_bands, of_rgb, atol=1e-4, rtol=1e-5)


def test_one_band_is_timms_rule():
    timm_manipulate = pytest.importorskip("timm.models._manipulate")
    weight = torch.randn(6, 3, 5, 5)
    torch.testing.assert_close(inflated(weight, 1), timm_manipulate.adapt_input_conv(1, weight))


@pytest.mark.parametrize("name", ["resnet_tiny", "swin_tiny_patch2", "vit_tiny_patch4"])
def test_a_backbone_of_other_bands_takes_the_weights_of_rgb(name, caplog):
    rgb = build_backbone(name).eval()
    other = build_backbone(name, in_channels=5).eval()
    with caplog.at_level("INFO"):
        other.load_state_dict(fit_bands(rgb.state_dict(), other))
    assert "from RGB to 5 bands" in caplog.text
    grey = torch.rand(2, 1, 32, 32)
    expected = rgb(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(other(grey.expand(-1, 5, -1, -1)), expected, atol=1e-5, rtol=1e-4)
    widen_stem(rgb, 5, "x")
    torch.testing.assert_close(rgb.state_dict(), other.state_dict())
    with pytest.raises(InputError, match=r"reads images of 5 bands, and these have 7"):
        widen_stem(rgb, 7, "checkpoint=x")
