"""A p = 8 model that starts from a p = 4 model keeps everything that was trained, and can be exported and sampled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.config.data_schema import Resolution
from bitdance_scale.config.load import load_network
from bitdance_scale.config.schema import HeadSection
from bitdance_scale.generate.pipeline import BitDancePipeline
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config
from tests.released import write_published

HEAD = HeadSection(width=128, num_blocks=2, num_adaln=1, head_dim=32)
LAYOUTS = [
    (1, {}, "mean"),
    (2, {"tensor": 2}, "repeat"),
    (2, {"pipeline": 2}, "noise"),
    (3, {"zero_stage": 3}, "repeat"),
]


def _distill(rank: int, start_from: Path, root: Path, parallel: dict[str, object], rule: str) -> None:
    """Starts a distillation and saves it before its first step."""
    from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
    from bitdance_scale.checkpoint.run_checkpoint import TrainState, save_checkpoint
    from bitdance_scale.checkpoint.start_weights import load_start_weights
    from bitdance_scale.config.load import dump_toml
    from bitdance_scale.parallel.build import build_engine
    from bitdance_scale.parallel.topology import make_topology, start_process_group
    from bitdance_scale.sequence.tokens import load_text_tokenizer
    from bitdance_scale.train.start_checks import check_start

    start_process_group(timeout_s=120)
    network = load_network(start_from / "config.toml")
    config = dataclasses.replace(toy_config(**parallel), **vars(network))
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(
            config.run, stage="distill", start_from=str(start_from), new_queries=rule, dtype="bfloat16"
        ),
        vision=dataclasses.replace(config.vision, block_side=8),
        data=dataclasses.replace(config.data, resolutions=(Resolution(side_px=32, share=1, buckets_px=((32, 32),)),)),
    )
    topology = make_topology(config.parallel)
    text = load_text_tokenizer(config.text, 64)
    start = check_start(find_checkpoint(start_from), config)
    engine = build_engine(config, text.vocab_size, topology)
    model, optimizer = engine.model_values(), engine.optimizer_values()
    masters = {name.removeprefix("master."): v for name, v in optimizer.items() if name.startswith("master.")}
    release = load_start_weights(
        start.path, model, masters, tokenizer_digest=start.tokenizer_digest, new_queries=start.new_queries
    )
    state = TrainState(
        step=0,
        images=0,
        tokens=0,
        loader={},
        optimizer={"step": 0, "skipped_steps": 0},
        tokenizer_digest=text.digest,
        release=release,
    )
    save_checkpoint(CheckpointFolder(root, keep=1), state, model, optimizer, dump_toml(config))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[Path, Path]:
    """(published folder of 16 tokens per step, its import)."""
    folder = tmp_path_factory.mktemp("teacher")
    source = write_published(folder / "published", head=HEAD)
    import_release(open_source(source, None), folder / "imported")
    return source, folder / "imported"


@pytest.mark.parametrize(("world_size", "parallel", "rule"), LAYOUTS)
def test_the_student_starts_as_its_teacher(teacher, tmp_path, world_size, parallel, rule):
    source, imported = teacher
    run_ranks(world_size, _distill, imported, tmp_path / "run", parallel, rule)
    export_release(open_checkpoint(tmp_path / "run"), tmp_path / "out")
    for name in ("model", "vision_head", "projector", "ae"):
        wanted, found = (load_file(folder / f"{name}.safetensors") for folder in (source, tmp_path / "out"))
        assert {*wanted} == {*found}
        for key, tensor in wanted.items():
            num_rows = len(tensor)
            if key in ("model.embed_tokens.weight", "lm_head.weight"):
                assert len(found[key]) == num_rows + 48
                _check_new_rows(found[key].float(), num_rows, rule)
            else:
                assert found[key].shape == tensor.shape, key
            # The trained query tokens are the last of the old rows.
            assert torch.equal(found[key][:num_rows], tensor), key
    pipeline = BitDancePipeline.from_pretrained(tmp_path / "out")
    assert pipeline.model.text.image_tokens.block_tokens == 64
    images = pipeline("a red circle", height=64, width=32, num_inference_steps=3, output_type="np").images
    assert images.shape == (1, 64, 32, 3) and np.isfinite(images).all() and images.std() > 0.01


def _check_new_rows(table: torch.Tensor, num_old: int, rule: str) -> None:
    trained, new = table[num_old - 15 : num_old], table[num_old:]
    if rule == "repeat":
        assert torch.equal(new, trained[torch.arange(48) % 15])
    elif rule == "mean":
        distance = (new - trained.mean(dim=0)) / trained.std(dim=0, correction=0)
        # 48 x 64 numbers, stored in bfloat16.
        assert float(distance.std()) == pytest.approx(0.1, rel=0.1)
    else:
        assert float(new.std()) == pytest.approx(0.1, rel=0.1)
