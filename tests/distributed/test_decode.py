"""Decoding with the training model: all layouts, cached or not, agree with one process without a cache."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.distributed.layout_run import make_engine, step_inputs
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import TOKENS, toy_config

PROMPTS = [np.array([3, 4, 5, 6, 7]), np.array([9]), np.array([3, 8]), np.array([9])]
GRID = (4, 6)


def _decode(rank: int, config, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """(bits, the last block's hidden states, loss of a training step taken after the decoding)."""
    engine, topology = make_engine(config)
    from bitdance_scale.generate.block_decode import decode_blocks, lay_out
    from bitdance_scale.generate.sampler import ImageNoise
    from bitdance_scale.parallel.layout_decode import StageDecoder
    from bitdance_scale.parallel.step import train_step

    train_step(engine, step_inputs(config, topology, num_micro, 0), config.loss, 1e-3, topology)
    layout = lay_out(PROMPTS, GRID, TOKENS, topology.device)
    shape = (config.sample.num_steps + 1, config.vision.block_tokens, config.vision.num_bits)
    with StageDecoder(engine, config, topology) as decoder:
        bits = decode_blocks(decoder, layout, ImageNoise(3, [0, 1], shape, topology.device))
        hidden = decoder.last_hidden
    losses, _ = train_step(engine, step_inputs(config, topology, num_micro, 1), config.loss, 1e-3, topology)
    return bits, hidden, losses.total


def _config(use_cache: bool, **parallel: object):
    config = toy_config(**parallel)
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, use_cache=use_cache))


@pytest.fixture(scope="module")
def reference():
    return run_ranks(1, _decode, _config(use_cache=False))[0]


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "use_cache"),
    [
        (1, {}, True),
        (2, {"tensor": 2}, True),
        (2, {"tensor": 2, "sequence_parallel": True}, True),
        (2, {"pipeline": 2}, True),
        (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "full"}, True),
        (2, {"pipeline": 2}, False),
        (2, {"zero_stage": 3}, True),
    ],
    ids=str,
)
def test_decoding_is_independent_of_layout_and_cache(reference, num_ranks, parallel, use_cache):
    records = run_ranks(num_ranks, _decode, _config(use_cache, **parallel))
    for bits, hidden, loss in records:
        assert torch.equal(bits, reference[0])
        if hidden is not None:
            # float32 rounding through four layers, sums in another order; a wrong mask or position shows at 1e-2.
            torch.testing.assert_close(hidden, reference[1], rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(reference[2], rel=1e-5), "decoding must leave training as it was"


def test_decoding_runs_through_interleaved_stages_and_a_tied_embedding():
    """Six stages on three ranks; the output projection is a copy of the embedding, which the decoder does not use."""

    def layout(**parallel: int):
        config = _config(True, **parallel)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=6, tie_embeddings=True))

    (expected, hidden, _), *_ = run_ranks(1, _decode, layout())
    for bits, found, _ in run_ranks(3, _decode, layout(pipeline=3, virtual_stages=2), 3):
        assert torch.equal(bits, expected)
        if found is not None:
            # float32 rounding of two training steps.
            torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)


