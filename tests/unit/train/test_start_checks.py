"""What a stage may start from."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.integrity import MANIFEST_NAME, text_digest, write_manifest
from bitdance_scale.checkpoint.release_source import NewParts, open_source
from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.config.load import load_network
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.train.start_checks import check_resume, check_start
from bitdance_scale.vision.tokenizer import vision_digest
from tests.distributed.toy import toy_config
from tests.released import HEAD, write_autoencoder, write_plain_qwen3, write_published


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    import_release(open_source(write_published(folder / "published"), None), folder / "run")
    return folder / "run"


def config_for(run: Path, stage: str, **changes: object) -> RunConfig:
    """A configuration of the network of a run that starts from it."""
    config = dataclasses.replace(toy_config(), **vars(load_network(run / "config.toml")))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, stage=stage, start_from=str(run), **changes))


def with_block_side(config: RunConfig, side: int) -> RunConfig:
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, block_side=side))


def as_run_of(released: Path, folder: Path, stage: str, step: int, steps: int) -> Path:
    """The same weights as a checkpoint of a stage's run at `step` of `steps`."""
    run = shutil.copytree(released, folder / "copy")
    path = find_checkpoint(run)
    config = (path / CONFIG_NAME).read_text()
    config = re.sub(
        r"start_from = .*", f'name = "x"\nstage = "{stage}"\nsteps = {steps}\ndtype = "float32"', config, count=1
    )
    (path / CONFIG_NAME).write_text(config)
    state = (path / "train_state.json").read_text()
    state = state.replace('"step": 0', f'"step": {step}', 1)
    state = re.sub(r'"config_sha256": "\w+"', f'"config_sha256": "{text_digest(config)}"', state)
    (path / "train_state.json").write_text(state)
    (path / MANIFEST_NAME).unlink()
    write_manifest(path)
    committed = path.with_name(f"step_{step:08d}")
    path.rename(committed)
    (committed.parent / "latest").write_text(committed.name + "\n")
    return run


@pytest.mark.parametrize("stage", ["pt", "ct", "sft", "distill"])
def test_a_release_starts_any_stage(released, stage):
    start = check_start(find_checkpoint(released), config_for(released, stage))
    assert start.new_queries is None


@pytest.mark.parametrize(("before", "stage"), [("pt", "ct"), ("ct", "sft"), ("sft", "distill"), ("sft", "sft")])
def test_a_finished_run_of_the_stage_before_starts_the_next(released, tmp_path, before, stage):
    run = as_run_of(released, tmp_path, before, step=5, steps=5)
    check_start(find_checkpoint(run), config_for(run, stage))


@pytest.mark.parametrize(
    ("before", "step", "stage", "message"),
    [
        ("pt", 5, "sft", "a run of stage 'pt'; supervised fine-tuning follows stage 'ct'"),
        ("sft", 5, "ct", "a run of stage 'sft'; continued training follows stage 'pt'"),
        ("ct", 5, "pt", "a run of stage 'ct'; pretraining is the first stage"),
        ("ct", 4, "sft", "its run of stage 'ct' is at step 4 of 5. Run it to its end"),
    ],
)
def test_other_starts_are_explained_and_can_be_forced(released, tmp_path, before, step, stage, message):
    run = as_run_of(released, tmp_path, before, step, steps=5)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_start(find_checkpoint(run), config_for(run, stage))
    assert "run.start_from_any=true" in str(caught.value)
    check_start(find_checkpoint(run), config_for(run, stage, start_from_any=True))


def test_a_qwen3_starts_pretraining_only(tmp_path):
    source = write_plain_qwen3(tmp_path / "qwen3")
    parts = NewParts(write_autoencoder(tmp_path / "ae"), head_width=HEAD.width, head_blocks=2, head_adaln=1)
    import_release(open_source(source, parts), tmp_path / "run")
    path = find_checkpoint(tmp_path / "run")
    check_start(path, config_for(tmp_path / "run", "pt"))
    with pytest.raises(ConfigError, match="a Qwen3 with an untrained head; supervised fine-tuning follows"):
        check_start(path, config_for(tmp_path / "run", "sft"))


