"""What a rank holds at the fullest moment of a step, in bytes, by formula.

`bitdance memory` lets the engines run on tensors without memory, which takes a minute for each layout. This is the same
sum written down, so that a hundred layouts take a second. `tests/unit/planning/test_rank_memory.py` compares the two;
`docs/plan.md` has the bound. The formulas are of bfloat16 under FlexAttention, as on a GPU.

Shape letters as in `parallel/pipeline_stages.py`: S positions, D hidden size, V vision tokens, T text targets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitdance_scale.config.data_rules import NUM_RESOLUTION_TOKENS
from bitdance_scale.config.lora_schema import UNQUANTISED_BITS
from bitdance_scale.config.schema import NUM_MODULATIONS, NUM_TOKEN_MODULATIONS, RunConfig
from bitdance_scale.data.plan.synthetic_packs import fullest_typical_pack
from bitdance_scale.parallel.memory_parts import Bytes, num_in_flight
from bitdance_scale.planning.adapters import Linear, rank_linears, rank_parameters
from bitdance_scale.planning.parameters import FLOAT_BYTES, RankStages, element_bytes, table_elements

# A weight that crosses the line up to which DeepSpeed's ZeRO-3 gathers ahead (`parallel.prefetch_elements`).
ZERO3_CROSSING_ELEMENTS = 225_000_000


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
    ffn = model.ffn_size / tensor
    # The residual stream of two norms; fused query, key and value, and the mixed values; gate and up.
    norms = local_positions(config, num_positions) * model.hidden_size * 2
    kept = norms + num_positions * (query + 2 * kv + query + 2 * ffn)
    if config.parallel.recompute != "selective":
        # What the linears and attention take: normalised streams, rotated queries and keys, products.
        kept += norms + num_positions * (query + kv + ffn)
    # The logarithms of the softmax's sums, twice.
    return kept * size + num_positions * model.num_heads / tensor * 2 * FLOAT_BYTES


def layer_input_bytes(config: RunConfig, num_positions: int) -> float:
    """What a layer keeps when it is computed again as a whole."""
    return local_positions(config, num_positions) * config.model.hidden_size * element_bytes(config)


def head_block_bytes(config: RunConfig, num_tokens: float) -> float:
    """What one block of the diffusion head keeps."""
    head, tensor = config.head, config.parallel.tensor
    unit = num_tokens * head.width * element_bytes(config)
    if config.model.parts.head_attends(config.vision.block_tokens):
        return unit * (6 + (4 + 3 * head.mlp_ratio) / tensor)
    return unit * (3 + 3 * head.mlp_ratio / tensor)


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
    """The logits of all text targets; uncompiled, beside them a float32 copy, where the targets are, and that again."""
    table = table_elements(config, vocab_size) / config.model.hidden_size
    per_logit = element_bytes(config) + (0 if config.parallel.compile else 2 * FLOAT_BYTES + 1)
    return per_logit * num_text_targets * table if config.model.parts.has_text else 0.0


def input_bytes(config: RunConfig, pack: FullestPack) -> float:
    """All packs of the step: rotary tables, and four float32 numbers for every bit."""
    per_pack = pack.num_positions * element_bytes(config) * config.model.head_dim
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
        total += norm * 2 * size + head_bytes(config, pack.num_predicted)
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
    parameters = rank_parameters(config, vocab_size, stages)
    elements, part = parameters.trained, parameters.trained / data_size
    weights = size * parameters.elements - parameters.saved_bytes
    tables = size * position_elements(config, stages) + parameters.table_bytes
    held = {
        "weights": (weights / data_size if zero == 3 else weights) + tables,
        "gradients": FLOAT_BYTES * (elements if zero == 1 else part),
        "masters": FLOAT_BYTES * part,
        "moments": 2 * FLOAT_BYTES * part,
        "averages": FLOAT_BYTES * part if config.optim.average_decay else 0.0,
        "inputs": input_bytes(config, pack),
    }
    find = _adapter_moments if config.lora.is_used else _moments
    moments = find(config, vocab_size, pack, stages, elements, part)
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
    building = max(weights + drawn, started)
    if is_megatron_engine(config):
        # What is trained of a stage is copied into its buffer, and is there twice until all of it is.
        building = max(building, weights + elements * (FLOAT_BYTES + size / config.parallel.virtual_stages))
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


def bucket_bytes(config: RunConfig, elements: int) -> int:
    """Bytes of the buckets in which so many elements of gradients are reduced."""
    parallel = config.parallel
    if is_megatron_engine(config) or scatters_gradients(config):
        return 0
    # While one is sent, ZeRO-2 fills another.
    num_buckets = 2 if parallel.zero_stage == 2 else 1
    return element_bytes(config) * min(elements, parallel.reduce_bucket_elements) * num_buckets


def passes_in_flight(config: RunConfig, pack: FullestPack, stages: RankStages) -> float:
    """Forward passes through all stages of a rank whose activations it keeps at once."""
    num_virtual = config.parallel.virtual_stages
    return min(num_in_flight(config.parallel, stages.rank), pack.num_micro_batches * num_virtual) / num_virtual


def _adapter_moments(
    config: RunConfig, vocab_size: int, pack: FullestPack, stages: RankStages, elements: int, part: float
) -> list[dict[str, float]]:
    """`_moments` of a run with adapters: there is no gradient of a table or of a wide linear.

    Then the ends of the passes of head and layers are the fullest.
    """
    parallel, size = config.parallel, element_bytes(config)
    of_pass = stage_activation_bytes(config, pack, stages) + adapter_activation_bytes(config, vocab_size, pack, stages)
    activations = of_pass * passes_in_flight(config, pack, stages)
    whole = pack.num_positions * config.model.hidden_size * size if parallel.sequence_parallel else 0.0
    engine = float(bucket_bytes(config, elements))
    if parallel.zero_stage == 3:
        held = rank_parameters(config, vocab_size, stages).elements
        table = table_elements(config, vocab_size)
        engine += size * min(held, table + parallel.prefetch_elements + ZERO3_CROSSING_ELEMENTS)
    is_again = parallel.recompute == "full"

    def weight_again(elements: int) -> float:
        """A weight that is made of its codes."""
        return size * elements / parallel.tensor if config.lora.base_bits < UNQUANTISED_BITS else 0.0

    moments = []
    if stages.is_last:
        logits = logits_bytes(config, vocab_size, pack.num_text_targets)
        moments.append({"activations": activations + logits + whole, "buffers": engine})
    if stages.is_last and config.head.kind == "diffusion":
        num_tokens = pack.num_predicted * config.head.diff_batch_mul
        # Gradients within a block of the head: of its output, and of both halves before SwiGLU.
        gradients = num_tokens * config.head.width * size * (1 + 2 * config.head.mlp_ratio / parallel.tensor)
        gradients += weight_again(config.head.width * config.head.mlp_size)
        again = head_block_bytes(config, num_tokens) if is_again else 0.0
        moments.append({"activations": activations + again + gradients, "buffers": engine})
    again = layer_activation_bytes(config, pack.num_positions) * (1.5 if is_again else 0.5)
    again += weight_again(2 * config.model.hidden_size * config.model.ffn_size)
    others = activations - (head_bytes(config, pack.num_predicted) if stages.is_last else 0.0)
    moments.append({"activations": others + again, "gradients": whole, "buffers": engine})
    return moments


def adapter_activation_bytes(config: RunConfig, vocab_size: int, pack: FullestPack, stages: RankStages) -> float:
    """What one forward pass keeps more with adapters than without.

    Adapters keep what they make of their inputs, and their matrices in the rows of stacked linears. The frozen
    projector, and frozen linears without an adapter, keep no input.
    """
    size, tensor, is_kept = element_bytes(config), config.parallel.tensor, config.parallel.recompute != "full"
    lora, kept = config.lora, 0.0
    if stages.is_first and not lora.train_projector:
        kept -= projector_bytes(config, pack.num_vision)
    num_tokens = pack.num_predicted * config.head.diff_batch_mul
    for linear in rank_linears(config, vocab_size, stages):
        num_rows = pack.num_positions if linear.layer is not None else num_tokens
        if linear.adapted and is_kept:
            num_ranks = lora.rank * len(linear.adapted)
            kept += size * num_ranks * num_rows
            kept += size * num_ranks * (linear.out_size // tensor + linear.in_size) * (linear.num_parts > 1)
        elif not linear.adapted:
            kept -= size * num_rows * _input_kept(config, linear)
    return kept


# Attention keeps its own output. The linears of the head's condition share an input, which counts once, as that of the
# last of them; those of time and noise have few rows or features.
_KEPT_ANYWAY = re.compile(r"\.(linear_proj|wo|cond_embed|input_proj|ada_ln_blocks\.\d+|time_embed\.mlp\.\d+)\.weight$")


def _input_kept(config: RunConfig, linear: Linear) -> float:
    """Features of a linear's input that are kept for the gradient of its weight alone."""
    tensor = config.parallel.tensor
    if _KEPT_ANYWAY.search(linear.name):
        return 0
    if linear.layer is None:
        is_whole = config.parallel.recompute != "full" or not linear.is_in_block
        return linear.in_size / (tensor if linear.divides_input else 1) if is_whole else 0
    if config.parallel.recompute != "none":
        return 0
    if linear.divides_input:
        return linear.in_size / tensor
    return local_positions(config, 1) * linear.in_size


