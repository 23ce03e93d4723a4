"""The backbone against transformers' Qwen3 with the same weights, and the query/key norm under tensor parallelism."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.distributed.layout_run import assemble, make_engine, train
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import VOCAB_SIZE, toy_config

NUM_POSITIONS = 12


def _qwen3(config):
    from transformers import Qwen3Config, Qwen3Model

    model = config.model
    torch.manual_seed(0)
    reference = Qwen3Model(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            rms_norm_eps=model.norm_eps,
            rope_theta=model.rope_base,
            initializer_range=0.2,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return reference


def _our_weights(reference, config) -> dict[str, torch.Tensor]:
    """The backbone's tensors by our names, assembled from Qwen3's with the table in `model/published_names.py`."""
    from bitdance_scale.model.published_names import Part, our_tensors

    theirs = {f"model.{name}": tensor for name, tensor in reference.state_dict().items()}
    network = dataclasses.replace(config.network, model=dataclasses.replace(config.model, tie_embeddings=True))
    return {
        tensor.name: torch.cat(
            [theirs[rows.published].narrow(0, rows.published_start, rows.num_rows) for rows in tensor.rows]
        )
        for tensor in our_tensors(network, VOCAB_SIZE)
        if tensor.part is Part.BACKBONE
    }


def _hidden_states(rank: int, config) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, theirs) on the same token ids, causal."""
    engine, _ = make_engine(config)
    from bitdance_scale.model.positions import rotary_frequencies, rotary_table

    reference = _qwen3(config)
    ours = _our_weights(reference, config)
    for name, (parameter, placement) in engine.parameters.items():
        if name in ours:
            parameter.data.copy_(placement.local_part(ours.pop(name)))
    assert not ours, f"no such parameters: {sorted(ours)}"
    ids = torch.randint(VOCAB_SIZE, (1, NUM_POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_ids=ids).last_hidden_state[0]
        mask = torch.ones(NUM_POSITIONS, NUM_POSITIONS, dtype=torch.bool).tril()[None, None]
        angles = rotary_frequencies(torch.arange(NUM_POSITIONS), config.model.head_dim, config.model.rope_base)
        rotary = rotary_table(angles, False, torch.float32)
        rows = engine.stages[0].embed_tokens(ids)
        found = engine.stages[0].decoder(rows, attention_mask=mask, rotary_pos_emb=rotary)[:, 0]
    return found, expected


@pytest.mark.parametrize("tensor", [1, 2])
def test_backbone_equals_transformers_qwen3(tensor):
    for found, expected in run_ranks(tensor, _hidden_states, toy_config(tensor=tensor)):
        # float32 rounding of four layers whose outputs are of order 1.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _train_without_head_sum(rank: int, config):
    """A run whose query/key norms take only their own heads' gradient, as Megatron-core's own norms would."""
    from bitdance_scale.parallel import backbone, zero

    if config.parallel.zero_stage == 1:
        zero.sum_over_tensor_ranks = lambda *_: None
    else:
        backbone.copy_to_tensor_model_parallel_region = lambda weight: weight
    return train(rank, config, 1, 1)


# Summed once per step, and inside autograd.
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_query_key_norm_gradient_is_summed_over_heads(zero_stage):
    """Regression: each rank sees its own heads only, and the losses drift in the fifth digit after three steps."""
    name = "decoder.layers.1.self_attention.q_layernorm.weight"
    config = toy_config(tensor=2, zero_stage=zero_stage)
    one = assemble(run_ranks(1, train, toy_config(), 1, 1), "gradients")[name]
    two = assemble(run_ranks(2, train, config, 1, 1), "gradients")[name]
    broken = assemble(run_ranks(2, _train_without_head_sum, config), "gradients")[name]
    # float32 sums in another order.
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    assert float((broken - one).norm() / one.norm()) > 0.1, "the test would not notice a missing sum"
