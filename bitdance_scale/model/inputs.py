"""A pack with its noise as tensors on the device: the input of one forward pass.

Every pipeline stage gets all of it (a pack of bits is under 1 MB). The first stage reads the tokens, every stage the
mask and the rotary positions, the last stage the targets.

Shape suffixes: S positions, V vision tokens in the sequence, M predicted blocks, P vision tokens per block, C bits,
T text targets, K head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from bitdance_scale.config.schema import ModelSection, RunConfig
from bitdance_scale.model.attention import PackMask, pack_mask, to_device
from bitdance_scale.model.flow import draw_time
from bitdance_scale.model.low_rank import mixed
from bitdance_scale.model.positions import cell_rotary, rotary_frequencies, rotary_table
from bitdance_scale.model.projector import flip_bits
from bitdance_scale.sequence.noise import PackNoise
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.vision.codes import unpack_codes


@dataclass(frozen=True)
class PackInputs:
    """The input of the model for one pack.

    Attributes:
        token_ids: int64 [S].
        rotary: [S, 1, K] in the training dtype, of `positions.rotary_table`.
        mask: who sees whom (`sequence/visibility.py`).
        vision_positions: int64 [V]; vision_cells: int64 [V, 2]; vision_bits: [V, C] in {-1, +1}, flips applied,
            or continuous latents, here and below.
        predict_positions: int64 [M, P], positions whose hidden states predict a block; predict_cells: int64 [M, P, 2],
            cells of the tokens predicted; clean_bits: [M, P, C] in {-1, +1}; noise: [K M, P, C]; time: float32 [K M], K
            draws of all blocks one after the other.
        text_positions: int64 [T]; text_targets: int64 [T].
        num_vision_targets: M * P, or 0 if the pack predicts no image. Such a pack has one block of weight 0, so that
            every rank calls the same modules, as ZeRO-3 requires.
        num_text_targets: T, or 0 if the pack has no text target; it then has one of weight 0.
        dropout_rows: int64 [S], the keys of the positions, and head_dropout_rows: int64 [K M P], those of the predicted
            tokens, for `low_rank.dropout_rows`; None without dropout.
        reports_blocks: whether the model also returns the flow loss of every predicted block.
    """

    token_ids: torch.Tensor
    rotary: torch.Tensor
    mask: PackMask
    vision_positions: torch.Tensor
    vision_cells: torch.Tensor
    vision_bits: torch.Tensor
    predict_positions: torch.Tensor
    predict_cells: torch.Tensor
    clean_bits: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor
    text_positions: torch.Tensor
    text_targets: torch.Tensor
    num_vision_targets: int
    num_text_targets: int
    dropout_rows: torch.Tensor | None = None
    head_dropout_rows: torch.Tensor | None = None
    reports_blocks: bool = False


def make_inputs(
    pack: Pack, noise: PackNoise, config: RunConfig, device: torch.device, *, reports_blocks: bool = False
) -> PackInputs:
    """Moves an encoded pack and its noise to the device and derives mask, positions, flips and flow times."""
    on_device = functools.partial(to_device, device=device)
    assert pack.vision_bits is not None, "the images of the pack are not encoded yet"
    size, num_bits = pack.block_tokens, config.vision.num_bits
    bits = unpack_codes(on_device(pack.vision_bits), config.vision.latents)
    cells = on_device(pack.vision_cells).long()
    vision_positions, read = on_device(pack.vision_positions), on_device(pack.vision_inputs)
    flipped = flip_bits(bits, on_device(noise.flip_level), on_device(noise.flip_draw), config.vision.flip_max)
    predict_positions, predict_tokens = pack.predict_positions, on_device(pack.predict_tokens)
    clean, gaussian, time_normal = bits[predict_tokens], on_device(noise.noise), on_device(noise.time_normal)
    predict_cells = cells[predict_tokens]
    if len(predict_positions) == 0:
        predict_positions = np.zeros(size, dtype=np.int64)
        clean, gaussian = bits.new_ones(size, num_bits), bits.new_zeros(size, num_bits)
        predict_cells, time_normal = cells.new_zeros(size, 2), time_normal.new_zeros(1)
    text_positions, text_targets = pack.text_positions, pack.text_targets
    if len(text_positions) == 0:
        text_positions = text_targets = np.zeros(1, dtype=np.int64)
    rows = head_rows = None
    if config.lora.dropout:
        rows = mixed(on_device(_row_numbers(pack, noise)))
        draws = torch.arange(config.head.diff_batch_mul, device=device)
        head_rows = mixed(rows[on_device(predict_positions)] + draws[:, None]).flatten()
    return PackInputs(
        token_ids=on_device(pack.token_ids),
        rotary=rotary_table(
            rotary_angles(config.model, on_device(pack.position_ids), vision_positions, cells[read]),
            config.model.parts.rotary == "cells",
            getattr(torch, config.run.dtype),
        ),
        mask=pack_mask(pack.document_ids, pack.block_ids, config.model, device),
        vision_positions=vision_positions,
        vision_cells=cells[read],
        vision_bits=flipped[read],
        predict_positions=on_device(predict_positions).view(-1, size),
        predict_cells=predict_cells.view(-1, size, 2),
        clean_bits=clean.view(-1, size, num_bits),
        noise=gaussian.view(-1, size, num_bits),
        time=draw_time(time_normal, config.head),
        text_positions=on_device(text_positions),
        text_targets=on_device(text_targets),
        num_vision_targets=len(pack.predict_positions),
        num_text_targets=len(pack.text_positions),
        dropout_rows=rows,
        head_dropout_rows=head_rows,
        reports_blocks=reports_blocks,
    )


def _row_numbers(pack: Pack, noise: PackNoise) -> np.ndarray:
    """A number of every position, int64 [S], by its sample and its place in it; padding has numbers too."""
    # Document -1, padding, reads the last, whose numbers nothing depends on.
    numbers: np.ndarray = noise.dropout[pack.document_ids] + pack.position_ids
    return numbers


def rotary_angles(
    section: ModelSection, position_ids: torch.Tensor, vision_positions: torch.Tensor, vision_cells: torch.Tensor
) -> torch.Tensor:
    """The rotary angles of a row of positions, of the network's family.

    Args:
        section: family, head size and base.
        position_ids: int64 [S], positions along the sequence.
        vision_positions: int64 [V], where the vision tokens are.
        vision_cells: int64 [V, 2], their cells.

    Returns:
        float32 [S, 1, 1, K].
    """
    if section.parts.rotary == "sequence":
        return rotary_frequencies(position_ids, section.head_dim, section.rope_base)
    cells = vision_cells.new_zeros(len(position_ids), 2).index_copy(0, vision_positions, vision_cells)
    is_vision = torch.zeros_like(position_ids, dtype=torch.bool).index_fill(0, vision_positions, True)
    return cell_rotary(cells, is_vision, section.head_dim)