def _moments(
    config: RunConfig, vocab_size: int, pack: FullestPack, stages: RankStages, elements: int, part: float
) -> list[dict[str, float]]:
    """The candidates for the fullest moment: what each has beside what is always held."""
    parallel, size, has_text = config.parallel, element_bytes(config), config.model.parts.has_text
    of_pass = stage_activation_bytes(config, pack, stages)
    activations = of_pass * passes_in_flight(config, pack, stages)
    whole = pack.num_positions * config.model.hidden_size * size if parallel.sequence_parallel else 0.0
    is_bfloat16_engine = scatters_gradients(config)
    # Gradients of that engine are sent where they lie, or all together in another dtype, in which their sums arrive;
    # those of Megatron-core's engine are sent where they lie.
    sent = size * (elements + part) if is_bfloat16_engine and reduced_bytes(config) == size else 0.0
    buckets = bucket_bytes(config, elements)
    table = table_elements(config, vocab_size)
    gathered = with_table = 0.0
    if parallel.zero_stage == 3:
        with_table = size * min(elements, table + parallel.prefetch_elements)
        gathered = size * min(elements, table + parallel.prefetch_elements + ZERO3_CROSSING_ELEMENTS)
    engine = buckets + gathered
    bucket = min(elements, parallel.reduce_bucket_elements)

    def copied(gradient: float) -> float:
        """Bytes of the float32 copies of a gradient: of that engine on the way to the accumulated one, else as sent."""
        if is_bfloat16_engine:
            return FLOAT_BYTES * gradient
        return FLOAT_BYTES * max(gradient, bucket) if buckets and reduced_bytes(config) > size else 0.0

    largest = 2 * config.model.ffn_size * config.model.hidden_size // parallel.tensor
    moments = [
        {"activations": activations + whole, "gradients": size * largest, "buffers": copied(largest) + engine},
        {"buffers": sent if is_bfloat16_engine else engine + copied(0), "gradients": whole},
    ]
    if stages.is_last and has_text:
        logits = logits_bytes(config, vocab_size, pack.num_text_targets)
        # ZeRO-2 makes its bucket with the first gradient.
        moments.append(
            {"activations": activations + logits + whole, "buffers": 0.0 if parallel.zero_stage == 2 else engine}
        )
        left: float = pack.num_text_targets * config.model.hidden_size * size
        # The gradient of the logits is there during the product, and gone when the table's gradient is copied.
        left += max(0.0, size * pack.num_text_targets * table / config.model.hidden_size - copied(table))
        gradients = size * table + whole
        buffers = copied(table) + buckets + with_table
        moments.append({"activations": activations + left, "gradients": gradients, "buffers": buffers})
    if stages.is_first:
        others = max(0.0, activations - of_pass)
        gradients = size * table + whole
        moments.append({"activations": others, "gradients": gradients, "buffers": copied(table) + engine})
    if parallel.recompute == "full":
        again = layer_activation_bytes(config, pack.num_positions)
        others = activations - (head_bytes(config, pack.num_predicted) if stages.is_last else 0.0)
        moments.append({"activations": others + 1.5 * again, "gradients": whole, "buffers": engine})
    return moments