def _teacher_forced(rank: int, config, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states of a whole pack at predicting positions, the same from block-by-block decoding)."""
    engine, topology = make_engine(config)
    from bitdance_scale.generate.block_decode import lay_out
    from bitdance_scale.model.positions import rotary_frequencies, rotary_table
    from bitdance_scale.parallel.layout_decode import StageDecoder
    from bitdance_scale.sequence.layout import pack_samples
    from bitdance_scale.sequence.pack import Sample

    stage, model = engine.stages[0], config.model
    prompt, tokens = PROMPTS[0], dataclasses.replace(TOKENS, is_causal=is_causal)
    pack = pack_samples([Sample(0, GRID, prompt, np.array([7]), 1, 1)], tokens, 1)
    bits = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], size=(24, 8)).astype(np.float32))
    with torch.no_grad():
        text = stage.embed_tokens(torch.from_numpy(pack.token_ids)[None])
        vision = stage.embed_bits(bits, torch.from_numpy(pack.vision_cells))
        rows = text.index_copy(0, torch.from_numpy(pack.vision_positions), vision[:, None])
        document, block = pack.document_ids, pack.block_ids
        # The rule written out position by position, as an independent reference.
        mask = [
            [document[i] == document[j] and (j <= i if is_causal else block[j] <= block[i]) for j in range(len(block))]
            for i in range(len(block))
        ]
        angles = rotary_frequencies(torch.from_numpy(pack.position_ids), model.head_dim, model.rope_base)
        rotary = rotary_table(angles, False, torch.float32)
        hidden = stage.decoder(rows, attention_mask=torch.tensor(mask)[None, None], rotary_pos_emb=rotary)
        whole = hidden[torch.from_numpy(pack.predict_positions), 0]
        layout = lay_out([prompt, PROMPTS[1]], GRID, tokens, topology.device)
        parts = []
        with StageDecoder(engine, config, topology) as decoder:
            decoder.start(layout)
            parts.append(decoder.last_hidden[:, 0])
            for number, cells in enumerate(layout.cells.split(4)[:-1]):
                decoder.extend(bits[None, 4 * number : 4 * (number + 1)], cells)
                parts.append(decoder.last_hidden[:, 0])
    return whole, torch.cat(parts)


@pytest.mark.parametrize("is_causal", [False, True], ids=["block", "causal"])
def test_decoding_equals_the_teacher_forced_pack(is_causal):
    whole, decoded = run_ranks(1, _teacher_forced, _config(use_cache=True), is_causal)[0]
    # float32 rounding: the same products in batches of another size.
    torch.testing.assert_close(decoded, whole, rtol=1e-5, atol=1e-5)


def _places(rank: int, config) -> tuple[list[set[int]], list[int | None], bool]:
    """(where the keys of every layer were in each of three batches, the memory's shape, whether it is still in use)."""
    engine, topology = make_engine(config)
    from bitdance_scale.generate.block_decode import decode_blocks, lay_out
    from bitdance_scale.generate.sampler import ImageNoise
    from bitdance_scale.model.key_values import KeyValueMemory
    from bitdance_scale.parallel.layout_decode import StageDecoder

    places: list[set[int]] = []
    update = KeyValueMemory.update

    def watched(memory: KeyValueMemory, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = update(memory, *arguments)
        places[-1] |= {keys.data_ptr(), values.data_ptr()}
        return keys, values

    KeyValueMemory.update = watched
    decoder = StageDecoder(engine, config, topology)
    shape = (config.sample.num_steps + 1, config.vision.block_tokens, config.vision.num_bits)
    images, shapes = [], []
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:2]):
        places.append(set())
        layout = lay_out(prompts, GRID, TOKENS, topology.device)
        noise = ImageNoise(3, [0, 1][: len(prompts) // 2], shape, topology.device)
        with decoder:
            images.append(decode_blocks(decoder, layout, noise))
        shapes.append(decoder._memory.shape)
    attention = [layer.self_attention.core_attention for stage in engine.stages for layer in stage.decoder.layers]
    places.append(set())
    with StageDecoder(engine, config, topology) as fresh:
        noise = ImageNoise(3, [0], shape, topology.device)
        is_same = torch.equal(
            decode_blocks(fresh, lay_out(PROMPTS[:2], GRID, TOKENS, topology.device), noise), images[-1]
        )
    return places, shapes, is_same and not any(part._memory for part in attention)


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=str)
def test_keys_and_values_stay_in_place_from_batch_to_batch(parallel):
    num_ranks = parallel.get("pipeline", 1)
    for places, shapes, is_clean in run_ranks(num_ranks, _places, _config(True, **parallel)):
        # Two places for every layer of the rank, in every block of both batches of one shape.
        assert len(places[0]) == 8 // num_ranks and places[0] == places[1]
        assert shapes == [(4, 256), (4, 256), (2, 256)] and len(places[2]) == 8 // num_ranks
        # Nothing of an earlier batch is left in a later one, nor in the layers.
        assert is_clean
