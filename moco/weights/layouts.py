"""How other projects name the parts of their methods, and what those are called in `moco.methods.moco.MoCo`.

The names are facts of the projects' public code, at facebookresearch/moco 3b42c2a (and its branch
colab-notebook), facebookresearch/moco-v3 c349e6e,
SwinTransformer/Transformer-SSL 4510de1, WXinlong/DenseCL b64bbb6, open-mmlab/mmselfsup 20488d0 and db861f3,
vturrisi/solo-learn 9187ea3, lightly-ai/lightly 00283d7 and e8d317f.
"""

from typing import NamedTuple

QUERY, KEY = "query_encoder.", "key_encoder."
QUEUES = ("queue.", "reverse_queue.", "dense_queue.", "reverse_dense_queue.")
# The parts of a method, by the beginning of their tensors' names, and what to call them.
METHOD_PARTS = {
    QUERY + "backbone.": "backbone",
    QUERY + "projector.": "projector",
    QUERY + "dense_projector.": "dense projector",
    "predictor.": "predictor",
    KEY + "backbone.": "key encoder's backbone",
    KEY + "projector.": "key encoder's projector",
    KEY + "dense_projector.": "key encoder's dense projector",
    **{queue: queue.removesuffix(".").replace("_", " ") for queue in QUEUES},
}


class Layout(NamedTuple):
    """How a project names the parts of its method."""

    origin: str
    marks: tuple[str, ...]
    """Patterns: for each there is a name that begins so."""
    names: dict[str, str]
    """Patterns for the beginning of a name, and what takes its place; the first that matches counts."""


