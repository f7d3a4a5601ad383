"""How other projects name the tensors of their methods.

Each layout maps the names of a project to the names in `moco.methods.moco.MoCo`. The names are
facts of the projects' public code, read at these commits: facebookresearch/moco 3b42c2a and its
branch colab-notebook, facebookresearch/moco-v3 c349e6e, SwinTransformer/Transformer-SSL 4510de1,
WXinlong/DenseCL b64bbb6, open-mmlab/mmselfsup 20488d0 and db861f3, vturrisi/solo-learn 9187ea3,
lightly-ai/lightly 00283d7 and e8d317f.
"""

from typing import NamedTuple

QUERY = "query_encoder."
KEY = "key_encoder."
BACKBONE = "query_encoder.backbone."
PROJECTOR = "query_encoder.projector."
DENSE_PROJECTOR = "query_encoder.dense_projector."
DECODER = "query_encoder.decoder."
PREDICTOR = "predictor."
KEY_BACKBONE = "key_encoder.backbone."
KEY_PROJECTOR = "key_encoder.projector."
KEY_DENSE_PROJECTOR = "key_encoder.dense_projector."
KEY_DECODER = "key_encoder.decoder."
HEADS = (PROJECTOR, DENSE_PROJECTOR, PREDICTOR, KEY_PROJECTOR, KEY_DENSE_PROJECTOR)
QUEUES = ("queue.", "reverse_queue.", "dense_queue.", "reverse_dense_queue.")


class Part(NamedTuple):
    """A part of our method: what the log calls it, and the part that it is of no use without."""

    title: str
    needs: str = ""


# By the beginning of the names of their tensors. Each comes after the part that it needs.
METHOD_PARTS = {
    BACKBONE: Part("backbone"),
    PROJECTOR: Part("projector"),
    DECODER: Part("decoder"),
    DENSE_PROJECTOR: Part("dense projector"),
    PREDICTOR: Part("predictor", PROJECTOR),
    KEY_BACKBONE: Part("key encoder's backbone"),
    KEY_PROJECTOR: Part("key encoder's projector", PROJECTOR),
    KEY_DECODER: Part("key encoder's decoder", DECODER),
    KEY_DENSE_PROJECTOR: Part("key encoder's dense projector", DENSE_PROJECTOR),
    "queue.": Part("queue", KEY_PROJECTOR),
    "reverse_queue.": Part("reverse queue", KEY_PROJECTOR),
    "dense_queue.": Part("dense queue", KEY_DENSE_PROJECTOR),
    "reverse_dense_queue.": Part("reverse dense queue", KEY_DENSE_PROJECTOR),
}


class Layout(NamedTuple):
    """How a project names the parts of its method.

    Attributes:
        origin: the project, for the log.
        marks: patterns; a state dict is of this layout if each of them matches the beginning of
            some name.
        names: patterns for the beginning of a name, and what takes the place of that beginning.
            The first pattern that matches counts.
    """

    origin: str
    marks: tuple[str, ...]
    names: dict[str, str]


