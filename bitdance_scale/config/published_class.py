"""The sizes of a published class-conditional network: from the shapes of its tensors, and as JSON beside them.

The release has no configuration beside its files. What shapes do not show is as in the release: attention heads of 64
channels in backbone and head, a square grid, four draws of time and noise per block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bitdance_scale.config.coerce import Coercion
from bitdance_scale.config.load import load_network
from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.schema import ClassesSection, HeadSection, ModelSection, NetworkConfig, VisionSection
from bitdance_scale.config.shipped import shipped_configs
from bitdance_scale.errors import CheckpointError
from bitdance_scale.wording import first_few

CLASS_HEAD_DIM = 64
"""Channels of an attention head, in the backbone and in the diffusion head."""
CLASS_MLP_RATIO = 1.5
WEIGHTS_NAME, PICKLE_NAME, SIZES_NAME = "model.safetensors", "model.pt", "model_config.json"
"""Files of an export: weights, the same as the release has them, sizes."""
_DRAWS = 4
_FAMILY = "class_conditional"
_RECIPES = "imagenet_"
# What the released files do not say and other programs could not know.
_BEYOND_RELEASE = (("model", "head_dim", CLASS_HEAD_DIM), ("head", "head_dim", CLASS_HEAD_DIM))

Shapes = Mapping[str, Sequence[int]]


def deduced_network(shapes: Shapes, where: str) -> NetworkConfig:
    """The network whose published tensors have these shapes, with an autoencoder of the default sizes.

    Args:
        shapes: published name -> shape; others than those that show a size are not looked at.
        where: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing or its shape belongs to no network of this family.
    """
    problems = [*_shape_problems(shapes)]
    if problems:
        raise CheckpointError(
            f"{where}: {first_few(problems)}. It is no published class-conditional BitDance; if its heads have other "
            "sizes or its grid is not square, name its configuration with --config"
        )
    hidden = shapes["norm.weight"][0]
    num_rows, row_size = shapes["cls_embedding.weight"]
    grid_side = math.isqrt(shapes["pos_for_diff.weight"][0])
    width = shapes["head.net.input_proj.weight"][0]
    mlp_size = shapes["head.net.res_blocks.0.w2.weight"][1]
    num_heads = hidden // CLASS_HEAD_DIM
    return NetworkConfig(
        model=ModelSection(
            family=_FAMILY,
            num_layers=_count(shapes, "layers."),
            hidden_size=hidden,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=CLASS_HEAD_DIM,
            ffn_size=shapes["layers.0.feed_forward.w2.weight"][1],
        ),
        head=HeadSection(
            width=width,
            num_blocks=_count(shapes, "head.net.res_blocks."),
            num_adaln=_count(shapes, "head.net.ada_ln_blocks."),
            head_dim=CLASS_HEAD_DIM,
            mlp_ratio=CLASS_MLP_RATIO if mlp_size == int(CLASS_MLP_RATIO * width) else mlp_size / width,
            diff_batch_mul=_DRAWS,
        ),
        vision=VisionSection(
            weights="", num_bits=shapes["proj_in.w1.weight"][1], block_side=math.isqrt(_block_tokens(shapes))
        ),
        classes=ClassesSection(num_classes=num_rows - 1, num_tokens=row_size // hidden, grid=(grid_side, grid_side)),
    )


def described(network: NetworkConfig) -> str:
    """The settings of a network's sizes in one line: its preset if it has one, blocks, classes and bits."""
    model, head = network.model, network.head
    preset = next((name for name, sections in PRESETS.items() if _is_preset(network, sections)), None)
    if preset:
        sizes = f"model.preset={preset}"
    else:
        sizes = (
            f"model.num_layers={model.num_layers} model.hidden_size={model.hidden_size} "
            f"model.num_heads={model.num_heads} model.ffn_size={model.ffn_size} head.width={head.width} "
            f"head.num_blocks={head.num_blocks} head.num_adaln={head.num_adaln}"
        )
    return (
        f"{sizes} vision.block_side={network.vision.block_side} classes.num_classes={network.classes.num_classes} "
        f"vision.num_bits={network.vision.num_bits}"
    )


def published_recipe(network: NetworkConfig) -> str | None:
    """The shipped configuration with the sizes, blocks, classes and bits of a published network; None if none has."""
    names = [name for name in shipped_configs() if name.startswith(_RECIPES)]
    return next((name for name in names if described(load_network(name)) == described(network)), None)


def published_class_config(network: NetworkConfig) -> dict[str, Any]:
    """The sizes of a network as JSON values: its sections, without paths."""
    sections = dataclasses.asdict(network)
    del sections["text"], sections["vision"]["weights"]
    return sections


