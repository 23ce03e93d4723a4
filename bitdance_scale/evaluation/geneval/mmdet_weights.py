"""The weights that GenEval is published with, mmdetection's, in transformers' Mask2Former.

Both are the network of Cheng et al., under other names and in two places with another order: mmdetection holds query,
key and value in one matrix where transformers has three, and merges patches of Swin channel by channel where
transformers has patch by patch.

Sources of the names and of the order: open-mmlab/mmdetection, mmdet/models/backbones/swin.py,
mmdet/models/plugins/msdeformattn_pixel_decoder.py (from 3 on mmdet/models/layers), mmdet/models/dense_heads/
mask2former_head.py, and mmdet/models/utils/transformer.py (`PatchMerging`). Versions 2 and 3 name the layers of
transformers differently; both are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.geneval.classes import CLASSES
from bitdance_scale.evaluation.pretrained import check_report, reading
from bitdance_scale.pickled_weights import check_archive, check_globals, pickled_specs, unpickle
from bitdance_scale.torchvision_operators import declare_operators
from bitdance_scale.weight_files import refuse

_PARTS = ("backbone.", "panoptic_head.")
# Whole numbers that follow from the size of a window; versions 4 of transformers read them as if they were weights.
_INDEX = ".relative_position_index"
_SWIN = "model.pixel_level_module.encoder"
_PIXEL = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
_ENCODER_LAYER = r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)"
_DECODER_LAYER = r"panoptic_head\.transformer_decoder\.layers\.(\d+)"
_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)"
_NEW_BLOCK = rf"{_SWIN}.encoder.layers.\1.blocks.\2"

_NAMES: tuple[tuple[str, str], ...] = (
    (r"backbone\.patch_embed\.projection", rf"{_SWIN}.embeddings.patch_embeddings.projection"),
    (r"backbone\.patch_embed\.norm", rf"{_SWIN}.embeddings.norm"),
    (rf"{_BLOCK}\.norm1", rf"{_NEW_BLOCK}.layernorm_before"),
    (rf"{_BLOCK}\.norm2", rf"{_NEW_BLOCK}.layernorm_after"),
    (rf"{_BLOCK}\.attn\.w_msa\.(relative_position_\w+)", rf"{_NEW_BLOCK}.attention.self.\3"),
    (rf"{_BLOCK}\.attn\.w_msa\.qkv", rf"{_NEW_BLOCK}.attention.self.{{query,key,value}}"),
    (rf"{_BLOCK}\.attn\.w_msa\.proj", rf"{_NEW_BLOCK}.attention.output.dense"),
    (rf"{_BLOCK}\.ffn\.layers\.0\.0", rf"{_NEW_BLOCK}.intermediate.dense"),
    (rf"{_BLOCK}\.ffn\.layers\.1", rf"{_NEW_BLOCK}.output.dense"),
    (r"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)", rf"{_SWIN}.encoder.layers.\1.downsample.\2"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv", rf"{_PIXEL}.input_projections.\1.0"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn", rf"{_PIXEL}.input_projections.\1.1"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv", rf"{_PIXEL}.adapter_1.0"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn", rf"{_PIXEL}.adapter_1.1"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv", rf"{_PIXEL}.layer_1.0"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn", rf"{_PIXEL}.layer_1.1"),
    (r"panoptic_head\.pixel_decoder\.mask_feature", rf"{_PIXEL}.mask_projection"),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", rf"{_PIXEL}.level_embed"),
    (rf"{_ENCODER_LAYER}\.(?:attentions\.0|self_attn)\.(\w+)", rf"{_PIXEL}.encoder.layers.\1.self_attn.\2"),
    (rf"{_ENCODER_LAYER}\.norms\.0", rf"{_PIXEL}.encoder.layers.\1.self_attn_layer_norm"),
    (rf"{_ENCODER_LAYER}\.norms\.1", rf"{_PIXEL}.encoder.layers.\1.final_layer_norm"),
    (rf"{_ENCODER_LAYER}\.(?:ffns\.0|ffn)\.layers\.0\.0", rf"{_PIXEL}.encoder.layers.\1.fc1"),
    (rf"{_ENCODER_LAYER}\.(?:ffns\.0|ffn)\.layers\.1", rf"{_PIXEL}.encoder.layers.\1.fc2"),
    (rf"{_DECODER_LAYER}\.(?:attentions\.0|cross_attn)\.attn", rf"{_QUERIES}.decoder.layers.\1.cross_attn"),
    (
        rf"{_DECODER_LAYER}\.(?:attentions\.1|self_attn)\.attn\.in_proj_(weight|bias)",
        rf"{_QUERIES}.decoder.layers.\1.self_attn.{{q_proj,k_proj,v_proj}}.\2",
    ),
    (
        rf"{_DECODER_LAYER}\.(?:attentions\.1|self_attn)\.attn\.(out_proj)",
        rf"{_QUERIES}.decoder.layers.\1.self_attn.\2",
    ),
    (rf"{_DECODER_LAYER}\.norms\.0", rf"{_QUERIES}.decoder.layers.\1.cross_attn_layer_norm"),
    (rf"{_DECODER_LAYER}\.norms\.1", rf"{_QUERIES}.decoder.layers.\1.self_attn_layer_norm"),
    (rf"{_DECODER_LAYER}\.norms\.2", rf"{_QUERIES}.decoder.layers.\1.final_layer_norm"),
    (rf"{_DECODER_LAYER}\.(?:ffns\.0|ffn)\.layers\.0\.0", rf"{_QUERIES}.decoder.layers.\1.fc1"),
    (rf"{_DECODER_LAYER}\.(?:ffns\.0|ffn)\.layers\.1", rf"{_QUERIES}.decoder.layers.\1.fc2"),
    (r"panoptic_head\.transformer_decoder\.post_norm", rf"{_QUERIES}.decoder.layernorm"),
    (r"panoptic_head\.query_embed", rf"{_QUERIES}.queries_embedder"),
    (r"panoptic_head\.query_feat", rf"{_QUERIES}.queries_features"),
    (r"panoptic_head\.level_embed", rf"{_QUERIES}.level_embed"),
    (r"panoptic_head\.cls_embed", "class_predictor"),
    (r"panoptic_head\.mask_embed\.0", rf"{_QUERIES}.decoder.mask_predictor.mask_embedder.0.0"),
    (r"panoptic_head\.mask_embed\.2", rf"{_QUERIES}.decoder.mask_predictor.mask_embedder.1.0"),
    (r"panoptic_head\.mask_embed\.4", rf"{_QUERIES}.decoder.mask_predictor.mask_embedder.2.0"),
)  # fmt: skip
_LATER = r"(?=$|\.|_)"
_RULES = tuple((re.compile(old + _LATER), new) for old, new in _NAMES)
# The backbone's normalisation after its last stage, which nothing follows, and a weight of the loss.
_UNUSED = r"\.swin\.layernorm\.(weight|bias)$|^criterion\."


def mmdet_network(path: Path, config: Any = None) -> nn.Module:
    """Mask2Former of transformers with weights of mmdetection, on the CPU in float32, frozen.

    Args:
        path: `mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth`, whose network is the
            default `Mask2FormerConfig` with 80 classes, or a file of another one of its kind.
        config: `Mask2FormerConfig` of another network.

    Raises:
        CheckpointError: it is damaged, needs code to be run, or is of another network.
    """
    # Before transformers is imported, which takes seconds.
    declare_operators()
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    check_archive(path)
    check_globals(path)
    content = unpickle(path)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds no state_dict, as files of mmdetection do")
    state = {name: value for name, value in state.items() if str(name).startswith(_PARTS)}
    indices = {name: state.pop(name) for name in [*state] if name.endswith(_INDEX)}
    # Raises for what is no weight.
    names = [name for name, _ in pickled_specs(path, state)]
    renamed = dict(item for name in names for item in _renamed(name, state[name].float()))
    renamed |= {str(_new_name(name)): value for name, value in indices.items()}
    odd = [f"{name} is no tensor of Mask2Former with Swin" for name in names if not _new_name(name)]
    refuse(path, odd, "Name mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth")
    config = config or Mask2FormerConfig(num_labels=len(CLASSES))
    with reading(str(path)):
        network, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            None, config=config, state_dict=renamed, output_loading_info=True
        )
    check_report(str(path), report, _UNUSED)
    network = network.requires_grad_(False).eval()
    assert isinstance(network, nn.Module)
    return network


def _new_name(name: str) -> str | None:
    """The name in transformers, with the names of parts in braces where it has several; None for a foreign name."""
    for old, new in _RULES:
        match = old.match(name)
        if match:
            return match.expand(new) + name[match.end() :]
    # The backbone's normalisation of a stage's output; the stages count from 1 there.
    stage = re.fullmatch(r"backbone\.norm(\d)\.(weight|bias)", name)
    return f"{_SWIN}.hidden_states_norms.stage{int(stage[1]) + 1}.{stage[2]}" if stage else None


def _renamed(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of mmdetection as one or three of transformers; none for a foreign name."""
    new = _new_name(name)
    if new is None:
        return
    if ".downsample." in name:
        value = by_patch(value)
    several = re.search(r"\{(.*)\}", new)
    if several is None:
        yield new, value
        return
    for part, rows in zip(several[1].split(","), value.chunk(3), strict=True):
        yield new.replace(several[0], part), rows.contiguous()


def by_patch(value: torch.Tensor) -> torch.Tensor:
    """Swin's merging of 2 x 2 patches [..., 4 C], from mmdetection's order to that of transformers.

    There the last axis is (channel, row, column), of `torch.nn.Unfold`; here it is (column, row, channel).
    """
    channels = value.shape[-1] // 4
    grid = value.unflatten(-1, (channels, 2, 2))
    return grid.movedim(-3, -1).transpose(-3, -2).flatten(-3).contiguous()
