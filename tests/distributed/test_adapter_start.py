"""A run that goes on from a folder of adapters, under layouts that divide what it fills."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bitdance_scale.checkpoint.export_adapter import export_adapter
from bitdance_scale.checkpoint.frozen_base import FrozenBase
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.run_adapters import QUERIES, matrices_of, open_run_adapters
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.model.adaptable import PROJECTOR, targets
from bitdance_scale.train.start_adapters import fill_from_folder
from tests.adapted import LORA, adapted_config, write_adapted_run
from tests.distributed.spawn import run_ranks
from tests.distributed.test_release_layouts import HEAD
from tests.released import scale_backbone, write_published

ALL = dataclasses.replace(LORA, train_projector=True, train_queries=True)
LAYOUTS = [(2, {"tensor": 2, "sequence_parallel": True}), (2, {"zero_stage": 3})]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """An import, a run with adapters beside it, and what that exports."""
    root = tmp_path_factory.mktemp("start")
    import_release(open_source(write_published(root / "published", head=HEAD), None), root / "imported")
    run = write_adapted_run(root / "imported", root / "run", ALL)
    export_adapter(open_run_adapters(run), root / "style")
    return root


def _config(root: Path, parallel: dict[str, object] | None = None, **lora: object) -> RunConfig:
    config = adapted_config(root / "imported", dataclasses.replace(ALL, start_from=str(root / "style"), **lora))
    return dataclasses.replace(config, parallel=ParallelSection(**parallel or {}))


def _frozen(root: Path) -> FrozenBase:
    return FrozenBase(find_checkpoint(root / "imported"), "trained", "imported")


def _filled(rank: int, root: Path, config: RunConfig, vocab_size: int) -> list[dict[str, list]]:
    """(offsets, values) of the weights and of the masters that a rank holds after the start."""
    from bitdance_scale.parallel.build import build_engine
    from bitdance_scale.parallel.topology import make_topology, start_process_group

    start_process_group(timeout_s=120)
    engine = build_engine(config, vocab_size, make_topology(config.parallel))
    prefix = "master."
    optimizer = engine.optimizer_values()
    masters = {name.removeprefix(prefix): value for name, value in optimizer.items() if name.startswith(prefix)}
    held = (engine.trained_values(), masters)
    fill_from_folder(root / "style", held, _frozen(root), config, vocab_size)
    return [
        {name: [(piece.offsets, piece.tensor.clone()) for piece in value.pieces] for name, value in values.items()}
        for values in held
    ]


@pytest.mark.parametrize(("num_ranks", "parallel"), LAYOUTS)
def test_every_rank_has_its_part_of_the_folder(root, num_ranks, parallel):
    source = open_run_adapters(root / "run").source
    config, vocab_size = _config(root, parallel), open_run_adapters(root / "run").condition.vocab_size
    wanted = {QUERIES: source.read_queries()}
    wanted |= {PROJECTOR + name: source.read_projector(name) for name in source.projector}
    for linear in targets(config.network, vocab_size, config.lora.targets):
        a, b = source.read_a(linear.name), source.read_b(linear.name, 0, linear.out_size)
        wanted |= dict(zip(matrices_of(linear), (a, b), strict=True))
    ranks = run_ranks(num_ranks, _filled, root, config, vocab_size)
    for number, dtype in enumerate((torch.bfloat16, torch.float32)):
        covered = {name: torch.full(value.shape, float("nan"), dtype=dtype) for name, value in wanted.items()}
        for held in ranks:
            assert held[number].keys() <= covered.keys()
            for name, pieces in held[number].items():
                for offsets, part in pieces:
                    where = tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))
                    covered[name][where] = part
        assert [name for name, value in wanted.items() if not torch.equal(covered[name], value.to(dtype))] == []


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, r"lora.rank = 4: the adapters of .*style have 3 \(.*another rank.*Set lora.rank=3, or merge"),
        ({"alpha": 8.0}, r"lora.alpha = 8.0: .* are multiplied by 3.4641 .*Set lora.alpha=6,"),
        ({"rank_stabilized": False}, r"lora.alpha = 6.0: .*here by 2. Set lora.alpha=10.3923"),
        (
            {"targets": ("q_proj", "up_proj")},
            r"style has no adapters of model.layers.0.mlp.up_proj;.*Set lora.targets=",
        ),
        ({"targets": ("q_proj",)}, r"style also has adapters of head"),
        ({"train_projector": False}, r"lora.train_projector = false: .*set lora.train_projector=true"),
        ({"train_queries": False}, r"lora.train_queries = false"),
    ],
)
def test_other_adapters_are_refused(root, lora, message):
    vocab_size = open_run_adapters(root / "run").condition.vocab_size
    with pytest.raises(ConfigError, match=message):
        fill_from_folder(root / "style", (), _frozen(root), _config(root, **lora), vocab_size)


def test_other_frozen_weights_are_refused(root, tmp_path):
    other = scale_backbone(write_published(tmp_path / "other", head=HEAD))
    import_release(open_source(other, None), tmp_path / "run")
    vocab_size = open_run_adapters(root / "run").condition.vocab_size
    base = FrozenBase(find_checkpoint(tmp_path / "run"), "trained", "other")
    with pytest.raises(CheckpointError, match="style: trained beside other weights than those of"):
        fill_from_folder(root / "style", (), base, _config(root), vocab_size)
