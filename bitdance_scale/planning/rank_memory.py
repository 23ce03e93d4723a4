"""What a rank holds at the fullest moment of a step, in bytes, by formula.

`bitdance memory` lets the engines run on tensors without memory, which takes a minute for each layout. This is the same
sum written down, so that a hundred layouts take a second. `tests/unit/planning/test_rank_memory.py` compares the two;
`docs/plan.md` has the bound. The formulas are of bfloat16 under FlexAttention, as on a GPU.

Shape letters as in `parallel/pipeline_stages.py`: S positions, D hidden size, V vision tokens, T text targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitdance_scale.config.data_rules import NUM_RESOLUTION_TOKENS
from bitdance_scale.config.schema import NUM_MODULATIONS, NUM_TOKEN_MODULATIONS, RunConfig
from bitdance_scale.data.plan.synthetic_packs import fullest_typical_pack
from bitdance_scale.parallel.memory_parts import Bytes, num_in_flight
from bitdance_scale.planning.parameters import RankStages, rank_elements, table_elements

FLOAT_BYTES = 4
# `parallel/zero.py` gives DeepSpeed's bucket no more than this.
MAX_BUCKET_ELEMENTS = 500_000_000
# What DeepSpeed's ZeRO-3 gathers ahead of its use, in elements, beside the table in use: its default, and one more
# weight that crosses that line.
ZERO3_PREFETCHED_ELEMENTS = 275_000_000


@dataclass(frozen=True)
class FullestPack:
    """The pack that decides the memory of a step: of the longest captions, the one with the most text targets.

    Attributes:
        num_positions: S, padding included.
        num_vision: V, vision tokens at the input.
        num_predicted: vision tokens that the head predicts.
        num_text_targets: T.
        num_micro_batches: packs of a replica in a step.
    """

    num_positions: int
    num_vision: int
    num_predicted: int
    num_text_targets: int
    num_micro_batches: int


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank.

    Attributes:
        peak: bytes by purpose at the fullest moment of a step.
        building_peak: the most bytes before the first step.
    """

    peak: Bytes
    building_peak: int

    @property
    def needed(self) -> int:
        """Bytes that the device must have."""
        return max(self.peak.total, self.building_peak)


def fullest_pack(config: RunConfig, num_replicas: int) -> FullestPack:
    """The pack that `bitdance memory` runs.

    Raises:
        ConfigError: the global batch cannot be divided among the replicas.
    """
    first, num_packs = fullest_typical_pack(config, num_replicas)
    return FullestPack(
        num_positions=first.num_positions,
        num_vision=len(first.vision_positions),
        num_predicted=len(first.predict_positions),
        num_text_targets=len(first.text_targets),
        num_micro_batches=num_packs,
    )


