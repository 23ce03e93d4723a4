"""The predicted step: its FLOPs are those of the utilisation, and the 14B pretraining is near the arithmetic."""

from __future__ import annotations

import dataclasses

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.observe.cost import TRAINING_OVER_FORWARD, encode_flops, step_flops, utilisation
from bitdance_scale.parallel.stage_split import stage_split
from bitdance_scale.planning.adapters import rank_parameters
from bitdance_scale.planning.machine import Constant, Machine, load_machine
from bitdance_scale.planning.parameters import rank_stages
from bitdance_scale.planning.step_time import StepTime, step_time
from bitdance_scale.planning.traffic import exposed_s, tensor_micro_s
from bitdance_scale.planning.workload import Workload, step_lengths, typical_workload

ENTRIES = 151940
NUM_GPUS = 64
H100 = load_machine("h100-80")
# Images are encoded ahead: the arithmetic below leaves the encoder out.
STORED = "data.bits_dir=bits"


def predicted(config: RunConfig, machine: Machine = H100, num_gpus: int = NUM_GPUS) -> tuple[StepTime, Workload]:
    parallel = config.parallel
    replicas = num_gpus // (parallel.tensor * parallel.pipeline)
    workload = typical_workload(config, step_lengths(config), replicas)
    ranks = rank_stages(stage_split(config, ENTRIES), parallel.pipeline)
    return step_time(config, ENTRIES, workload, ranks, replicas, machine), workload


@pytest.fixture(scope="module")
def pretraining() -> tuple[RunConfig, StepTime, Workload]:
    config = load_config("pt_14b", [STORED])
    return config, *predicted(config)


def test_pretraining_of_14b_on_64_h100_is_near_the_arithmetic(pretraining):
    config, time, workload = pretraining
    # An audit's arithmetic over a trace of version 0.2's kernels gave 25 packs of 587 ms, 0.38 s besides, 15.1 s and
    # 31 %. It counted by other means, so 5 % is what its roundings allow. Of a pack, 125 ms were elementwise kernels,
    # now fused, and attention was computed once more; 2 % are gaps between kernels, and work of the optimiser that is
    # no longer there.
    assert workload.num_micro_batches == 25
    fused = 25 * 0.125 - time.elementwise + time.attention / 3.5
    assert time.elementwise < 25 * 0.125 / 3
    assert time.total == pytest.approx(15.1 - fused, rel=0.07)
    flops = step_flops(config, ENTRIES, workload.counts).training
    mfu = utilisation(flops, time.total, NUM_GPUS, H100.peak_flops("bfloat16"))
    assert mfu == pytest.approx(0.31 * 15.1 / time.total, abs=0.015)
    per_pack_ms = {name: 1e3 * value / 25 for name, value in dataclasses.asdict(time).items()}
    assert per_pack_ms["gemm"] == pytest.approx(271 + 38, rel=0.05)
    assert per_pack_ms["accumulation"] == pytest.approx(29, rel=0.05)
    assert per_pack_ms["tensor_traffic"] == pytest.approx(58 + 15, rel=0.2)
    assert time.data_traffic == pytest.approx(0.27, rel=0.05)


def test_products_are_the_flops_of_the_utilisation(pretraining):
    config, time, workload = pretraining
    flops = step_flops(config, ENTRIES, workload.counts)
    padding = workload.num_positions / workload.counts.num_positions
    expected = TRAINING_OVER_FORWARD * (padding * flops.backbone + flops.head + flops.projector + flops.text)
    rate = H100.product_rate("bfloat16", config.parallel.tensor)
    assert time.gemm * NUM_GPUS * rate == pytest.approx(expected, rel=1e-6)
    # Attention is computed three and a half times; selective recomputation does not repeat it.
    rate = H100.peak_flops("bfloat16") * H100.attention_fraction.value
    assert time.attention * NUM_GPUS * rate == pytest.approx(3.5 * flops.attention, rel=1e-6)


def test_the_encoder_is_shared_out_and_gone_with_stored_bits(pretraining):
    config = load_config("pt_14b")
    time, workload = predicted(config)
    flops = encode_flops(config.vision, workload.counts.num_encoded) / NUM_GPUS
    assert time.encoder == pytest.approx(flops / (H100.encoder_tf32_flops.value * H100.encoder_fraction.value))
    assert pretraining[1].encoder == 0.0
    assert time.total - time.encoder == pytest.approx(pretraining[1].total)


def test_recomputing_layers_repeats_a_third_of_their_products():
    none, full = (
        predicted(load_config("pt_14b", [STORED, f"parallel.recompute={how}"]))[0] for how in ("none", "full")
    )
    assert full.gemm / none.gemm == pytest.approx(4 / 3, rel=0.02)
    assert full.tensor_traffic > none.tensor_traffic
    assert full.accumulation == none.accumulation


def test_traffic_between_tensor_ranks_grows_with_them():
    micro = dataclasses.make_dataclass("Tokens", ["num_positions", "num_vision", "num_predicted"])(8192, 7000, 7000)
    stages = rank_stages((40,), 1)[0]
    split = "parallel.sequence_parallel=true"
    configs = [load_config("pt_14b", [f"parallel.tensor={tensor}", split]) for tensor in (2, 4, 8)]
    seconds = [tensor_micro_s(config, micro, stages, H100) for config in configs]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replicas_exchange_once_per_step_or_per_pack(dtype):
    settings = [STORED, "parallel.tensor=4", f"parallel.reduce_dtype={dtype}"]
    times = [predicted(load_config("pt_14b", [*settings, f"parallel.zero_stage={stage}"]))[0] for stage in (1, 2, 3)]
    once, every_pack, weights_too = (time.data_traffic for time in times)
    # Most of the traffic of a pack is hidden, that of a step is not.
    assert 5 * once < min(every_pack, weights_too)
    # An all-reduce in float32 is as much as two gathers of weights and a reduce-scatter.
    if dtype == "bfloat16":
        assert every_pack < weights_too


