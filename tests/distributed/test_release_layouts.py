"""A published folder through checkpoints of any layout and back: the same bytes, tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.class_source import open_class_source
from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.pickled_files import PickledFile
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, read_state
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.config.data_schema import Resolution
from bitdance_scale.config.load import load_network
from bitdance_scale.config.schema import HeadSection
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config
from tests.released import class_file_content, write_published

# Four heads, so that four tensor-parallel ranks can share them.
HEAD = HeadSection(width=128, num_blocks=2, num_adaln=1, head_dim=32)
# (ranks, settings of `parallel`, whether the embedding is tied).
LAYOUTS = [
    (4, {"tensor": 4, "sequence_parallel": True}, False),
    (2, {"pipeline": 2}, True),
    (3, {"zero_stage": 3}, False),
    pytest.param(4, {"tensor": 2, "pipeline": 2}, False, marks=pytest.mark.large),
]


def _start(rank: int, started_from: Path, root: Path, parallel: dict[str, object], dtype: str, resumes: bool) -> int:
    """Builds the engine, takes over the weights of a checkpoint and saves them at step 0; rows padded here."""
    from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
    from bitdance_scale.checkpoint.run_checkpoint import load_checkpoint, save_checkpoint
    from bitdance_scale.checkpoint.start_weights import load_start_weights
    from bitdance_scale.config.load import dump_toml
    from bitdance_scale.parallel.build import build_engine
    from bitdance_scale.parallel.topology import make_topology, start_process_group

    start_process_group(timeout_s=120)
    path = find_checkpoint(started_from)
    network, state = load_network(path / CONFIG_NAME), read_state(path)
    config = dataclasses.replace(toy_config(**parallel), **vars(network))
    # One block of the folder's vision tokens; the split of a pipeline is by the cost of such samples.
    resolutions = (Resolution(side_px=16, share=1, buckets_px=((16, 16),)),)
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dtype=dtype),
        optim=dataclasses.replace(config.optim, average_decay=0.0 if network.model.parts.has_text else 0.9),
        data=dataclasses.replace(config.data, resolutions=resolutions),
    )
    topology = make_topology(config.parallel)
    vocab_size = open_checkpoint(path).condition.vocab_size
    engine = build_engine(config, vocab_size, topology)
    model, optimizer = engine.model_values(), engine.optimizer_values()
    digest = state.tokenizer_digest
    if resumes:
        load_checkpoint(path, model, optimizer, tokenizer_digest=digest)
        release = state.release
    else:
        prefix = "master."
        masters = {name.removeprefix(prefix): v for name, v in optimizer.items() if name.startswith(prefix)}
        release = load_start_weights(path, model, masters, tokenizer_digest=digest)
        engine.restart_averages()
    new_state = dataclasses.replace(state, release=release)
    save_checkpoint(CheckpointFolder(root, keep=1), new_state, model, optimizer, dump_toml(config))
    return engine.stages[0].padded_vocab_size - vocab_size


def _same_bytes(one: Path, other: Path) -> None:
    for name in ("model", "vision_head", "projector", "ae"):
        wanted, found = load_file(one / f"{name}.safetensors"), load_file(other / f"{name}.safetensors")
        assert {*wanted} == {*found}
        for key, tensor in wanted.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
            assert torch.equal(found[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key


def _export(where: Path, out: Path) -> Path:
    export_release(open_checkpoint(where), out)
    return out


def _published(folder: Path, is_tied: bool) -> tuple[Path, Path]:
    """(published folder, its import)."""
    source = write_published(folder / "published", is_tied=is_tied, head=HEAD)
    import_release(open_source(source, None), folder / "imported")
    return source, folder / "imported"


@pytest.mark.parametrize(("world_size", "parallel", "is_tied"), LAYOUTS)
def test_every_layout_gives_the_release_back(tmp_path, world_size, parallel, is_tied):
    """In bfloat16, where the float32 head lives on in the masters alone."""
    source, imported = _published(tmp_path, is_tied)
    padding = run_ranks(world_size, _start, imported, tmp_path / "run", parallel, "bfloat16", False)
    if parallel.get("tensor") == 4:
        assert padding[0] > 0, "no row is padded, so that none had to be dropped"
    _same_bytes(source, _export(tmp_path / "run", tmp_path / "out"))


@pytest.mark.large
def test_a_chain_of_layouts_gives_the_release_back(tmp_path):
    """Started in float32, resumed under another layout, and taken over by a bfloat16 run."""
    source, imported = _published(tmp_path, is_tied=False)
    run_ranks(4, _start, imported, tmp_path / "a", {"tensor": 4}, "float32", False)
    run_ranks(2, _start, tmp_path / "a", tmp_path / "b", {"pipeline": 2}, "float32", True)
    run_ranks(3, _start, tmp_path / "b", tmp_path / "c", {"zero_stage": 3}, "bfloat16", False)
    _same_bytes(source, _export(tmp_path / "c", tmp_path / "out"))


@pytest.mark.large
def test_a_class_conditional_file_comes_back_from_a_run_with_averages(tmp_path):
    """In bfloat16, where the float32 values live on in the masters and the averages, divided between two ranks."""
    content = class_file_content()
    torch.save({"model": content}, tmp_path / "a.pt")
    import_release(open_class_source(PickledFile(tmp_path / "a.pt")), tmp_path / "imported")
    run_ranks(2, _start, tmp_path / "imported", tmp_path / "run", {"zero_stage": 1}, "bfloat16", False)
    found = torch.load(_export(tmp_path / "run", tmp_path / "out") / "model.pt", weights_only=True)
    assert {*found} == {"model", "ema"}
    for tensors in found.values():
        assert {*tensors} == {*content}
        assert [name for name, tensor in content.items() if not torch.equal(tensors[name], tensor)] == []
