import json

import numpy as np
import pytest

from bitdance_scale.evaluation.geneval.rules import TAGS, Detection, judge
from bitdance_scale.evaluation.geneval.summary import result_line, summarise


def record(tag, index):
    return {"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": f"{tag} {index}"}


def test_the_score_is_the_mean_over_tags():
    # Of tag number n all four images of n prompts are right, and none of the others.
    results = []
    for number, tag in enumerate(TAGS):
        for index in range(5 + number):
            results += [(record(tag, index), index < number)] * 4
    summary = summarise(results)
    shares = [number / (5 + number) for number in range(6)]
    assert list(summary.tags) == list(TAGS)
    assert [estimate.value for estimate in summary.tags.values()] == pytest.approx(shares)
    assert summary.score.value == pytest.approx(np.mean(shares))
    assert summary.images.value == summary.prompts.value == pytest.approx(15 / 45)
    assert summary.num_images == {tag: 4 * (5 + number) for number, tag in enumerate(TAGS)}
    assert summary.num_prompts == 45
    assert summary.missing_tags == ()


def test_a_prompt_is_correct_if_one_of_its_images_is():
    results = [(record("colors", 0), k == 2) for k in range(4)] + [(record("colors", 1), False)] * 4
    results += [(record("counting", 0), True)]
    summary = summarise(results)
    assert summary.prompts.value == pytest.approx(2 / 3)
    assert summary.images.value == pytest.approx(2 / 9)
    assert summary.score.value == pytest.approx((1 / 8 + 1) / 2)
    assert summary.missing_tags == ("single_object", "two_object", "position", "color_attr")
    with pytest.raises(ValueError, match="no images"):
        summarise([])


def test_intervals_are_those_of_prompts():
    rng = np.random.default_rng(5)
    right = rng.random(100) < 0.6
    # All four images of a prompt are alike, so that there are 100 observations and not 400.
    results = [(record("colors", index), bool(value)) for index, value in enumerate(right) for _ in range(4)]
    summary = summarise(results)
    share = right.mean()
    # The normal approximation of a binomial; the bootstrap's quantiles of 2000 are within a hundredth of it.
    half = 1.96 * np.sqrt(share * (1 - share) / 100)
    for estimate in (summary.score, summary.tags["colors"], summary.images, summary.prompts):
        assert estimate.value == pytest.approx(share)
        assert (estimate.low, estimate.high) == pytest.approx((share - half, share + half), abs=0.015)
    assert summarise(results) == summary


def test_intervals_depend_on_the_seed_alone():
    results = [(record(tag, index), index % 3 == 0) for tag in TAGS for index in range(97)]
    assert summarise(results, seed=0) == summarise(results)
    assert summarise(results, seed=1).score.value == summarise(results).score.value
    assert summarise(results, seed=1) != summarise(results)


def test_intervals_resample_prompts_within_their_tag():
    # Whatever is drawn, one tag has all right and the other none: nothing is uncertain.
    results = [(record(tag, index), tag == "colors") for tag in ("colors", "counting") for index in range(10)]
    assert summarise(results).images == summarise(results).score
    assert summarise(results).score.low == summarise(results).score.high == 0.5


def test_lines_of_results_are_the_published_ones():
    line = record("colors", 0) | {"include": [{"class": "dog", "count": 2}]}
    verdict = judge(line, {"dog": [Detection((1, 2, 3, 4), 0.75)], "cat": [Detection((0, 0, 9, 9), 0.1)]}, None)
    assert result_line("00000/samples/0000.png", line, verdict) == {
        "filename": "00000/samples/0000.png",
        "tag": "colors",
        "prompt": "colors 0",
        "correct": False,
        "reason": "expected 2 x dog, found 1",
        "metadata": json.dumps(line),
        "details": '{"dog": [[1, 2, 3, 4, 0.75]]}',
    }
