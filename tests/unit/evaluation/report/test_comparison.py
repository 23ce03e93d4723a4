"""Drawings compared: values and differences as `metrics` has them, in the metric's scale, and prompts to look at."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.estimate import differences, estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.score_file import write_scores
from bitdance_scale.evaluation.report.comparison import Section, compare, prompt_scores
from bitdance_scale.evaluation.report.scored_folder import parse_folder, read_folders
from tests.unit.evaluation.report.scored_drawings import (
    image_scores,
    scene_prompts,
    scenes_scores,
    score,
    score_clip,
    score_set,
    write_drawing,
)


def sections_of(*roots: Path, baseline: str = "", num_shown: int = 4) -> list[Section]:
    folders = read_folders([parse_folder(str(root)) for root in roots])
    return compare(folders, baseline or folders[0].name, num_shown)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    first, second = (write_drawing(folder / name, sha256=name * 64) for name in ("a", "b"))
    return score(first, 0.4, seed=1), score(second, 0.8, seed=2)


def test_values_and_differences_are_those_of_the_metric(pair):
    (section,) = sections_of(*pair)
    combine = find_metric("scenes").combine
    before, after = image_scores(0.4, 1), image_scores(0.8, 2)
    for name, images in (("a", before), ("b", after)):
        values = section.results[name].values
        assert {key: value.estimate for key, value in values.items()} == estimates(images, combine)
        assert next(iter(values)) == OVERALL and values[OVERALL].num_prompts == 18 and values["colors"].num_prompts == 3
    (one,) = section.pairs
    assert (one.baseline, one.model, one.reasons) == ("a", "b", ())
    assert one.differences == differences(before, after, combine)
    assert one.differences[OVERALL].num_better > one.differences[OVERALL].num_worse
    (reverse,) = sections_of(*pair, baseline="b")[0].pairs
    assert (reverse.baseline, reverse.model) == ("b", "a")
    assert reverse.differences == differences(after, before, combine)


def test_values_differences_and_figures_have_the_metrics_scale(tmp_path):
    images = tuple(
        ImageScore(prompt.id, k, prompt.category, 0.5, {OVERALL: (1.0, 2.0)})
        for prompt in scene_prompts()
        for k in (0, 1)
    )
    better = tuple(replace(image, parts={OVERALL: (1.5, 2.0)}, value=0.75) for image in images)
    for name, found in (("a", images), ("b", better)):
        root = write_drawing(tmp_path / name)
        write_scores(root, scenes_scores(root, found, metric="text", figures={"exact": 0.25}))
    (section,) = sections_of(tmp_path / "a", tmp_path / "b")
    assert asdict(section.results["a"].values[OVERALL].estimate) == {"value": 50, "low": 50, "high": 50}
    assert section.pairs[0].differences[OVERALL].estimate.value == 25
    assert section.results["a"].figures == {"exact": 25}


def test_the_lowest_prompts_are_the_worst(pair):
    (section,) = sections_of(*pair, num_shown=5)
    prompts = prompt_scores(section.results["a"].scores)
    worst = section.results["a"].worst
    assert [one.value for one in worst] == sorted(one.value for one in prompts)[:5]
    assert all(len(one.images) == 2 and one.text for one in worst)
    # Of equal prompts those of other categories come first.
    lowest = [one for one in worst if one.value == worst[0].value]
    all_lowest = [one for one in prompts if one.value == worst[0].value]
    assert len({one.category for one in lowest}) == min(len(lowest), len({one.category for one in all_lowest}))
    assert section == sections_of(*pair, num_shown=5)[0]


def test_the_largest_differences_have_both_signs(pair):
    (section,) = sections_of(*pair, num_shown=18)
    contrasts = section.pairs[0].contrasts
    sizes = [abs(one.difference) for one in contrasts]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) > 0
    before = {one.prompt_id: one.value for one in prompt_scores(section.results["a"].scores)}
    after = {one.prompt_id: one.value for one in prompt_scores(section.results["b"].scores)}
    assert {one.model.prompt_id: one.difference for one in contrasts} == {
        key: after[key] - before[key] for key in after if after[key] != before[key]
    }
    found = section.pairs[0].differences[OVERALL]
    assert sum(one.difference > 0 for one in contrasts) == found.num_better
    assert sum(one.difference < 0 for one in contrasts) == found.num_worse


@pytest.mark.parametrize(
    ("drawn", "scored", "reason"),
    [
        ({"seed": 4}, {}, "other seed: 0 and 4"),
        ({}, {"scorer": {"reader": "another"}}, "scored otherwise: reader is 'image analysis' and 'another'"),
        ({}, {"images": image_scores(0.5)[:2], "keeps": 2}, ""),
        ({}, {"images": image_scores(0.5)[-2:]}, "no prompt is scored in both"),
    ],
)
def test_what_was_drawn_or_scored_otherwise_is_not_paired(tmp_path, drawn, scored, reason):
    keeps = scored.pop("keeps", 0)
    first, second = write_drawing(tmp_path / "a"), write_drawing(tmp_path / "b", **drawn)
    score(first, images=image_scores(0.5)[:2])
    score(second, **scored)
    (section,) = sections_of(first, second)
    (one,) = section.pairs
    assert one.reasons == ((reason,) if reason else ())
    assert bool(one.differences) == bool(keeps) and (keeps or not one.contrasts)
    assert section.results["b"].values[OVERALL].num_prompts >= 1


def test_other_prompts_and_unknown_drawings_are_not_paired(tmp_path):
    first, second = write_drawing(tmp_path / "a"), write_drawing(tmp_path / "b")
    for root in (first, second):
        score(root)
    text = (second / "drawing.json").read_text()
    (second / "drawing.json").write_text(text.replace('"prompts_sha256": "', '"prompts_sha256": "0'))
    score(second)
    assert sections_of(first, second)[0].pairs[0].reasons == ("other prompts",)
    score(second, drawing={})
    (second / "drawing.json").unlink()
    (reason,) = sections_of(first, second)[0].pairs[0].reasons
    assert reason == "what b was drawn with is not known, as there was no drawing.json"


def test_sections_are_by_benchmark_and_metric(tmp_path):
    first, second = write_drawing(tmp_path / "a"), write_drawing(tmp_path / "b")
    score_set(score_clip(score(first), 28.0), {"FID": 2.0})
    score_set(second, {"FID": 3.0, "recall": 0.5})
    sections = sections_of(first, second, baseline="b")
    assert [section.metric.name for section in sections] == ["scenes", "clip-score", "distribution"]
    assert [[*section.results] for section in sections] == [["a"], ["a"], ["a", "b"]]
    assert sections[2].figures == ["FID", "recall"] and sections[2].categories == []
    assert sections[2].pairs[0].baseline == "b"
    assert sections[2].pairs[0].reasons == ("images have no values of their own",)
    assert sections[0].pairs == ()


def test_scores_without_the_parts_of_their_metric_are_refused(tmp_path):
    root = write_drawing(tmp_path / "a")
    score(root, images=(ImageScore("00000", 0, "colors", 1.0, {"other": (1.0, 1.0)}),))
    with pytest.raises(DataError, match=r"a/scores/scenes.json: no image has what scenes is made of"):
        sections_of(root)
    score(root, images=image_scores(0.5))
    write_scores(root, scenes_scores(root, image_scores(0.5), metric="clip-score"))
    with pytest.raises(DataError, match=r"a/scores/clip-score.json: no image has what clip-score is made of"):
        sections_of(root)