def test_larger_blocks_are_distilled(released):
    path = find_checkpoint(released)
    queries = check_start(path, with_block_side(config_for(released, "distill"), 8)).new_queries
    assert (queries.num_trained, queries.num_new, queries.rule) == (15, 48, "repeat")
    with pytest.raises(ConfigError, match="vision.block_side = 8: .* was trained with 4; only stage distill"):
        check_start(path, with_block_side(config_for(released, "sft"), 8))
    with pytest.raises(ConfigError, match="vision.block_side = 2: .* was trained with 4"):
        check_start(path, with_block_side(config_for(released, "distill"), 2))


def test_blocks_of_one_token_have_no_query_to_derive_from(tmp_path):
    import_release(open_source(write_published(tmp_path / "published", block_side=1), None), tmp_path / "run")
    path = find_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError, match="no query token to derive new ones from; set run.new_queries=noise"):
        check_start(path, with_block_side(config_for(tmp_path / "run", "distill"), 4))
    forced = config_for(tmp_path / "run", "distill", new_queries="noise")
    assert check_start(path, with_block_side(forced, 4)).new_queries.num_new == 15


def test_another_network_is_refused(released):
    config = config_for(released, "sft")
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_size=128))
    with pytest.raises(CheckpointError, match=r"mlp.linear_fc1.weight has shape \[192, 64\], expected \[256, 64\]"):
        check_start(find_checkpoint(released), wider)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "mask", "causal"),
        ("model", "rope_base", 5e5),
        ("model", "norm_eps", 1e-5),
        ("model", "num_heads", 4),
        ("model", "num_kv_heads", 1),
        ("model", "head_dim", 8),
        ("head", "head_dim", 8),
        ("vision", "latents", "continuous"),
    ],
)
def test_settings_that_fit_the_tensors_and_change_their_meaning_are_refused(released, tmp_path, section, name, value):
    run = as_run_of(released, tmp_path, "ct", step=5, steps=5)
    path, config = find_checkpoint(run), config_for(run, "ct")
    check_resume(path, config)
    old = getattr(getattr(config, section), name)
    assert old != value
    changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})
    message = rf"{section}.{name} = {value!r}: .* was trained with {old!r}; set {section}.{name}={old}"
    for check in (check_start, check_resume):
        with pytest.raises(ConfigError, match=message):
            check(path, changed)


def test_a_run_does_not_go_on_as_another_stage(released, tmp_path):
    run = as_run_of(released, tmp_path, "ct", step=5, steps=5)
    with pytest.raises(ConfigError, match="run.stage = 'sft': .* was trained with 'ct'.*give the run another name"):
        check_resume(find_checkpoint(run), config_for(run, "sft"))


def test_changes_that_a_run_may_make_are_returned(released, tmp_path):
    run = as_run_of(released, tmp_path, "ct", step=5, steps=5)
    path, config = find_checkpoint(run), config_for(run, "ct")
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, flip_max=0.25),
        text=dataclasses.replace(config.text, max_caption_tokens=9),
        model=dataclasses.replace(config.model, attention="dense"),
    )
    assert [str(change) for change in check_resume(path, config)] == [
        "vision.flip_max 0.1 -> 0.25",
        "text.max_caption_tokens 512 -> 9",
    ]


def test_a_start_from_another_vision_tokenizer_is_refused_unless_forced(released):
    path, config = find_checkpoint(released), config_for(released, "sft")
    digest = vision_digest(config.vision)
    check_start(path, config, digest)
    with pytest.raises(CheckpointError, match="another vision tokenizer .*set \\[vision\\] as in"):
        check_start(path, config, "0" * 32)
    check_start(path, config_for(released, "sft", start_from_any=True), "0" * 32)


def test_an_import_has_no_averages_to_start_from(released):
    config = config_for(released, "pt", start_weights="averaged", start_from_any=True)
    message = r"run.start_weights = 'averaged': .* has no averaged weights. .*an import has one set.*=trained, or name"
    with pytest.raises(CheckpointError, match=message):
        check_start(find_checkpoint(released), config)