def read_class_config(content: Mapping[str, Any], where: str) -> NetworkConfig:
    """The network of a `published_class_config`.

    Raises:
        CheckpointError: a setting is unknown, missing, of the wrong type or not positive, or it is of another family.
    """
    vision = content.get("vision")
    values = {**content, "vision": {**vision, "weights": ""} if isinstance(vision, Mapping) else vision}
    coercion = Coercion(NetworkConfig, lambda _: where)
    network = coercion.build(values)
    problems = [*coercion.problems] or [*_size_problems(network)]
    if problems:
        raise CheckpointError(f"{where}: {first_few(problems)}. Take it from the folder that the weights are from")
    assert isinstance(network, NetworkConfig)
    return network


def beyond_class_release(network: NetworkConfig) -> dict[str, Any]:
    """Sizes that the released files do not show and that differ from those of the release; empty if none does."""
    extra = {
        f"{section}.{name}": value
        for section, name, usual in _BEYOND_RELEASE
        if (value := getattr(getattr(network, section), name)) != usual
    }
    height, width = network.classes.grid
    return extra | ({"classes.grid": [height, width]} if height != width else {})


def _shape_problems(shapes: Shapes) -> Iterator[str]:
    ranks = {
        "norm.weight": 1,
        "cls_embedding.weight": 2,
        "pos_for_diff.weight": 2,
        "proj_in.w1.weight": 2,
        "layers.0.feed_forward.w2.weight": 2,
        "head.net.input_proj.weight": 2,
        "head.net.res_blocks.0.w2.weight": 2,
        "head.net.ada_ln_blocks.0.weight": 2,
    }
    fits = True
    for name, rank in ranks.items():
        if name not in shapes or len(shapes[name]) != rank or 0 in shapes[name]:
            fits = False
            found = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
            yield f"{name} {found}, expected {rank} dimension{'' if rank == 1 else 's'}"
    if not fits:
        return
    hidden = shapes["norm.weight"][0]
    if hidden % CLASS_HEAD_DIM:
        yield f"norm.weight has {hidden} channels, expected a multiple of {CLASS_HEAD_DIM}, the channels of a head"
    width = shapes["head.net.input_proj.weight"][0]
    if width % CLASS_HEAD_DIM:
        yield (
            f"head.net.input_proj.weight has {width} rows, expected a multiple of {CLASS_HEAD_DIM}, the channels of a "
            "head"
        )
    if shapes["cls_embedding.weight"][1] % hidden:
        yield (
            f"cls_embedding.weight has shape {list(shapes['cls_embedding.weight'])}, expected rows of a multiple of "
            f"{hidden} (norm.weight), the tokens of a class"
        )
    if shapes["cls_embedding.weight"][0] < 2:
        yield 'cls_embedding.weight has one row, expected one for each class and one for "no class"'
    num_cells, block_tokens = shapes["pos_for_diff.weight"][0], _block_tokens(shapes)
    if math.isqrt(num_cells) ** 2 != num_cells:
        yield f"pos_for_diff.weight has {num_cells} rows, expected a square, the cells of a grid"
    if math.isqrt(block_tokens) ** 2 != block_tokens:
        yield (
            f"query_token has shape {list(shapes['query_token'])}, expected [1, P - 1, {hidden}] with a square P, the "
            "tokens of a block"
        )
    num_blocks, num_adaln = (_count(shapes, f"head.net.{name}.") for name in ("res_blocks", "ada_ln_blocks"))
    if num_blocks % num_adaln:
        yield f"head.net has {num_blocks} res_blocks and {num_adaln} ada_ln_blocks, expected a multiple"


def _size_problems(network: NetworkConfig) -> Iterator[str]:
    if network.model.family != _FAMILY:
        yield f"model.family = {network.model.family!r}: must be {_FAMILY!r}"
    for section in ("model", "head", "vision", "classes"):
        tree = getattr(network, section)
        for field in dataclasses.fields(tree):
            value = getattr(tree, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, int) and not isinstance(number, bool) and number < 1 for number in numbers):
                yield f"{section}.{field.name} = {value!r}: must be positive"


def _is_preset(network: NetworkConfig, sections: Mapping[str, Mapping[str, object]]) -> bool:
    return sections["model"].get("family") == network.model.family and all(
        getattr(getattr(network, section), name) == value
        for section, settings in sections.items()
        for name, value in settings.items()
    )


def _block_tokens(shapes: Shapes) -> int:
    """P: one more than the query tokens [1, P - 1, D] or [P - 1, D], of which a file with P = 1 has none."""
    queries = shapes.get("query_token", (0, 0))
    return 1 + (queries[-2] if len(queries) > 1 else 0)


def _count(shapes: Shapes, prefix: str) -> int:
    """Modules in a list whose names begin so; they are counted from 0."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
