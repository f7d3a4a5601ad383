"""torch.compile makes one graph of an encoder, with the results that the encoder has without it."""

import pytest
import torch

# torch 2.11 warns of its own way to trace an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

SPLIT = ["method.batch_norm=split", "method.batch_norm_splits=2"]
ENCODERS = {
    "resnet": ["backbone=resnet_tiny", "method.batch_norm=plain"],
    "resnet, split BatchNorm": ["backbone=resnet_tiny", *SPLIT],
    "vit": ["backbone=vit_tiny_patch4"],
    "vit, learned positions": ["backbone=vit_tiny_patch4", "backbone.learned_positions=7"],
    "swin": ["backbone=swin_tiny_patch2"],
    "swin v2": ["backbone=swin_v2_tiny_patch2"],
    "swin, linear coordinates": ["backbone=swin_tiny_patch2", "backbone.position_bias=linear_cpb"],
    "swin v2, window of 6": ["backbone=swin_v2_tiny_patch2", "backbone.window_size=6"],
    "swin v2, BatchNorm in the head": [
        "backbone=swin_v2_tiny_patch2",
        "method.projector.hidden_batch_norm=true",
        *SPLIT,
    ],
}
IMAGES = (4, 3, 36, 36)  # maps of 18, 9, 5 and 3 cells: padded, shifted and clipped windows


@pytest.fixture(autouse=True)
def static_shapes():
    """As `Encoder.compile_training` compiles: one graph for each size."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield
    torch._dynamo.reset()


def encoders(name, runner):
    """The query and the key encoder in their batch-norm mode, in training."""
    method = runner.method(runner.config(*ENCODERS[name]))
    method.install_batch_norm("split" if ENCODERS[name][-2:] == SPLIT else "plain")
    return method.query_encoder, method.key_encoder


def parts_of(encoder):
    """What `Encoder.compile_training` compiles, each with an input."""
    images = torch.randn(IMAGES)
    if encoder.is_called_whole:
        return [(encoder, images)]
    return [
        (encoder.backbone, images),
        (encoder.projector, torch.randn(4, encoder.backbone.feature_dim)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet, split BatchNorm", "vit", "swin v2"])
def test_an_encoder_is_one_graph(name, runner):
    for part, inputs in parts_of(encoders(name, runner)[0]):
        explained = torch._dynamo.explain(part)(inputs)
        assert explained.graph_count == 1, explained.break_reasons


def results_of(function, part, inputs, trains, precision):
    """The output of a pass and, where the part is trained, its gradients."""
    part.zero_grad()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with autocast, torch.set_grad_enabled(trains):
        output = function(inputs).float()
    if not trains:
        return [output]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [
        output.detach(),
        *(parameter.grad for parameter in part.parameters() if parameter.requires_grad),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_compiled_encoder_has_equal_results_from_one_graph(name, precision, runner):
    """In bf16, where the order of operations shows, compiled results are as near to those of fp32 as the others are."""
    for encoder in encoders(name, runner):
        for part, inputs in parts_of(encoder):
            trains = any(parameter.requires_grad for parameter in part.parameters())
            torch._dynamo.reset()
            compiled = torch.compile(part, backend="aot_eager", fullgraph=True, dynamic=False)
            exact = results_of(part, part, inputs, trains, "fp32")
            plain = results_of(part, part, inputs, trains, precision)
            ours = results_of(compiled, part, inputs, trains, precision)
            for right, without, with_compiler in zip(exact, plain, ours, strict=True):
                allowed = 1e-4 * right.norm() + 1e-6
                if precision == "bf16":
                    allowed = 2 * (without - right).norm() + 0.01 * right.norm() + 1e-6
                assert (with_compiler - right).norm() <= allowed
