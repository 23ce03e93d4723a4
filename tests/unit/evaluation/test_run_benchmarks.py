"""The benchmarks of a run: their prompts, and what is said of files that are not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bitdance_scale.cli import stage
from bitdance_scale.config.benchmark_schema import RUN_BENCHMARKS, RUN_METRICS, TEXT_BENCHMARKS, RunBenchmark
from bitdance_scale.config.load import load_config
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.run_benchmarks import check_run_benchmarks, read_run_benchmark


def write_geneval(folder: Path) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    tags = ("single_object", "counting")
    lines = [
        {"tag": tags[number % 2], "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of {number} benches"}
        for number in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_settings_name_what_the_catalogues_have() -> None:
    assert all(find_benchmark(name).name == name for name in RUN_BENCHMARKS)
    assert {name for name in RUN_BENCHMARKS if find_benchmark(name).prompt_file} == set(TEXT_BENCHMARKS)
    for name, metric in RUN_METRICS.items():
        of = find_metric(name).benchmarks
        assert not of or set(of) == set(metric.benchmarks)


def test_prompts_are_those_of_the_benchmark(tmp_path: Path) -> None:
    section = RunBenchmark(
        benchmark="geneval", metrics=("geneval",), prompts=str(write_geneval(tmp_path)), num_prompts=4, num_images=2
    )
    prompts = read_run_benchmark(section)
    assert [prompt.category for prompt in prompts].count("counting") == 2 and len(prompts) == 4
    assert {prompt.num_images for prompt in prompts} == {2}


def test_prompts_may_be_of_some_categories() -> None:
    some = RunBenchmark(
        benchmark="demo-scenes", metrics=("scenes",), categories=("colors", "single_object"), num_prompts=10
    )
    prompts = read_run_benchmark(some)
    assert sorted(prompt.category for prompt in prompts) == ["colors"] * 5 + ["single_object"] * 5
    with pytest.raises(ConfigError, match=r"categories has 'color', 'words': must be .* of demo-scenes, .*, colors,"):
        read_run_benchmark(dataclasses.replace(some, categories=("color", "words", "colors")))


def of_run(*tables: str, config: str = "demo"):
    return load_config(config, [f"evaluate.benchmarks=[{', '.join(f'{{{table}}}' for table in tables)}]"])


def test_missing_files_are_all_named_before_a_rank_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpg.json").write_text(json.dumps({"a": "a cat"}))
    tables = (
        'benchmark="geneval", metrics=["geneval"], prompts="absent", detector="detector", clip="clip"',
        'benchmark="tiif", metrics=["clip-score"], prompts="dpg.json", clip="dpg.json"',
    )
    with pytest.raises(ConfigError) as error:
        check_run_benchmarks(of_run(*tables))
    detector, clip, prompts, other = str(error.value).splitlines()
    assert f"benchmarks[0].detector = 'detector': there is no such file or folder in {tmp_path}" in detector
    assert "hf download facebook/mask2former" in detector and "hf download openai/clip" in clip
    assert "evaluate.benchmarks[0]: absent" in prompts
    assert "evaluate.benchmarks[1]: dpg.json: holds the prompts of dpg, not of tiif" in other
    # As `bitdance train` does.
    monkeypatch.setattr(stage, "check_shipped_sets", lambda shards: None)
    with pytest.raises(ConfigError, match="detector = 'detector'"):
        stage.check_files(of_run(*tables))


def test_classes_must_be_the_demos() -> None:
    table = 'benchmark="demo-classes", metrics=["classes"]'
    check_run_benchmarks(of_run(table, config="class_demo"))
    config = load_config("class_demo", [f"evaluate.benchmarks=[{{{table}}}]", "classes.num_classes=25"])
    with pytest.raises(ConfigError, match="is of the demo's 24 classes, and this run has classes.num_classes = 25"):
        check_run_benchmarks(config)
