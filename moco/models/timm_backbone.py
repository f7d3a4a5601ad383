"""Any network of timm as a backbone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moco.errors import InputError
from moco.models.contract import Backbone
from moco.targets import did_you_mean

# Keyword arguments by which timm's networks with learned positions or windows take images of any
# size. A network is built with the first of these that it knows.
ANY_IMAGE_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)
# With these, timm reads files or downloads weights, which a checkpoint must not make it do.
READS_FILES = (
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)


class TimmBackbone(Backbone, nn.Module):
    """A network of timm under the backbone contract, see `moco.models.backbones`.

    The feature is what timm's network gives without its classifier. The feature maps are the last
    one of each of the last four strides. A network of one stride gives four maps at equal
    distances.

    Args:
        model: timm's name, such as ``convnext_tiny``.
        pretrained: start from timm's weights, which timm downloads.
        in_channels: channels of the images.
        image_size: side of the images, px, for networks that need it; None: timm's default.
        options: other keyword arguments of ``timm.create_model``, such as ``drop_path_rate``.

    Raises:
        InputError: timm is missing, or has no such network or option.
    """

    def __init__(
        self,
        *,
        model: str,
        pretrained: bool = False,
        in_channels: int = 3,
        image_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        given = dict(options or {})
        for option in READS_FILES:
            if option in given:
                raise InputError(
                    f"backbone.options.{option}: timm would read a file; for weights of a file "
                    "give init_from=PATH, for timm's own give backbone.pretrained=true"
                )
        if in_channels != 3:
            given["in_chans"] = in_channels
        self.model = model
        self.arguments = accepted_arguments(model, given, image_size)
        """Of ``timm.create_model``, beside the model and its weights."""
        self.net: Any = timm_network(model, 0, pretrained=pretrained, **self.arguments)
        self.feature_dim = int(self.net.head_hidden_size)
        self.map_indices, self.feature_map_dims, self.feature_map_strides = chosen_maps(
            self.net.feature_info
        )

    def classifier_names(self) -> list[str]:
        """Return the names of the tensors that timm's network has with a classifier alone."""
        with torch.device("meta"):
            with_classifier = timm_network(self.model, 1, **self.arguments)
        own = self.net.state_dict().keys()
        return sorted(with_classifier.state_dict().keys() - own)

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature (N, D) of images (N, B, H, W)."""
        return self.net.forward_head(self.net.forward_features(images), pre_logits=True)

    def feature_and_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return both from one pass."""
        features, maps = self.net.forward_intermediates(images, indices=self.map_indices)
        return self.net.forward_head(features, pre_logits=True), maps


def check_model(model: str) -> None:
    """Raise InputError if timm is missing or has no such network."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InputError("backbone=timm needs timm: pip install timm") from error
    name = model.partition(".")[0]  # what follows the dot are weights
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise InputError(f"backbone.model={model}: timm has no such network{hint}")


def timm_network(model: str, num_classes: int, **arguments: Any) -> Any:
    """Return timm's network; it has no classifier if there are no classes."""
    import timm

    create: Any = timm.create_model
    return create(model, num_classes=num_classes, **arguments)


def accepted_arguments(
    model: str, given: Mapping[str, Any], image_size: int | None
) -> dict[str, Any]:
    """Return the given arguments, and those by which the network takes images of any size.

    Raises:
        InputError: the network has no such option.
    """
    sizes: list[dict[str, Any]] = [{}]
    if image_size:
        sizes.insert(0, {"img_size": image_size})
    refused = ""
    for size in sizes:
        for any_size in ANY_IMAGE_SIZE:
            arguments = {**size, **any_size, **given}
            try:
                with torch.device("meta"):  # takes no memory and nearly no time
                    timm_network(model, 0, **arguments)
            except TypeError as error:
                refused = str(error)
            else:
                return arguments
    raise InputError(f"backbone.options: timm's {model} refuses them ({refused})")


def chosen_maps(
    feature_info: list[dict[str, Any]],
) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """Return which of timm's feature maps are used: their numbers, channels and strides.

    Args:
        feature_info: timm's description of all maps, from the first layers to the last ones.
    """
    last_of_stride = {}
    for number, info in enumerate(feature_info):
        last_of_stride[info["reduction"]] = number
    indices = list(last_of_stride.values())[-4:]
    if len(indices) == 1:
        count = len(feature_info)
        ends = {count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)}
        indices = sorted(ends - {-1})  # a quarter of fewer than four maps may be none
    dims = []
    strides = []
    for number in indices:
        dims.append(feature_info[number]["num_chs"])
        strides.append(feature_info[number]["reduction"])
    return indices, tuple(dims), tuple(strides)