MOCO_V3 = "MoCo v3 (facebookresearch/moco-v3)"
SOLO_LEARN = "solo-learn"
BACKBONE_ALONE = "backbone alone"
OFFICIAL_QUEUE = {r"queue$": "queue.keys", r"queue_ptr$": "queue.pointer"}
WHOLE_NAME = {"": BACKBONE}
# Of any network of timm that the user names: its own names.
TIMM = Layout("timm", (), WHOLE_NAME)
# The first layout that fits counts, so the more specific ones come first.
LAYOUTS = (
    # Part 0 of an encoder is the backbone, part 1 the neck. mmselfsup calls the query encoder's
    # parts by these words, and wraps the momentum encoder in a `module` that averages.
    Layout(
        "DenseCL or mmselfsup (OpenMMLab)",
        (r"(encoder_q|base_encoder)\.0\.[a-z]|neck\.",),
        {
            r"(encoder_q|base_encoder)\.0\.": BACKBONE,
            r"(encoder_q|base_encoder)\.1\.mlp2\.": DENSE_PROJECTOR,
            r"(encoder_q|base_encoder)\.1\.": PROJECTOR,
            r"(encoder_k|momentum_encoder)\.(module\.)?0\.": KEY_BACKBONE,
            r"(encoder_k|momentum_encoder)\.(module\.)?1\.mlp2\.": KEY_DENSE_PROJECTOR,
            r"(encoder_k|momentum_encoder)\.(module\.)?1\.": KEY_PROJECTOR,
            r"backbone\.": BACKBONE,
            r"neck\.mlp2\.": DENSE_PROJECTOR,
            r"neck\.": PROJECTOR,
            r"head\.predictor\.": PREDICTOR,
            **OFFICIAL_QUEUE,
            r"queue2$": "dense_queue.keys",
            r"queue2_ptr$": "dense_queue.pointer",
        },
    ),
    Layout(
        "the CIFAR-10 notebook of MoCo (facebookresearch/moco, branch colab-notebook)",
        (r"encoder_q\.net\.0\.",),
        {
            # An nn.Sequential of torchvision's children, without max-pool. Number 8 is Flatten.
            r"encoder_q\.net\.9\.": PROJECTOR,
            r"encoder_q\.net\.": BACKBONE,
            r"encoder_k\.net\.9\.": KEY_PROJECTOR,
            r"encoder_k\.net\.": KEY_BACKBONE,
            **OFFICIAL_QUEUE,
        },
    ),
    # The projector is the last layer of torchvision's ResNet.
    Layout(
        "MoCo v1 or v2 (facebookresearch/moco)",
        (r"encoder_q\.",),
        {
            r"encoder_q\.(fc|head)\.": PROJECTOR,
            r"encoder_q\.": BACKBONE,
            r"encoder_k\.(fc|head)\.": KEY_PROJECTOR,
            r"encoder_k\.": KEY_BACKBONE,
            **OFFICIAL_QUEUE,
        },
    ),
    # There is no queue. The projector is `fc` of a ResNet or `head` of a ViT.
    Layout(
        MOCO_V3,
        (r"base_encoder\.",),
        {
            r"base_encoder\.(fc|head)\.": PROJECTOR,
            r"base_encoder\.": BACKBONE,
            r"momentum_encoder\.(fc|head)\.": KEY_PROJECTOR,
            r"momentum_encoder\.": KEY_BACKBONE,
            r"predictor\.": PREDICTOR,
        },
    ),
    Layout(
        "MoBY (SwinTransformer/Transformer-SSL)",
        (r"encoder\.", r"encoder_k\.|projector\.linear_"),
        {
            r"encoder\.": BACKBONE,
            r"projector\.": PROJECTOR,
            r"predictor\.": PREDICTOR,
            r"encoder_k\.": KEY_BACKBONE,
            r"projector_k\.": KEY_PROJECTOR,
            # Its first query is compared with queue2, which holds the second view's keys.
            r"queue2$": "queue.keys",
            r"queue1$": "reverse_queue.keys",
            r"queue_ptr$": "queue.pointer",
        },
    ),
    # lightly's older benchmarks: `backbone` is the key encoder's.
    Layout(
        "lightly, with a query_backbone",
        (r"query_backbone\.",),
        {
            r"query_backbone\.": BACKBONE,
            r"query_projection_head\.": PROJECTOR,
            r"backbone\.": KEY_BACKBONE,
            r"projection_head\.": KEY_PROJECTOR,
        },
    ),
    # The loss holds the queue, as a memory bank. Some versions save it.
    Layout(
        "lightly",
        (r"backbone\.", r"projection_head"),
        {
            r"backbone\.": BACKBONE,
            r"projection_head_local\.": DENSE_PROJECTOR,
            r"projection_head(_global)?\.": PROJECTOR,
            r"(backbone_momentum|momentum_backbone|key_backbone)\.": KEY_BACKBONE,
            r"projection_head_local_momentum\.": KEY_DENSE_PROJECTOR,
            r"projection_head(_global)?_momentum\.": KEY_PROJECTOR,
            r"(momentum|key)_projection_head\.": KEY_PROJECTOR,
            r"criterion_local\.(memory_bank\.)?bank$": "dense_queue.keys",
            r"criterion_local\.(memory_bank\.)?bank_ptr$": "dense_queue.pointer",
            r"criterion\w*\.(memory_bank\.)?bank$": "queue.keys",
            r"criterion\w*\.(memory_bank\.)?bank_ptr$": "queue.pointer",
        },
    ),
    # Older versions of solo-learn call the backbone `encoder`.
    Layout(
        SOLO_LEARN,
        (r"(backbone|encoder)\.", r"momentum_(backbone|encoder|projector)\.|projector\."),
        {
            r"(backbone|encoder)\.": BACKBONE,
            r"projector\.": PROJECTOR,
            r"predictor\.": PREDICTOR,
            r"momentum_(backbone|encoder)\.": KEY_BACKBONE,
            r"momentum_projector\.": KEY_PROJECTOR,
            **OFFICIAL_QUEUE,
        },
    ),
    # What follows holds no method: a backbone, perhaps with a classifier.
    Layout(BACKBONE_ALONE, (r"backbone\.",), {r"backbone\.": BACKBONE}),
    Layout("torchvision or timm ResNet", (r"layer1\.0\.conv1\.",), WHOLE_NAME),
    Layout("torchvision Swin Transformer", (r"features\.1\.0\.attn\.",), WHOLE_NAME),
    Layout("timm or Microsoft Swin Transformer", (r"layers\.0\.blocks\.0\.attn\.",), WHOLE_NAME),
    Layout("torchvision ViT", (r"encoder\.layers\.encoder_layer_0\.",), WHOLE_NAME),
    Layout("timm ViT", (r"cls_token$", r"blocks\.0\.attn\."), WHOLE_NAME),
)
