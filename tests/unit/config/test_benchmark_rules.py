"""What a run may draw and score while it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdance_scale.config.load import dump_toml, load_config
from bitdance_scale.config.rules import check
from bitdance_scale.errors import ConfigError

SCENES = 'benchmark="demo-scenes", metrics=["scenes"]'
GENEVAL = 'benchmark="geneval", metrics=["geneval"], prompts="p", detector="d", clip="c"'
WHERE = "evaluate.benchmarks[0]"


def listed(*tables: str) -> str:
    return f"evaluate.benchmarks=[{', '.join(f'{{{table}}}' for table in tables)}]"


# (tables, other overrides, what the only message must say)
CASES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "unknown": (
        ['benchmark="imagenet", metrics=["scenes"]'],
        [],
        [f"{WHERE}.benchmark = 'imagenet'", "one of geneval, dpg, oneig-en, oneig-zh, tiif, demo-scenes, demo-classes"],
    ),
    "unknown metric": (
        ['benchmark="demo-scenes", metrics=["fid"]'],
        [],
        [f"{WHERE}.metrics[0] = 'fid'", "one of scenes, style, classes, geneval, clip-score"],
    ),
    "no metric": (['benchmark="demo-scenes", metrics=[]'], [], [f"{WHERE}.metrics = ()", "must not be empty"]),
    "another's metric": (
        ['benchmark="dpg", metrics=["clip-score", "geneval"], prompts="p", clip="c", detector="d"'],
        [],
        [f"{WHERE}.metrics[1] = 'geneval': is no metric of dpg; must be one of clip-score"],
    ),
    "metric twice": (
        ['benchmark="demo-scenes", metrics=["scenes", "scenes"]'],
        [],
        [f"{WHERE}.metrics[1] = 'scenes': is there already"],
    ),
    "no prompts": (
        ['benchmark="dpg", metrics=["clip-score"], clip="c"'],
        [],
        [f"{WHERE}.prompts = '': dpg has a published file", "set it"],
    ),
    "prompts of none": ([f'{SCENES}, prompts="p"'], [], [f"{WHERE}.prompts = 'p': demo-scenes reads no file"]),
    "no network": (
        ['benchmark="geneval", metrics=["geneval"], prompts="p", clip="c"'],
        [],
        [f"{WHERE}.detector = '': the metric geneval computes with it"],
    ),
    "network of none": ([f'{SCENES}, clip="c"'], [], [f"{WHERE}.clip = 'c': none of", "['scenes']", "leave it out"]),
    "same name": (
        [SCENES, f'{SCENES}, name="demo_scenes"'],
        [],
        ["evaluate.benchmarks[1]: has the name 'demo_scenes' as one before it", "set evaluate.benchmarks[1].name"],
    ),
    "name": ([f'{SCENES}, name="../a"'], [], [f"{WHERE}.name = '../a': must be letters"]),
    "one side": ([f"{SCENES}, size_px=[64, 0]"], [], [f"{WHERE}.size_px = [64, 0]", "two sides", "[0, 0]"]),
    "blocks": ([f"{SCENES}, size_px=[64, 60]"], [], [f"{WHERE}.size_px = [64, 60]", "multiples of 16", "[64, 64]"]),
    "length": ([f"{SCENES}, size_px=[64, 1040]"], [], [f"{WHERE}.size_px = [64, 1040]", "at most 1024 px"]),
    "averages": (
        [f'{SCENES}, weights="averaged"'],
        [],
        [f"{WHERE}.weights = 'averaged': optim.average_decay = 0", "weights=trained"],
    ),
    "weights": ([f'{SCENES}, weights="best"'], [], [f"{WHERE}.weights = 'best'", "one of trained, averaged"]),
    "classes": (
        ['benchmark="demo-classes", metrics=["classes"]'],
        [],
        [f"{WHERE}.benchmark = 'demo-classes': model.family = 'text_to_image' draws prompts in words"],
    ),
    "steps": ([f"{SCENES}, every_steps=0"], [], [f"{WHERE}.every_steps = 0", "at least 1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refusal_names_setting_value_rule_and_fix(config_path: Path, case: str) -> None:
    tables, overrides, expected = CASES[case]
    with pytest.raises(ConfigError) as error:
        check(load_config(config_path, [listed(*tables), *overrides]), 1)
    (message,) = str(error.value).splitlines()[1:]
    assert all(part in message for part in expected), message


def test_legal_benchmarks_pass_and_are_written_as_tables(config_path: Path) -> None:
    own = f'{SCENES}, name="averages", weights="averaged", size_px=[32, 64]'
    config = load_config(config_path, [listed(SCENES, own, GENEVAL), "optim.average_decay=0.9"])
    check(config, 2)
    assert [benchmark.shown_name for benchmark in config.evaluate.benchmarks] == ["demo-scenes", "averages", "geneval"]
    written = config_path.with_name("written.toml")
    written.write_text(dump_toml(config))
    assert written.read_text().count("[[evaluate.benchmarks]]") == 3 and load_config(written) == config


def test_a_class_conditional_run_draws_classes_alone() -> None:
    check(load_config("class_demo", [listed('benchmark="demo-classes", metrics=["classes"], num_images=2')]), 1)
    with pytest.raises(ConfigError) as error:
        check(load_config("class_demo", [listed(f"{SCENES}, size_px=[64, 64]")]), 1)
    family, size = sorted(str(error.value).splitlines()[1:])
    assert "'demo-scenes': model.family = 'class_conditional' draws classes, not prompts; name demo-classes" in family
    assert f"{WHERE}.size_px = [64, 64]: must be [32, 32], classes.grid" in size
