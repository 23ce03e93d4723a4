"""Frozen linears are quantised while they are loaded: the same bits as after loading them whole, one at a time."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.run_checkpoint import MASTER_PREFIX, TENSORS_DIR, TrainState, save_checkpoint
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.quantised import quantise
from bitdance_scale.parallel.fake_ranks import join_fake_job, no_memory
from tests.distributed.layout_run import make_engine
from tests.distributed.measured_run import VOCAB_SIZE as WIDE_VOCAB_SIZE
from tests.distributed.measured_run import addresses, allocated_peak, wide_config
from tests.distributed.spawn import run_ranks
from tests.distributed.test_layouts import MEGATRON, SP, Layout
from tests.distributed.test_quantised_linears import NUM_QUANTISED, quantised_config

# Both sides run the same code; the bound is what docs/memory.md promises.
RELATIVE_BOUND = 0.03
DIGEST = "digest"
Codes = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _save(rank: int, config: RunConfig, folder: Path) -> None:
    """A checkpoint of a run without adapters whose masters are not what bfloat16 can hold."""
    engine, _ = make_engine(config)
    for name, fragment in engine.fragments():
        fragment.master.add_(torch.randn(fragment.master.shape) * 1e-3)
        assert name in engine.parameters
    state = TrainState(1, 0, 0, {}, {"step": 1, "skipped_steps": 0}, DIGEST)
    save_checkpoint(
        CheckpointFolder(folder, keep=1), state, engine.model_values(), engine.optimizer_values(), config_text=""
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Three replicas have written it, whose parts of a master end anywhere in a row."""
    folder = tmp_path_factory.mktemp("start")
    config = quantised_config(Layout(3, 3, {}), 16, "bfloat16")
    run_ranks(3, _save, dataclasses.replace(config, lora=LoraSection()), folder)
    return CheckpointFolder(folder, keep=1).latest()


def _load(engine: object, config: RunConfig, path: Path) -> None:
    from bitdance_scale.train.start_checks import Start
    from bitdance_scale.train.starting import Base, load_base

    load_base(engine, Base(Start(path, DIGEST, None), ""), config)


def _start(rank: int, config: RunConfig, path: Path) -> tuple[Codes, Codes, dict[str, torch.Tensor]]:
    """(codes and scales after the start, the same of the whole weights, weights that stay as they are)."""
    engine, _ = make_engine(config)
    from bitdance_scale.parallel.quantised_linears import quantised_weights

    _load(engine, config, path)
    stored = StoredTensors(path / TENSORS_DIR)
    found, expected = {}, {}
    for base in (base for stage in engine.stages for base in quantised_weights(stage)):
        whole = stored.read_rows(MASTER_PREFIX + base.name, 0, base.placement.global_shape[0]).to(torch.bfloat16)
        found[base.name] = base.codes, base.scales
        expected[base.name] = quantise(base.placement.local_part(whole), config.lora.base_bits)
    return found, expected, {name: located.parameter.data for name, located in engine.parameters.items()}


@pytest.mark.parametrize(
    ("bits", "layout"),
    [
        (4, Layout(1, 2, {})),
        (8, Layout(1, 2, {})),
        (4, Layout(2, 2, {"tensor": 2} | SP)),
        (8, Layout(2, 2, {"tensor": 2} | SP | MEGATRON)),
        (4, Layout(2, 4, {"pipeline": 2})),
    ],
    ids=str,
)
def test_codes_are_those_of_the_whole_weights(start, bits, layout):
    """Bit for bit, of a checkpoint in pieces that no layout here has."""
    tensors = read_index(start / TENSORS_DIR).tensors
    split = {name for name, tensor in tensors.items() if any(chunk.sizes[-1] % 64 for chunk in tensor.chunks)}
    linears = {name for name in split if ".linear_" in name}
    assert linears, f"pieces end within a block of {split} alone"
    ranks = run_ranks(layout.num_ranks, _start, quantised_config(layout, bits, "bfloat16"), start)
    names = set()
    for found, expected, held in ranks:
        for name, (codes, scales) in expected.items():
            assert torch.equal(found[name][0], codes) and torch.equal(found[name][1], scales), name
        assert not expected.keys() & held.keys()
        names |= expected.keys()
    assert len(names) == NUM_QUANTISED
    stored = StoredTensors(start / TENSORS_DIR)
    embedding = stored.read_rows(MASTER_PREFIX + "embedding.weight", 0, 2).to(torch.bfloat16)
    assert torch.equal(ranks[0][2]["embedding.weight"][:2], embedding), "what stays as it is was loaded too"


