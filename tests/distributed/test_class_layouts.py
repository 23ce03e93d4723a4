"""The class-conditional network: every layout against one process, in float32, as `test_layouts.py` has it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.run_checkpoint import AVERAGE_PREFIX, MASTER_PREFIX, TENSORS_DIR, TrainState
from bitdance_scale.checkpoint.step_names import step_name
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.block_decode import lay_out
from bitdance_scale.model.inputs import make_inputs
from bitdance_scale.parallel.layout_decode import StageDecoder
from bitdance_scale.parallel.topology import make_topology, start_process_group
from bitdance_scale.sequence.condition import load_condition
from bitdance_scale.sequence.layout import pack_samples
from bitdance_scale.sequence.noise import pack_noise
from bitdance_scale.vision.codes import unpack_codes
from tests.distributed.class_toy import (
    GRID,
    ablated,
    class_config,
    class_samples,
    class_tokens,
    continuous,
    random_codes,
)
from tests.distributed.layout_run import RankRecord, assemble, make_engine, step_inputs, train
from tests.distributed.spawn import run_ranks

# As in `test_layouts.py`: float32 sums in another order, and activations that tensor parallelism rounds differently.
BOUND, ACTIVATION_BOUND = 1e-6, 3e-6
NUM_STEPS = 2
TP, PP, SP = {"tensor": 2}, {"pipeline": 2}, {"sequence_parallel": True}
# (ranks, micro-batches, parallel, p, attention)
LAYOUTS = [
    (1, 2, {"recompute": "full"}, 2, "flex"),
    (2, 2, {}, 1, "dense"),
    (2, 2, {"zero_stage": 2, "recompute": "full"}, 2, "dense"),
    (2, 2, {"zero_stage": 3}, 2, "dense"),
    (2, 4, TP, 1, "dense"),
    (2, 4, TP | SP, 2, "dense"),
    (4, 2, TP | SP | {"zero_stage": 3}, 2, "dense"),
    (4, 2, TP | {"zero_stage": 2}, 1, "dense"),
    (2, 4, PP, 1, "dense"),
    (3, 3, {"pipeline": 3, "virtual_stages": 2}, 2, "dense"),
    (4, 4, TP | PP | SP, 2, "dense"),
    (2, 4, TP | SP | {"recompute": "selective"}, 2, "flex"),
]


def _config(parallel: dict[str, object], block_side: int, attention: str, num_layers: int) -> RunConfig:
    config = class_config(block_side, **parallel)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention=attention, num_layers=num_layers)
    )


@functools.cache
def _reference(block_side: int, num_layers: int) -> RankRecord:
    return run_ranks(1, train, _config({}, block_side, "dense", num_layers), 1, NUM_STEPS)[0]


@pytest.mark.parametrize(
    ("num_ranks", "num_micro", "parallel", "block_side", "attention"),
    LAYOUTS,
    ids=["-".join([f"{layout[0]}x{layout[1]}", *map(str, layout[2].values()), f"p{layout[3]}"]) for layout in LAYOUTS],
)
def test_layout_equals_one_process(num_ranks, num_micro, parallel, block_side, attention):
    num_layers = 6 if "virtual_stages" in parallel else 4
    config = _config(parallel, block_side, attention, num_layers)
    records = run_ranks(num_ranks, train, config, num_micro, NUM_STEPS, timeout_s=240)
    reference = _reference(block_side, num_layers)
    expected, found = assemble([reference], "gradients"), assemble(records, "gradients")
    assert found.keys() == expected.keys()
    bound = ACTIVATION_BOUND if "tensor" in parallel or attention == "flex" else BOUND
    for name, gradient in expected.items():
        assert gradient.any(), f"{name} has no gradient"
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < bound, f"{name}: {error:.1e}"
    for record in records:
        for losses, wanted in zip(record.losses, reference.losses, strict=True):
            assert losses == pytest.approx(wanted, rel=BOUND)
        assert record.grad_norms == pytest.approx(reference.grad_norms, rel=BOUND)
    _check_averages(records, config.optim.average_decay)
    _check_first_step(records, config)


def _check_averages(records: list[RankRecord], decay: float) -> None:
    """The averages against a plain one of whole tensors; ZeRO divides them at any element."""
    plain = assemble(records, 0)
    for step in range(1, NUM_STEPS + 1):
        weights = assemble(records, step)
        plain = {name: decay * average + (1 - decay) * weights[name] for name, average in plain.items()}
    assert any(not torch.equal(plain[name], weights[name]) for name in plain)
    for field in ("averages", "averaged"):
        found = assemble(records, field)
        assert found.keys() == plain.keys()
        for name, average in plain.items():
            # float32; the engine adds up in one operation.
            torch.testing.assert_close(found[name], average, rtol=1e-6, atol=1e-8)


def _check_first_step(records: list[RankRecord], config: RunConfig) -> None:
    """The weights after one step against AdamW's formula, with weight decay on some matrices only.

    After one step the moments, corrected for their bias, are the gradient and its square.
    """
    optim, gradients, before, after = config.optim, assemble(records, "gradients"), assemble(records, 0), {}
    clip = max(1.0, (records[0].grad_norms[0] + 1e-6) / optim.clip_norm)
    found, num_decayed = assemble(records, 1), 0
    for name, weight in before.items():
        is_decayed = weight.dim() > 1 and not name.startswith(("embedding.", "projector."))
        num_decayed += is_decayed
        gradient = gradients[name] / clip
        shrunk = weight * (1 - optim.lr * optim.weight_decay) if is_decayed else weight
        after[name] = shrunk - optim.lr * gradient / (gradient.abs() + optim.eps)
        torch.testing.assert_close(found[name], after[name], rtol=1e-5, atol=1e-6)
    assert 0 < num_decayed < len(before)


def test_a_layout_of_the_ablations_equals_one_process():
    """Bit-wise head, raster order and causal mask."""
    config = ablated(class_config(2, **(TP | PP | SP)))
    reference = run_ranks(1, train, ablated(class_config(2)), 1, NUM_STEPS)[0]
    records = run_ranks(4, train, config, 4, NUM_STEPS, timeout_s=240)
    expected, found = assemble([reference], "gradients"), assemble(records, "gradients")
    assert found.keys() == expected.keys() and expected["head.linear.weight"].shape == (16, 64)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < ACTIVATION_BOUND, name
    for record in records:
        for losses, wanted in zip(record.losses, reference.losses, strict=True):
            assert losses == pytest.approx(wanted, rel=BOUND)


def test_the_parts_of_the_network():
    """Nothing of the text-to-image network is left, and single tokens have no attention in the head."""
    names = {side: _reference(side, 4).shapes for side in (1, 2)}
    assert names[2]["embedding.weight"] == (6 * 3 + 3, 64) and names[1]["embedding.weight"] == (6 * 3, 64)
    assert names[2]["head_positions.weight"] == (16, 64) and names[2]["input_norm.weight"] == (64,)
    assert not [name for name in names[2] if "output" in name or "q_layernorm" in name or "fc1.bias" in name]
    assert "head.net.res_blocks.0.attn.wo.weight" in names[2] and "head.net.res_blocks.0.norm.weight" in names[1]


def _teacher_forced(rank: int, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict the blocks of one image: from the pack of training, and read block by block."""
    engine, topology = make_engine(config)
    tokens = class_tokens(config)
    sample = class_samples(config)[1]
    pack = pack_samples([sample], tokens, 1)
    codes = random_codes(np.random.default_rng(3), config)
    bits, pack = torch.from_numpy(unpack_codes(codes, config.vision.latents)), pack.with_bits(codes)
    noise = pack_noise(pack, 8, 0, 0)
    still = dataclasses.replace(noise, flip_level=np.zeros_like(noise.flip_level))
    inputs = make_inputs(pack, still, config, topology.device)
    stage = engine.stages[0]
    with torch.no_grad():
        hidden = stage.decoder(stage.embed_pack(inputs), attention_mask=inputs.mask, rotary_pos_emb=inputs.rotary)
        whole = hidden[inputs.predict_positions.flatten(), 0]
        layout = lay_out([sample.before_ids], GRID, tokens, topology.device)
        parts = []
        size = config.vision.block_tokens
        with StageDecoder(engine, config, topology) as decoder:
            decoder.start(layout)
            parts.append(decoder.last_hidden[:, 0])
            for number, cells in enumerate(layout.cells.split(size)[:-1]):
                decoder.extend(bits[None, size * number : size * (number + 1)], cells)
                parts.append(decoder.last_hidden[:, 0])
    return whole, torch.cat(parts)