def element_bytes(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.run.dtype == "bfloat16" else FLOAT_BYTES


def reduced_bytes(config: RunConfig) -> int:
    """Bytes of an element of a gradient that is summed over replicas."""
    return 2 if config.parallel.reduce_dtype == "bfloat16" else FLOAT_BYTES


def local_positions(config: RunConfig, num_positions: float) -> float:
    """Positions that a rank holds between the split linears."""
    parallel = config.parallel
    return num_positions / parallel.tensor if parallel.sequence_parallel else num_positions


def layer_activation_bytes(config: RunConfig, num_positions: int) -> float:
    """What a backbone layer keeps for its backward pass, without recomputation of the whole layer."""
    model, size, tensor = config.model, element_bytes(config), config.parallel.tensor
    query, kv = model.num_heads * model.head_dim / tensor, model.num_kv_heads * model.head_dim / tensor
    # Two norms: the float32 copy of their input, the normalised value, and what the linears take.
    norms = local_positions(config, num_positions) * model.hidden_size * 2 * (FLOAT_BYTES + 2 * size)
    # Fused query, key and value; the rotated query and key with four tables of cosines and sines; the mixed values.
    attention = num_positions * size * (query + 2 * kv + query + kv + 4 * model.head_dim + query)
    if model.parts.has_query_key_norms:
        attention += num_positions * (query + kv) * (FLOAT_BYTES + size)
    if config.parallel.recompute == "none":
        # The logarithms of the softmax's sums, twice.
        attention += num_positions * model.num_heads / tensor * 2 * FLOAT_BYTES
    # Gate and up stacked, SiLU and its input, their product.
    return norms + attention + num_positions * 5 * model.ffn_size / tensor * size


def layer_input_bytes(config: RunConfig, num_positions: int) -> float:
    """What a layer keeps when it is computed again as a whole."""
    return local_positions(config, num_positions) * config.model.hidden_size * element_bytes(config)


def head_block_bytes(config: RunConfig, num_tokens: float) -> float:
    """What one block of the diffusion head keeps."""
    head, tensor = config.head, config.parallel.tensor
    unit = num_tokens * head.width * element_bytes(config)
    if config.model.parts.head_attends(config.vision.block_tokens):
        return unit * (10 + (4 + 4 * head.mlp_ratio) / tensor)
    return unit * (5 + 4 * head.mlp_ratio / tensor)


def head_bytes(config: RunConfig, num_predicted: int) -> float:
    """What the head keeps for its backward pass."""
    head = config.head
    if head.kind == "bitwise":
        return num_predicted * (config.model.hidden_size + 2 * config.vision.num_bits) * element_bytes(config)
    num_tokens = num_predicted * head.diff_batch_mul
    unit = num_tokens * head.width * element_bytes(config)
    attends = config.model.parts.head_attends(config.vision.block_tokens)
    modulations = head.num_adaln * (NUM_MODULATIONS if attends else NUM_TOKEN_MODULATIONS)
    blocks = unit if config.parallel.recompute == "full" else head_block_bytes(config, num_tokens)
    return head.num_blocks * blocks + unit * (modulations + 7)


def projector_bytes(config: RunConfig, num_vision: int) -> float:
    """What projector and embedding keep."""
    model, size = config.model, element_bytes(config)
    stacked = 2 if model.parts.projector == "gelu" else 4
    return num_vision * size * (model.hidden_size + stacked * model.projector_size / config.parallel.tensor)


def logits_bytes(config: RunConfig, vocab_size: int, num_text_targets: int) -> float:
    """Two float32 copies of the logits of all text targets."""
    table = table_elements(config, vocab_size) / config.model.hidden_size
    return 2 * FLOAT_BYTES * num_text_targets * table if config.model.parts.has_text else 0.0


def input_bytes(config: RunConfig, pack: FullestPack) -> float:
    """All packs of the step: rotary tables, and four float32 numbers for every bit."""
    per_pack = pack.num_positions * FLOAT_BYTES * config.model.head_dim
    per_pack += pack.num_vision * 4 * FLOAT_BYTES * config.vision.num_bits
    return per_pack * pack.num_micro_batches


def stage_activation_bytes(config: RunConfig, pack: FullestPack, stages: RankStages) -> float:
    """What one forward pass through all stages of a rank keeps, logits left out."""
    keep = layer_input_bytes if config.parallel.recompute == "full" else layer_activation_bytes
    total = sum(stages.num_layers) * keep(config, pack.num_positions)
    size = element_bytes(config)
    if stages.is_first:
        total += projector_bytes(config, pack.num_vision)
    if stages.is_last:
        norm = local_positions(config, pack.num_positions) * config.model.hidden_size
        total += norm * (FLOAT_BYTES + 2 * size) + head_bytes(config, pack.num_predicted)
    return total


def position_elements(config: RunConfig, stages: RankStages) -> int:
    """Elements of the table of positions of cells (`model/positions.axis_table`), which ZeRO does not divide."""
    parts = config.model.parts
    has_table = (stages.is_first and parts.adds_cells_at_input) or (stages.is_last and parts.head_cells == "sincos")
    return NUM_RESOLUTION_TOKENS * config.model.hidden_size // 2 if has_table else 0


def rank_memory(
    config: RunConfig, vocab_size: int, pack: FullestPack, data_size: int, stages: RankStages, tokenizer_bytes: int
) -> RankMemory:
    """The memory of a pipeline rank.

    Args:
        config: the run, laid out.
        vocab_size: entries of the tokenizer.
        pack: of `fullest_pack`.
        data_size: data-parallel ranks.
        stages: what the rank holds.
        tokenizer_bytes: of the frozen autoencoder.
    """
    zero, size = config.parallel.zero_stage, element_bytes(config)
    elements = rank_elements(config, vocab_size, stages)
    part = elements / data_size
    held = {
        "weights": size * ((part if zero == 3 else elements) + position_elements(config, stages)),
        "gradients": FLOAT_BYTES * (elements if zero == 1 else part),
        "masters": FLOAT_BYTES * part,
        "moments": 2 * FLOAT_BYTES * part,
        "averages": FLOAT_BYTES * part if config.optim.average_decay else 0.0,
        "inputs": input_bytes(config, pack),
    }
    moments = _moments(config, vocab_size, pack, stages, elements)
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    peak = {role: held.get(role, 0.0) + fullest.get(role, 0.0) for role in {*held, *fullest}}
    drawn = 0.0
    if stages.is_first or (stages.is_last and config.model.parts.has_text):
        # The largest initial weight is drawn whole in float32, and a rank's part of it taken.
        table = table_elements(config, vocab_size)
        drawn = FLOAT_BYTES * table * (config.parallel.tensor + 1)
    # DeepSpeed's engine for bfloat16 under ZeRO-1 and Megatron-core's buffers hold gradients from the start.
    holds_gradients = scatters_gradients(config) or is_megatron_engine(config)
    started = sum(held.values()) - held["inputs"] - (0.0 if holds_gradients else held["gradients"])
    building = max(size * elements + drawn, started)
    return RankMemory(
        peak=Bytes(**{role: round(value) for role, value in peak.items()}, tokenizer=tokenizer_bytes),
        building_peak=round(building) + tokenizer_bytes,
    )


def is_megatron_engine(config: RunConfig) -> bool:
    """Whether the optimiser is Megatron-core's, not DeepSpeed's."""
    return config.parallel.optimizer == "megatron"


def scatters_gradients(config: RunConfig) -> bool:
    """Whether DeepSpeed's engine is the one for bfloat16 under ZeRO-1; float32 has the bucket of ZeRO-2."""
    is_zero1 = not is_megatron_engine(config) and config.parallel.zero_stage == 1
    return is_zero1 and config.run.dtype == "bfloat16"


def _moments(
    config: RunConfig, vocab_size: int, pack: FullestPack, stages: RankStages, elements: int
) -> list[dict[str, float]]:
    """The candidates for the fullest moment: what each has beside what is always held."""
    parallel, size, has_text = config.parallel, element_bytes(config), config.model.parts.has_text
    passes = min(num_in_flight(parallel, stages.rank), pack.num_micro_batches * parallel.virtual_stages)
    of_pass = stage_activation_bytes(config, pack, stages)
    activations = of_pass * passes / parallel.virtual_stages
    whole = pack.num_positions * config.model.hidden_size * size if parallel.sequence_parallel else 0.0
    is_bfloat16_engine = scatters_gradients(config)
    # Gradients of that engine are sent where they lie, or all together in another dtype; those of Megatron-core's too.
    sent = size * elements if is_bfloat16_engine and reduced_bytes(config) == size else 0.0
    has_bucket = not (is_bfloat16_engine or is_megatron_engine(config))
    bucket = size * min(elements, MAX_BUCKET_ELEMENTS) if has_bucket else 0.0
    gathered = 0.0
    if parallel.zero_stage == 3:
        gathered = size * min(elements, table_elements(config, vocab_size) + ZERO3_PREFETCHED_ELEMENTS)
    engine = bucket + gathered
    # A gradient in training dtype, and in that engine its float32 copy on the way to the accumulated one.
    copy = FLOAT_BYTES if is_bfloat16_engine else 0
    table = table_elements(config, vocab_size)
    largest = 2 * config.model.ffn_size * config.model.hidden_size // parallel.tensor
    moments = [
        {"activations": activations + whole, "gradients": size * largest, "buffers": copy * largest + engine},
        {"buffers": sent if is_bfloat16_engine else engine, "gradients": whole},
    ]
    if stages.is_last and has_text:
        logits = logits_bytes(config, vocab_size, pack.num_text_targets)
        # ZeRO-2 makes its bucket with the first gradient.
        moments.append(
            {"activations": activations + logits + whole, "buffers": 0.0 if parallel.zero_stage == 2 else engine}
        )
        left = pack.num_text_targets * config.model.hidden_size * size
        gradients = size * table + whole
        moments.append({"activations": activations + left, "gradients": gradients, "buffers": copy * table + engine})
    if stages.is_first:
        others = max(0.0, activations - of_pass)
        gradients = size * table + whole
        moments.append({"activations": others, "gradients": gradients, "buffers": copy * table + engine})
    if parallel.recompute == "full":
        again = layer_activation_bytes(config, pack.num_positions)
        others = activations - (head_bytes(config, pack.num_predicted) if stages.is_last else 0.0)
        moments.append({"activations": others + 1.5 * again, "gradients": whole, "buffers": engine})
    return moments