def _wide(bits: int) -> RunConfig:
    config = wide_config("float32", recompute="full")
    # Layers enough that one weight is a small part of all.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=6))
    return dataclasses.replace(config, lora=LoraSection(rank=8, base_bits=bits))


def _save_wide(rank: int, config: RunConfig, folder: Path) -> None:
    from bitdance_scale.parallel.build import build_engine
    from bitdance_scale.parallel.topology import make_topology, start_process_group

    start_process_group(timeout_s=120)
    engine = build_engine(config, WIDE_VOCAB_SIZE, make_topology(config.parallel))
    state = TrainState(1, 0, 0, {}, {"step": 1, "skipped_steps": 0}, DIGEST)
    values = engine.model_values(), engine.optimizer_values()
    save_checkpoint(CheckpointFolder(folder, keep=1), state, *values, config_text="")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of a start.

    Attributes:
        peak: the most from the beginning.
        loading: the most while weights are loaded.
        held: what stays.
        weights: of each weight that is quantised, in float32.
    """

    peak: int
    loading: int
    held: int
    weights: tuple[int, ...]


def _measure(rank: int, config: RunConfig, path: Path) -> Measured:
    """A start under PyTorch's profiler, which reports what the allocator gives out."""
    from bitdance_scale.parallel.build import build_stages, engine_of
    from bitdance_scale.parallel.quantised_linears import quantised_weights
    from bitdance_scale.parallel.topology import make_topology, start_process_group

    start_process_group(timeout_s=120)
    topology = make_topology(config.parallel)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function("build"):
            engine = engine_of(build_stages(config, WIDE_VOCAB_SIZE, topology), config, topology, False)
        with record_function("load"):
            _load(engine, config, path)
        left = addresses()
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensors in engine.holdings().values()
        for tensor in tensors
    }
    bases = quantised_weights(engine.stages[0])
    weights = tuple(4 * math.prod(base.placement.local_shape) for base in bases)
    files = frozenset(file.stat().st_size for file in (path / TENSORS_DIR).iterdir())
    peaks = (allocated_peak(profiler, left, since=phase, mapped_sizes=files) for phase in ("build", "load"))
    return Measured(*peaks, sum(held.values()), weights)


def _estimate(rank: int, config: RunConfig) -> int:
    from bitdance_scale.parallel.memory_estimate import build_logged

    topology = join_fake_job(1, 0, config.parallel)
    with no_memory() as log:
        build_logged(log, config, WIDE_VOCAB_SIZE, topology, False)
        return log.peak(0, log.position).total


@pytest.mark.parametrize("bits", [4, 16])
def test_weights_are_whole_one_at_a_time(bits, tmp_path):
    """Of the allocator: the estimate of what a start takes, and how much more than is held while it is loaded."""
    run_ranks(1, _save_wide, dataclasses.replace(_wide(16), lora=LoraSection()), tmp_path)
    measured = run_ranks(1, _measure, _wide(bits), CheckpointFolder(tmp_path, keep=1).latest())[0]
    assert run_ranks(1, _estimate, _wide(bits))[0] == pytest.approx(measured.peak, rel=RELATIVE_BOUND)
    beside = measured.loading - measured.held
    if bits == 4:
        # The weight, its quotients, their levels as int32, and the magnitudes or codes of half a float at most.
        largest = max(measured.weights)
        assert largest < beside < 3.5 * largest < 0.4 * sum(measured.weights)
    else:
        assert beside < 0.01 * measured.held