@pytest.mark.parametrize(
    "config",
    [class_config(1), class_config(2), ablated(class_config(2)), continuous(class_config(2))],
    ids=["p1", "p2", "ablated", "continuous"],
)
def test_decoding_equals_the_teacher_forced_pack(config):
    whole, decoded = run_ranks(1, _teacher_forced, config)[0]
    # float32 rounding: the same products in batches of another size.
    torch.testing.assert_close(decoded, whole, rtol=1e-5, atol=1e-5)


def _train_and_draw(rank: int, config: RunConfig) -> tuple[list[float], torch.Tensor]:
    """Losses of three steps on the same packs, and two images drawn after that."""
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.step import train_step
    from bitdance_scale.train.sampling import BatchDrawer

    losses = []
    for _ in range(3):
        batch = step_inputs(config, topology, 2, 0)
        losses.append(train_step(engine, batch, config.loss, 1e-2, topology)[0].vision)
    condition = load_condition(config)
    prompts = [condition.prompt_ids(str(label)) for label in range(2)]
    return losses, BatchDrawer(engine, config, condition, topology).draw(prompts, [0, 1])


def test_continuous_latents_are_learned_and_drawn_across_a_pipeline():
    config = continuous(class_config(2, pipeline=2))
    (losses, drawn), (other_losses, other_drawn) = run_ranks(2, _train_and_draw, config)
    assert losses == other_losses and losses[2] < losses[1] < losses[0]
    # No signs: latents are drawn as they are, on the stage that has the head and, sent from there, on the other.
    assert drawn.shape == (2, 16, 8) and torch.equal(drawn, other_drawn)
    assert drawn.isfinite().all() and len(drawn.unique()) == drawn.numel()


