"""The backbone of generation against the stage that trains, with the same weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.distributed.layout_run import make_engine
from tests.distributed.spawn import run_ranks
from tests.distributed.test_qwen3_parity import _our_weights, _qwen3
from tests.distributed.toy import TOKENS, toy_config

# Caption and grid of the two samples. They differ in length, so that their batch in decoding has padding.
CAPTIONS = ([3, 4, 5, 6, 7, 8, 9], [10, 11])
GRID = (4, 6)


def _states(rank: int, config) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Conditions of the head for every predicted token: (of the pack in training, of cached decoding), per sample."""
    engine, topology = make_engine(config)
    from bitdance_scale.generate.block_decode import lay_out
    from bitdance_scale.generate.qwen3_blocks import Qwen3Blocks
    from bitdance_scale.generate.sampler import FlowSolver
    from bitdance_scale.model.inputs import make_inputs
    from bitdance_scale.model.linears import PlainLinears
    from bitdance_scale.model.positions import sincos_2d
    from bitdance_scale.model.projector import Projector
    from bitdance_scale.sequence.layout import pack_samples
    from bitdance_scale.sequence.noise import pack_noise
    from bitdance_scale.sequence.pack import Sample
    from bitdance_scale.vision.bits import pack_bits

    stage, vision = engine.stages[0], config.vision
    reference = _qwen3(config)
    weights = _our_weights(reference, config)
    for name, (parameter, placement) in engine.parameters.items():
        if name in weights:
            parameter.data.copy_(placement.local_part(weights.pop(name)))
    assert not weights
    prompts = [np.array(caption) for caption in CAPTIONS]
    samples = [Sample(key, GRID, prompt, np.array([7]), 1, 1) for key, prompt in enumerate(prompts)]
    pack = pack_samples(samples, TOKENS, pack_multiple=8)
    num_tokens = GRID[0] * GRID[1]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(2, num_tokens, vision.num_bits)).astype(np.float32)
    pack = pack.with_bits(pack_bits(signs.reshape(-1, vision.num_bits)))
    inputs = make_inputs(pack, pack_noise(pack, vision.num_bits, 0, 0), config, topology.device)

    conditions = []
    stage.head.register_forward_pre_hook(lambda module, arguments: conditions.append(arguments[2]))
    projector = Projector(vision.num_bits, config.model.hidden_size, PlainLinears())
    # Megatron-core's linears have the same names, and extra state that is not needed here.
    projector.load_state_dict(
        {
            name: tensor
            for name, tensor in stage.projector.state_dict().items()
            if tensor is not None and not name.endswith("_extra_state")
        }
    )
    with torch.no_grad():
        stage(inputs)
        trained = list(conditions[0].reshape(2, num_tokens, -1))

        blocks = Qwen3Blocks(reference, projector, stage.head, FlowSolver(1))
        layout = lay_out(prompts, GRID, TOKENS, topology.device)
        states = []
        blocks.start(layout)
        size = vision.block_tokens
        for number, cells in enumerate(layout.cells.split(size)):
            if number:
                drawn = torch.from_numpy(signs[:, (number - 1) * size : number * size])
                blocks.extend(drawn, layout.cells[(number - 1) * size : number * size])
            states.append(blocks.last_hidden + sincos_2d(cells, config.model.hidden_size))
    return trained, list(torch.cat(states, dim=1))


def test_cached_decoding_sees_what_training_sees():
    config = toy_config()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, flip_max=0.0))
    trained, decoded = run_ranks(1, _states, config)[0]
    for expected, found in zip(trained, decoded, strict=True):
        assert expected.std() > 0.3, "the comparison would be empty"
        # float32 rounding of four layers whose outputs are of order 1, in products of other shapes.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


CONTEXT_GRIDS = ((2, 2), (4, 6))
NUM_CAPTION_TOKENS = 7
END = 60


def _captions(rank: int, config, has_queries: bool) -> tuple[list[int], list[int]]:
    """(greedy captions with memory, what the stage that trains predicts of them in a pack), both end to end."""
    engine, topology = make_engine(config)
    from bitdance_scale.generate.caption_decode import TokenChoice, decode_captions, lay_out_contexts
    from bitdance_scale.generate.qwen3_captions import Qwen3Captions
    from bitdance_scale.model.inputs import make_inputs
    from bitdance_scale.model.linears import PlainLinears
    from bitdance_scale.model.projector import Projector
    from bitdance_scale.sequence.layout import pack_samples
    from bitdance_scale.sequence.noise import pack_noise
    from bitdance_scale.sequence.pack import Sample
    from bitdance_scale.vision.bits import pack_bits

    stage, vision = engine.stages[0], config.vision
    reference = _qwen3(config)
    weights = _our_weights(reference, config)
    for name, (parameter, placement) in engine.parameters.items():
        if name in weights:
            parameter.data.copy_(placement.local_part(weights.pop(name)))
    projector = Projector(vision.num_bits, config.model.hidden_size, PlainLinears())
    projector.load_state_dict({name: stage.projector.state_dict()[name] for name in projector.state_dict()})
    # Rows of one size: no token wins everywhere.
    torch.nn.init.normal_(stage.output.weight, generator=torch.Generator().manual_seed(2))
    tokens = dataclasses.replace(TOKENS, has_context_queries=has_queries)
    reply = np.array([7, 8, 9])
    prompts = [
        Sample(key, grid, np.arange(3 + key), reply, 3 + key, len(reply), predicts_image=False)
        for key, grid in enumerate(CONTEXT_GRIDS)
    ]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(4 + 24, vision.num_bits)).astype(np.float32)
    found = decode_captions(
        Qwen3Captions(reference, stage.output.weight.detach(), projector),
        lay_out_contexts(prompts, tokens, topology.device),
        torch.from_numpy(signs),
        TokenChoice(),
        (),
        torch.arange(stage.vocab_size) < END,
        END,
        NUM_CAPTION_TOKENS,
    )
    samples = [
        dataclasses.replace(prompt, after_ids=np.concatenate([reply, caption.ids, [END]]))
        for prompt, caption in zip(prompts, found, strict=True)
    ]
    pack = pack_samples(samples, tokens, pack_multiple=8).with_bits(pack_bits(signs))
    inputs = make_inputs(pack, pack_noise(pack, vision.num_bits, 0, 0), config, topology.device)
    logits = []
    stage.output.register_forward_hook(lambda module, arguments, result: logits.append(result))
    with torch.no_grad():
        stage(inputs)
    # What follows a caption is nothing that it says.
    is_caption = inputs.text_targets != END
    predicted = logits[0][:, :END].argmax(1)[is_caption]
    return [token for caption in found for token in caption.ids], predicted.tolist()


@pytest.mark.parametrize("has_queries", [False, True])
def test_captions_are_what_training_predicts(has_queries):
    found, expected = run_ranks(1, _captions, toy_config(), has_queries)[0]
    assert len(found) == len(CONTEXT_GRIDS) * NUM_CAPTION_TOKENS and len(set(found)) > 3
    assert found == expected