def test_traffic_between_replicas_hides_behind_passes_that_are_long_enough():
    config = load_config("pt_14b", ["parallel.zero_stage=2"])
    short = exposed_s(config, traffic_s=0.1, computing_s=10.0, machine=H100)
    assert short == pytest.approx(0.1 * (1 - H100.overlap_fraction.value))
    # ZeRO-2 sends beside the backward pass, ZeRO-3 beside both.
    assert exposed_s(config, traffic_s=5.0, computing_s=3.0, machine=H100) == pytest.approx(3.0)
    config = load_config("pt_14b", ["parallel.zero_stage=3"])
    assert exposed_s(config, traffic_s=5.0, computing_s=3.0, machine=H100) == pytest.approx(2.0)


def test_another_engine_moves_less_and_sends_beside_products():
    settings = [STORED, "parallel.tensor=4"]
    deepspeed, megatron = (
        predicted(load_config("pt_14b", [*settings, f"parallel.optimizer={name}"]))[0]
        for name in ("deepspeed", "megatron")
    )
    # 8 bytes for 18 per parameter and micro-batch.
    assert megatron.accumulation == pytest.approx(deepspeed.accumulation * 8 / 18)
    assert megatron.optimiser < deepspeed.optimiser
    assert megatron.data_traffic < deepspeed.data_traffic
    for name in ("gemm", "attention", "elementwise", "tensor_traffic"):
        assert getattr(megatron, name) == getattr(deepspeed, name), name
    split = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.optimizer=megatron"]
    # The later stages of a pipeline begin to reduce when their backward passes are over.
    in_pipeline = predicted(load_config("pt_14b", [STORED, *split]))[0].data_traffic
    assert in_pipeline > megatron.data_traffic


def test_a_pipeline_waits_and_interleaving_waits_less():
    settings = [STORED, "parallel.tensor=2", "parallel.pipeline=4"]
    plain, _ = predicted(load_config("pt_14b", settings))
    interleaved, _ = predicted(load_config("pt_14b", [*settings, "parallel.virtual_stages=2"]))
    assert plain.bubble > 1.5 * interleaved.bubble > 0
    assert predicted(load_config("pt_14b", [STORED]))[0].bubble == 0.0


def test_small_models_wait_for_the_host():
    config = load_config("pt_0p6b", [STORED])
    slow = dataclasses.replace(H100, kernel_launch_s=Constant(value=1e-3, source="a slow host"))
    assert predicted(config, slow)[0].launch > 10 * predicted(config)[0].launch


def test_products_of_a_run_with_adapters_are_the_flops_of_the_utilisation():
    """Frozen weights have no product for their own gradient."""
    settings = [STORED, "parallel.recompute=none", "lora.train_projector=true"]
    config = load_config("finetune_14b_lora", settings)
    time, workload = predicted(config)
    flops = step_flops(config, ENTRIES, workload.counts)
    # Attention is a part of those, and has a rate of its own; padding is not, and is multiplied by weights too.
    expected = flops.training - 3 * flops.attention
    padding = workload.num_positions / workload.counts.num_positions - 1
    expected += padding * 2 * flops.backbone
    rate = H100.product_rate("bfloat16", 1)
    assert time.gemm * NUM_GPUS * rate == pytest.approx(expected, rel=2e-3)
    whole, _ = predicted(load_config("finetune_14b_lora", [STORED, "parallel.recompute=none", "lora.rank=0"]))
    assert time.gemm < 0.7 * whole.gemm
    assert time.attention == pytest.approx(whole.attention)


def test_frozen_weights_are_not_accumulated_reduced_or_stepped():
    config = load_config("finetune_14b_lora", [STORED])
    time, _ = predicted(config)
    whole, _ = predicted(load_config("finetune_14b_lora", [STORED, "lora.rank=0"]))
    stages = rank_stages((40,), 1)[0]
    found = rank_parameters(config, ENTRIES, stages)
    share = found.trained / (found.elements - found.trained)
    for part in ("accumulation", "optimiser"):
        assert getattr(time, part) == pytest.approx(share * getattr(whole, part), rel=1e-6), part
    # Messages have a fixed time beside their bytes.
    assert time.data_traffic < 0.02 * whole.data_traffic
    assert time.accumulation < 0.01 * whole.accumulation


def test_frozen_layers_before_the_first_adapter_have_no_backward_pass():
    settings = [STORED, "parallel.recompute=full"]
    last, whole = (
        predicted(load_config("finetune_14b_lora", [*settings, f"lora.targets={targets}"]))[0]
        for targets in ("['layers.3[0-9].*']", "['layers.*']")
    )
    # Forward, again and backward of attention: 1 + 1 + 2.5 of ten layers, 1 of thirty.
    assert last.attention / whole.attention == pytest.approx((10 * 4.5 + 30) / (40 * 4.5))
    assert last.gemm < 0.7 * whole.gemm
    assert last.elementwise < whole.elementwise


def test_few_bits_cost_time_for_every_product():
    times = [
        predicted(load_config("finetune_14b_lora", [STORED, f"lora.base_bits={bits}"]))[0].elementwise
        for bits in (16, 8, 4)
    ]
    # Fewer bytes of codes are read for the same weights.
    assert times[0] < times[2] < times[1]