def _build_with(rank: int, patterns: tuple[str, ...]) -> str:
    config = class_config(pipeline=2)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, decay_exempt=patterns))
    start_process_group(timeout_s=60)
    topology = make_topology(config.parallel)
    from bitdance_scale.parallel.build import build_engine

    with pytest.raises(ConfigError) as error:
        build_engine(config, class_tokens(config).vocab_size, topology)
    return str(error.value)


def test_an_exemption_that_names_nothing_is_refused_on_all_ranks():
    # The embedding is on the first stage, the head on the last: both are found.
    messages = run_ranks(2, _build_with, ("embedding.weight", "head.*", "projectors.*"))
    assert messages[0] == messages[1]
    assert "optim.decay_exempt: 'projectors.*': no parameter has such a name; the nearest are projector." in messages[0]


# (checkpoint that is loaded, settings of `optim` that differ from the toy's); the first is of a run with the toy's.
OTHER_GROUPS = {"decays_vectors": True, "decay_exempt": ("head.*",)}
CHANGES = ((0, {"average_decay": 0.0}), (1, OTHER_GROUPS), (0, OTHER_GROUPS))


def _load_with_other_settings(rank: int, folder: Path, zero_stage: int) -> None:
    """Saves after a step as 0; loads into engines of other settings, and saves what they hold as 1, 2 and 3."""
    config = class_config(zero_stage=zero_stage)
    engine, topology = make_engine(config)
    from bitdance_scale.checkpoint.run_checkpoint import load_tensors, save_checkpoint
    from bitdance_scale.parallel.build import build_engine
    from bitdance_scale.parallel.step import train_step

    def save(number: int) -> None:
        state = TrainState(step=1, images=0, tokens=0, loader={}, optimizer={}, tokenizer_digest="")
        checkpoints = CheckpointFolder(folder / str(number), keep=1)
        save_checkpoint(checkpoints, state, engine.model_values(), engine.optimizer_values(), "")

    train_step(engine, step_inputs(config, topology, 1, 0), config.loss, 1e-2, topology)
    save(0)
    for number, (loaded, changes) in enumerate(CHANGES, start=1):
        changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))
        engine = build_engine(changed, class_tokens(config).vocab_size, topology)
        load_tensors(folder / str(loaded) / step_name(1), engine.model_values(), engine.optimizer_values())
        save(number)


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.large)])
def test_averages_begin_and_end_with_a_resume_and_decay_groups_may_change(tmp_path, zero_stage):
    run_ranks(2, _load_with_other_settings, tmp_path, zero_stage)
    stored = [StoredTensors(tmp_path / str(number) / step_name(1) / TENSORS_DIR) for number in range(4)]
    first, left_out, begun, regrouped = (
        {name: one.read_rows(name, 0, one.index.spec(name).shape[0]) for name in one.index.tensors} for one in stored
    )
    averages = {name for name in first if name.startswith(AVERAGE_PREFIX)}
    assert averages and left_out.keys() == first.keys() - averages
    assert begun.keys() == regrouped.keys() == first.keys()
    for name, value in first.items():
        assert name in averages or torch.equal(left_out[name], value)
        assert torch.equal(regrouped[name], value), name
        # An average that is not in the checkpoint begins with the masters.
        source = first[name.replace(AVERAGE_PREFIX, MASTER_PREFIX)]
        assert torch.equal(begun[name], source), name
    assert any(not torch.equal(begun[name], first[name]) for name in averages)
