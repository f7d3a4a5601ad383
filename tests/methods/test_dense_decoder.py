"""The dense term on an FPN."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.heads import pooled_to_grid
from tests.conftest import thinned

pytest.importorskip("segmentation_models_pytorch")

SETTINGS = {
    "queue_size": 16,
    "embedding_dim": 8,
    "dense_weight": 0.5,
    "dense_grid": 3,
    "decoder": "fpn",
    "decoder_channels": 128,
}


def method_of(backbone="resnet_tiny", **settings):
    torch.manual_seed(0)
    return MoCo(backbone, **SETTINGS | settings)


def plain_fpn(decoder, maps):
    """The FPN of arXiv 1901.02446 for four maps whose sides are exact doubles, layer by layer."""
    layers = decoder.decoder
    finer = [norm(x) for norm, x in zip(decoder.norms, maps, strict=False)]
    top = layers.p5(maps[3])
    pyramid = [top]
    for block, x in zip((layers.p4, layers.p3, layers.p2), finer[::-1], strict=True):
        top = top.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) + block.skip_conv(x)
        pyramid.append(top)
    total = 0
    for x, blocks in zip(pyramid, layers.seg_blocks, strict=True):
        for block in blocks.block:
            convolution, norm, _ = block.block
            x = F.group_norm(convolution(x), 32, norm.weight, norm.bias).relu()
            if block.upsample:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        total = total + x
    return total


@pytest.mark.parametrize("backbone", ["resnet_tiny", "swin_v2_tiny_patch2"])
def test_the_cells_are_those_of_the_fpn(backbone):
    encoder = method_of(backbone).query_encoder.eval()
    images = torch.randn(2, 3, 64, 64)
    maps = encoder.backbone.feature_maps(images)
    pooled = pooled_to_grid(plain_fpn(encoder.decoder, maps), 3)
    expected = encoder.dense_projector.layers(pooled).flatten(2).transpose(1, 2)
    (encoded,) = encoder.embed([images])
    torch.testing.assert_close(encoded.embedding, encoder(images))
    torch.testing.assert_close(encoded.cells.embeddings, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        encoded.cells.features, pooled.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "backbone", thinned(["resnet_tiny", "swin_tiny_patch2", "vit_tiny_patch4"], every=3)
)
def test_both_encoders_have_the_decoder_and_the_queries_train_it(backbone):
    method = method_of(backbone, symmetric=True).train()
    views = tuple(torch.randn(2, 4, 3, 36, 36))
    method.training_step(SimpleNamespace(views=views), 0)["loss"].backward()
    pairs = zip(
        method.query_encoder.decoder.named_parameters(),
        method.key_encoder.decoder.parameters(),
        strict=True,
    )
    for (name, query), key in pairs:
        assert query.grad is not None, name
        assert query.grad.abs().max() > 0, name
        assert torch.equal(query, key)
        assert key.grad is None
        assert not key.requires_grad


def test_the_decoder_keeps_all_channels_in_training():
    encoder = method_of().query_encoder.train()
    images = torch.randn(4, 3, 32, 32)
    first, second = (encoder.embed([images])[0].cells.features for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_the_momentum_update_reaches_the_decoder(runner):
    settings = ["method.dense_weight=0.5", "method.decoder=fpn", "method.decoder_channels=128"]
    method = runner.fit(runner.config(*settings, "trainer.max_steps=1"))
    weights = [
        encoder.decoder.decoder.p5.weight for encoder in (method.query_encoder, method.key_encoder)
    ]
    start = runner.method(runner.config(*settings)).query_encoder.decoder.decoder.p5.weight
    moved, followed = ((weight - start).abs().max() for weight in weights)
    assert 0 < followed < moved


class NoMaps(torch.nn.Module):
    feature_dim = 4

    def forward(self, images):
        return images.mean(dim=(2, 3))[:, :1].expand(-1, 4) + 0


class TwoMaps(NoMaps):
    feature_map_dims = (4, 4)
    feature_map_strides = (4, 8)

    def feature_maps(self, images):
        return [F.avg_pool2d(images[:, :1].expand(-1, 4, -1, -1), side) for side in (4, 8)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"dense_weight": 0.0},
            "method.decoder=fpn: the decoder is trained by the dense term; add "
            "method.dense_weight=0.5",
        ),
        (
            {"decoder": "unet"},
            "method.decoder: unknown decoder 'unet' (choices: fpn)",
        ),
        (
            {"decoder_channels": 100},
            "method.decoder_channels=100: the FPN needs a multiple of 64, at least 128",
        ),
        (
            {"decoder": None},
            "method.decoder_channels=128: without method.decoder=fpn it has no effect",
        ),
        (
            {"backbone": NoMaps()},
            "method.decoder=fpn needs feature maps, and NoMaps has none: it lacks feature_maps, "
            "feature_map_dims or feature_map_strides",
        ),
        (
            {"backbone": TwoMaps()},
            "method.decoder=fpn: needs four feature maps whose strides double, or are all the "
            "same; TwoMaps has the strides [4, 8]",
        ),
    ],
)
def test_what_cannot_have_a_decoder_is_named(settings, expected):
    with pytest.raises(InputError) as error:
        method_of(**settings)
    assert str(error.value) == expected


# torch 2.11 warns of its own way to trace an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_backbone_and_decoder_are_one_graph():
    encoder = method_of().query_encoder
    torch._dynamo.reset()
    explained = torch._dynamo.explain(encoder.feature_and_map)(torch.randn(2, 3, 36, 36))
    torch._dynamo.reset()
    assert explained.graph_count == 1, explained.break_reasons
