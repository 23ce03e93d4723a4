"""What a change of each setting means to a run that goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from bitdance_scale.config.load import dump_toml, load_config
from bitdance_scale.config.resuming import (
    EFFECTS,
    TOKENIZER_EFFECTS,
    Change,
    Effect,
    changes,
    changes_losses,
    effect_of,
    settings,
)
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.train.start_checks import SAME_SETTINGS


@pytest.fixture
def config(config_path: Path):
    return load_config(config_path)


def tokenizer() -> TokenizerConfig:
    return load_config("demo_tokenizer", schema=TokenizerConfig)


def tokenizer_with_steps(config: TokenizerConfig, steps: int) -> TokenizerConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, steps=steps))


def check_table(tree: object, effects: Mapping[str, Effect]) -> None:
    names = [name for name, _, _ in settings(tree)]
    used = {name if name in effects else f"{name.rpartition('.')[0]}.*" for name in names}
    for name in names:
        effect_of(name, effects)
    assert used == effects.keys(), "the table names what is no setting"


def test_every_setting_of_both_trees_has_an_effect(config):
    check_table(config, EFFECTS)
    check_table(tokenizer(), TOKENIZER_EFFECTS)


def test_what_a_start_refuses_a_resume_refuses():
    assert all(EFFECTS[f"{section}.{name}"] is Effect.FIXED for section, name in SAME_SETTINGS)


def test_the_same_configuration_has_no_changes(config):
    assert changes(dump_toml(config), config) == []
    assert changes(dump_toml(tokenizer()), tokenizer()) == []


@pytest.mark.parametrize(
    ("override", "line", "effect"),
    [
        ("optim.lr=0.0005", "optim.lr 0.0001 -> 0.0005", Effect.TOLD),
        ("optim.beta2=0.9", "optim.beta2 0.95 -> 0.9", Effect.TOLD),
        ("data.text_drop=0.5", "data.text_drop 0.1 -> 0.5", Effect.TOLD),
        ("data.image_to_text_share=0.5", "data.image_to_text_share 0.0 -> 0.5", Effect.TOLD),
        ("text.max_caption_tokens=8", "text.max_caption_tokens 32 -> 8", Effect.TOLD),
        ("vision.flip_max=0.2", "vision.flip_max 0.1 -> 0.2", Effect.TOLD),
        ("head.time_mean=0.0", "head.time_mean -0.8 -> 0.0", Effect.TOLD),
        ("loss.text_weight=1.0", "loss.text_weight 0.01 -> 1.0", Effect.TOLD),
        ("run.steps=200", "run.steps 100 -> 200", Effect.FREE),
        ("parallel.tensor=2", "parallel.tensor 1 -> 2", Effect.FREE),
        ("run.dtype=float32", 'run.dtype "bfloat16" -> "float32"', Effect.FIXED),
        ("vision.block_side=2", "vision.block_side 4 -> 2", Effect.FIXED),
        ("model.mask=causal", 'model.mask "block" -> "causal"', Effect.FIXED),
        ("data.global_batch=30", "data.global_batch 20 -> 30", Effect.BY_CONTENT),
        (
            "data.sources=[{name='a', share=1, shards=['x']}]",
            'data.sources [] -> [{ name = "a", shards = ["x"], share = 1, has_borders = false }]',
            Effect.BY_CONTENT,
        ),
    ],
)
def test_a_change_is_found_with_both_values_and_its_effect(config_path, config, override, line, effect):
    (change,) = changes(dump_toml(config), load_config(config_path, [override]))
    assert (str(change), change.effect) == (line, effect)


def test_a_tokenizer_goes_on_in_another_dtype():
    config = tokenizer()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[config.run.dtype]
    (change,) = changes(
        dump_toml(config), dataclasses.replace(config, run=dataclasses.replace(config.run, dtype=other))
    )
    assert (change.setting, change.effect) == ("run.dtype", Effect.TOLD)


def test_more_steps_are_told_where_the_rate_falls_at_the_end(config_path):
    old = load_config(config_path, ["optim.decay_steps=10"])
    (change,) = changes(dump_toml(old), load_config(config_path, ["optim.decay_steps=10", "run.steps=200"]))
    assert change.effect is Effect.TOLD
    longer = tokenizer_with_steps(tokenizer(), 10**6)
    text = dump_toml(tokenizer())
    assert [change.effect for change in changes(text, longer)] == [Effect.TOLD]
    # As an earlier version wrote it, whose rate always fell.
    assert 'schedule = "cosine"\n' in text
    constant = dataclasses.replace(longer, optim=dataclasses.replace(longer.optim, schedule="constant"))
    found = changes(text.replace('schedule = "cosine"\n', ""), constant)
    assert {change.setting: change.effect for change in found} == {
        "run.steps": Effect.TOLD,
        "optim.schedule": Effect.TOLD,
    }
    (change,) = changes(dump_toml(constant), tokenizer_with_steps(constant, 5))
    assert change.effect is Effect.FREE


def test_a_setting_that_the_checkpoint_lacks_had_its_default(config_path, config):
    old = "\n".join(line for line in dump_toml(config).splitlines() if not line.startswith(("flip_max", "block_side")))
    assert changes(old, config) == []
    (change,) = changes(old, load_config(config_path, ["vision.block_side=8"]))
    assert str(change) == "vision.block_side 4 -> 8"


def test_a_release_says_nothing_of_a_run(config):
    network = {"model", "head", "vision", "text"}
    text = dump_toml(config)
    sections = text.split("\n\n")
    kept = [part for part in sections if part.strip("[").partition("]")[0] in network]
    assert changes("[run]\nstart_from = 'x'\n" + "\n".join(kept), config) == []


def test_context_images_of_an_earlier_version_had_queries(config_path, config):
    """They stay so in a run that has described images, and do not matter in another."""
    describing = load_config(config_path, ["data.image_to_text_share=0.1"])
    for run, effect in ((config, Effect.FREE), (describing, Effect.FIXED)):
        text = dump_toml(run)
        earlier = "\n".join(line for line in text.splitlines() if not line.startswith("context = "))
        assert earlier != text.strip()
        (change,) = changes(earlier, run)
        assert (str(change), change.effect) == ('vision.context "queries" -> "plain"', effect)
    kept = load_config(config_path, ["data.image_to_text_share=0.1", "vision.context=queries"])
    assert changes(earlier, kept) == []


def test_an_open_end_of_a_filter_is_no_change(config_path, config):
    """Whether it is left out, or written as earlier versions did."""
    one_sided = load_config(config_path, ["data.filters=[{column='aspect', max=2.0}]"])
    text = dump_toml(one_sided)
    old = text.replace('column = "aspect"\n', 'column = "aspect"\nmin = -inf\n')
    assert "-inf" not in text and old != text
    earlier = config_path.with_name("earlier.toml")
    earlier.write_text(old)
    assert load_config(earlier) == one_sided
    for before in (text, old):
        assert changes(before, one_sided) == []
        (change,) = changes(before, load_config(config_path, ["data.filters=[{column='aspect', max=1.5}]"]))
        assert (change.setting, change.effect) == ("data.filters", Effect.BY_CONTENT)
        assert [change.setting for change in changes(before, config)] == ["data.filters"]


def test_a_setting_of_a_row_that_the_checkpoint_lacks_had_its_default(config_path):
    run = load_config(config_path, ["evaluate.benchmarks=[{benchmark='demo-scenes', metrics=['scenes']}]"])
    text = dump_toml(run)
    earlier = text.replace("batch_size = 8\n", "")
    assert earlier != text and changes(earlier, run) == []


@pytest.mark.parametrize(
    ("setting", "effect", "expected"),
    [
        ("loss.text_weight", Effect.TOLD, True),
        ("head.time_mean", Effect.TOLD, True),
        ("data.image_to_text_share", Effect.TOLD, True),
        ("adversarial.weight", Effect.TOLD, True),
        ("optim.lr", Effect.TOLD, False),
        ("evaluate.images", Effect.TOLD, False),
        ("data.prefetch_steps", Effect.FREE, False),
        ("data.shards", Effect.BY_CONTENT, False),
    ],
)
def test_what_makes_another_loss(setting, effect, expected):
    assert changes_losses([Change(setting, 1, 2, effect)]) is expected
    assert not changes_losses([])