MOCO_V3 = "MoCo v3 (facebookresearch/moco-v3)"
SOLO_LEARN = "solo-learn"
BACKBONE_ALONE = "backbone alone"
LAYOUTS = (
    Layout(
        "DenseCL or mmselfsup (OpenMMLab)",
        (r"(encoder_q|base_encoder)\.0\.[a-z]|neck\.",),
        {
            r"(?:encoder_q|base_encoder)\.0\.": QUERY + "backbone.",
            r"(?:encoder_q|base_encoder)\.1\.mlp2\.": QUERY + "dense_projector.",
            r"(?:encoder_q|base_encoder)\.1\.": QUERY + "projector.",
            r"(?:encoder_k|momentum_encoder)\.(?:module\.)?0\.": KEY + "backbone.",
            r"(?:encoder_k|momentum_encoder)\.(?:module\.)?1\.mlp2\.": KEY + "dense_projector.",
            r"(?:encoder_k|momentum_encoder)\.(?:module\.)?1\.": KEY + "projector.",
            r"backbone\.": QUERY + "backbone.",
            r"neck\.mlp2\.": QUERY + "dense_projector.",
            r"neck\.": QUERY + "projector.",
            r"head\.predictor\.": "predictor.",
            r"queue$": "queue.keys",
            r"queue_ptr$": "queue.pointer",
            r"queue2$": "dense_queue.keys",
            r"queue2_ptr$": "dense_queue.pointer",
        },
    ),
    Layout(
        "the CIFAR-10 notebook of MoCo (facebookresearch/moco, branch colab-notebook)",
        (r"encoder_q\.net\.0\.",),
        {
            # An nn.Sequential of torchvision's children without max-pool, and Flatten before the last.
            r"encoder_q\.net\.9\.": QUERY + "projector.",
            r"encoder_q\.net\.": QUERY + "backbone.",
            r"encoder_k\.net\.9\.": KEY + "projector.",
            r"encoder_k\.net\.": KEY + "backbone.",
            r"queue$": "queue.keys",
            r"queue_ptr$": "queue.pointer",
        },
    ),
    Layout(
        "MoCo v1 or v2 (facebookresearch/moco)",
        (r"encoder_q\.",),
        {
            r"encoder_q\.(?:fc|head)\.": QUERY + "projector.",
            r"encoder_q\.": QUERY + "backbone.",
            r"encoder_k\.(?:fc|head)\.": KEY + "projector.",
            r"encoder_k\.": KEY + "backbone.",
            r"queue$": "queue.keys",
            r"queue_ptr$": "queue.pointer",
        },
    ),
    Layout(
        MOCO_V3,
        (r"base_encoder\.",),
        {
            r"base_encoder\.(?:fc|head)\.": QUERY + "projector.",
            r"base_encoder\.": QUERY + "backbone.",
            r"momentum_encoder\.(?:fc|head)\.": KEY + "projector.",
            r"momentum_encoder\.": KEY + "backbone.",
            r"predictor\.": "predictor.",
        },
    ),
    Layout(
        "MoBY (SwinTransformer/Transformer-SSL)",
        (r"encoder\.", r"encoder_k\.|projector\.linear_"),
        {
            r"encoder\.": QUERY + "backbone.",
            r"projector\.": QUERY + "projector.",
            r"predictor\.": "predictor.",
            r"encoder_k\.": KEY + "backbone.",
            r"projector_k\.": KEY + "projector.",
            # Its first query meets queue2, which holds the second view's keys.
            r"queue2$": "queue.keys",
            r"queue1$": "reverse_queue.keys",
            r"queue_ptr$": "queue.pointer",
        },
    ),
    Layout(
        "lightly, with a query_backbone",
        (r"query_backbone\.",),
        {
            r"query_backbone\.": QUERY + "backbone.",
            r"query_projection_head\.": QUERY + "projector.",
            r"backbone\.": KEY + "backbone.",
            r"projection_head\.": KEY + "projector.",
        },
    ),
    Layout(
        "lightly",
        (r"backbone\.", r"projection_head"),
        {
            r"backbone\.": QUERY + "backbone.",
            r"projection_head_local\.": QUERY + "dense_projector.",
            r"projection_head(?:_global)?\.": QUERY + "projector.",
            r"(?:backbone_momentum|momentum_backbone|key_backbone)\.": KEY + "backbone.",
            r"projection_head_local_momentum\.": KEY + "dense_projector.",
            r"(?:projection_head(?:_global)?_momentum|momentum_projection_head|key_projection_head)\.": KEY
            + "projector.",
            r"criterion_local\.(?:memory_bank\.)?bank$": "dense_queue.keys",
            r"criterion_local\.(?:memory_bank\.)?bank_ptr$": "dense_queue.pointer",
            r"criterion\w*\.(?:memory_bank\.)?bank$": "queue.keys",
            r"criterion\w*\.(?:memory_bank\.)?bank_ptr$": "queue.pointer",
        },
    ),
    Layout(
        SOLO_LEARN,
        (r"(backbone|encoder)\.", r"momentum_(backbone|encoder|projector)\.|projector\."),
        {
            r"(?:backbone|encoder)\.": QUERY + "backbone.",
            r"projector\.": QUERY + "projector.",
            r"predictor\.": "predictor.",
            r"momentum_(?:backbone|encoder)\.": KEY + "backbone.",
            r"momentum_projector\.": KEY + "projector.",
            r"queue$": "queue.keys",
            r"queue_ptr$": "queue.pointer",
        },
    ),
    Layout(BACKBONE_ALONE, (r"backbone\.",), {r"backbone\.": QUERY + "backbone."}),
    Layout("torchvision or timm ResNet", (r"layer1\.0\.conv1\.",), {"": QUERY + "backbone."}),
    Layout("torchvision Swin Transformer", (r"features\.1\.0\.attn\.",), {"": QUERY + "backbone."}),
    Layout(
        "timm or Microsoft Swin Transformer",
        (r"layers\.0\.blocks\.0\.attn\.",),
        {"": QUERY + "backbone."},
    ),
    Layout("torchvision ViT", (r"encoder\.layers\.encoder_layer_0\.",), {"": QUERY + "backbone."}),
    Layout("timm ViT", (r"cls_token$", r"blocks\.0\.attn\."), {"": QUERY + "backbone."}),
)
