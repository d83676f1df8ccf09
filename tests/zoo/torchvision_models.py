"""Every model of torchvision that is not quantized already, on small inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torchvision
from cases import Case, image
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams

from gdnsq_fx.inputs import ExampleInput

Settings = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How the models of one module of torchvision are built and called.

    Attributes:
        example: inputs for a batch of so many samples.
        settings: arguments of the public builder.
        inner: arguments of the private builder that the public one calls, for sizes
            that the public one fixes.
        note: what is peculiar.
    """

    example: Callable[[int], ExampleInput]
    settings: Mapping[str, Any] = field(default_factory=Settings)
    inner: Mapping[str, Any] = field(default_factory=Settings)
    note: str = ""


def _video(frames: int, size: int) -> Callable[[int], ExampleInput]:
    return lambda batch: torch.randn(batch, 3, frames, size, size)


def _image_pair(size: int) -> Callable[[int], ExampleInput]:
    return lambda batch: tuple(torch.rand(batch, 3, size, size) for _ in range(2))


def _detection(size: int, **extra: Tensor) -> Callable[[int], ExampleInput]:
    """A list of images and one of targets, which evaluation leaves unread.

    Args:
        size: side of the images.
        extra: further entries of each target, for its three objects.
    """
    shares = [[0.1, 0.1, 0.25, 0.25], [0.3, 0.3, 0.7, 0.7], [0.05, 0.05, 0.95, 0.95]]
    labels = torch.tensor([1, 2, 1])
    target = {"boxes": torch.tensor(shares) * size, "labels": labels, **extra}

    def example(batch: int) -> ExampleInput:
        images = [torch.rand(3, size, size) for _ in range(batch)]
        copies = [{k: v.clone() for k, v in target.items()} for _ in range(batch)]
        return images, copies

    return example


def _masks(size: int) -> Tensor:
    masks = torch.zeros(3, size, size, dtype=torch.uint8)
    masks[0, 6:16, 6:16] = masks[1, 20:44, 20:44] = masks[2, 4:60, 4:60] = 1
    return masks


_SIDE = 64
_KEYPOINTS = torch.tensor([20.0, 20.0, 1.0]).repeat(3, 17, 1)
_FEW: Settings = {"num_classes": 3, "weights_backbone": None}
_SCALE: Settings = {**_FEW, "min_size": _SIDE, "max_size": _SIDE}
# Without training every score is low, and all of them are alike: keep a few boxes.
_ONE_STAGE: Settings = {"score_thresh": 0.0, "detections_per_img": 10}
_TWO_STAGES: Settings = {
    **_SCALE,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
    "box_batch_size_per_image": 32,
    "rpn_pre_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 20,
}
_NO_BACKBONE: Settings = {"weights_backbone": None}

BY_MODULE: dict[str, Recipe] = {
    "googlenet": Recipe(image(64), {"init_weights": False}),
    "inception": Recipe(
        image(299),
        {"init_weights": False},
        note="the auxiliary head needs 17 x 17 features: images of 299",
    ),
    "maxvit": Recipe(image(224), note="windows of 7 need images of 224"),
    "vgg": Recipe(image(32)),
    "vision_transformer": Recipe(image(32), {"image_size": 32}),
    "detection.faster_rcnn": Recipe(_detection(_SIDE), _TWO_STAGES),
    "detection.fcos": Recipe(_detection(_SIDE), {**_SCALE, **_ONE_STAGE}),
    "detection.keypoint_rcnn": Recipe(
        _detection(_SIDE, keypoints=_KEYPOINTS), _TWO_STAGES
    ),
    "detection.mask_rcnn": Recipe(_detection(_SIDE, masks=_masks(_SIDE)), _TWO_STAGES),
    "detection.retinanet": Recipe(_detection(_SIDE), {**_SCALE, **_ONE_STAGE}),
    "detection.ssd": Recipe(
        _detection(_SIDE), {**_FEW, **_ONE_STAGE}, note="resizes to 300"
    ),
    "detection.ssdlite": Recipe(
        _detection(_SIDE), {**_FEW, **_ONE_STAGE}, note="resizes to 320"
    ),
    "optical_flow.raft": Recipe(_image_pair(128), note="needs frames of 128"),
    "segmentation.deeplabv3": Recipe(image(64), _NO_BACKBONE),
    "segmentation.fcn": Recipe(image(64), _NO_BACKBONE),
    "segmentation.lraspp": Recipe(image(64), _NO_BACKBONE),
    "video.mvit": Recipe(
        _video(4, 64), inner={"spatial_size": (64, 64), "temporal_size": 4}
    ),
    "video.resnet": Recipe(_video(4, 32)),
    "video.s3d": Recipe(_video(16, 224), note="pools 2 x 7 x 7: clips of 224"),
    "video.swin_transformer": Recipe(_video(4, 64)),
}
_FOUR_LAYERS = {"num_layers": 4}
_FEW_BLOCKS = BlockParams.from_init_params(
    depth=6, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25
)
# Giants that differ from their siblings in size alone, so they may lose depth.
BY_NAME: dict[str, Recipe] = {
    "regnet_y_128gf": Recipe(
        image(64), inner={"block_params": _FEW_BLOCKS}, note="6 of 27 blocks"
    ),
    "vit_h_14": Recipe(
        image(28), {"image_size": 28}, _FOUR_LAYERS, note="4 of 32 layers"
    ),
    "vit_l_16": Recipe(
        image(32), {"image_size": 32}, _FOUR_LAYERS, note="4 of 24 layers"
    ),
    "vit_l_32": Recipe(
        image(64), {"image_size": 64}, _FOUR_LAYERS, note="4 of 24 layers"
    ),
}
_INNER_BUILDERS = {
    "regnet": "_regnet",
    "video.mvit": "_mvit",
    "vision_transformer": "_vision_transformer",
}


def cases() -> list[Case]:
    """One case for each model of `torchvision.models.list_models`."""
    names = torchvision.models.list_models(exclude="quantized_*")
    return [_case(name) for name in names]


def _case(name: str) -> Case:
    module = torchvision.models.get_model_builder(name).__module__
    family = module.removeprefix("torchvision.models.")
    recipe = BY_NAME.get(name) or BY_MODULE.get(family, Recipe(image(64)))

    def build() -> nn.Module:
        with _inner_arguments(family, recipe.inner):
            return torchvision.models.get_model(name, weights=None, **recipe.settings)

    return Case(
        name=f"torchvision/{name}",
        family=family,
        library="torchvision",
        build=build,
        example=recipe.example,
        note=recipe.note,
    )


@contextmanager
def _inner_arguments(family: str, changes: Mapping[str, Any]) -> Generator[None]:
    """The private builder of a module takes other arguments for the time being."""
    if not changes:
        yield
        return
    module = import_module(f"torchvision.models.{family}")
    original = getattr(module, _INNER_BUILDERS[family])
    signature = inspect.signature(original)

    def changed(*args: Any, **kwargs: Any) -> nn.Module:
        bound = signature.bind(*args, **kwargs)
        for name, value in changes.items():
            named = name in signature.parameters
            (bound.arguments if named else bound.arguments["kwargs"])[name] = value
        return original(*bound.args, **bound.kwargs)

    with mock.patch.object(module, _INNER_BUILDERS[family], changed):
        yield
