import json

import pytest

from bitdance_scale.evaluation.geneval.rules import TAGS, Detection, Verdict, judge
from bitdance_scale.evaluation.geneval.summary import image_score, missing_tags, result_line, shares
from bitdance_scale.evaluation.metrics.catalogue import GENEVAL
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.metric import OVERALL


def record(tag, index):
    return {"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": f"{tag} {index}"}


def judged(results):
    """Scores of images of (record, is it correct), and the records by prompt id; equal records share an id."""
    ids, numbers, images = {}, {}, []
    for line, is_correct in results:
        name = ids.setdefault(json.dumps(line), f"{len(ids):05d}")
        k = numbers[name] = numbers.get(name, -1) + 1
        images.append(image_score(name, k, line, Verdict(is_correct, () if is_correct else ("no dog",), {})))
    return images, {name: json.loads(line) for line, name in ids.items()}


def test_the_score_is_the_mean_over_tags():
    # Of tag number n all four images of n prompts are right, and none of the others.
    results = []
    for number, tag in enumerate(TAGS):
        for index in range(5 + number):
            results += [(record(tag, index), index < number)] * 4
    images, records = judged(results)
    found = estimates(images, GENEVAL.combine)
    expected = [number / (5 + number) for number in range(6)]
    assert list(found) == [OVERALL, *TAGS]
    assert [found[tag].value for tag in TAGS] == pytest.approx(expected)
    assert found[OVERALL].value == pytest.approx(sum(expected) / 6)
    assert shares(images, records) == pytest.approx({"images": 15 / 45, "prompts": 15 / 45})
    assert missing_tags(images) == []
    assert (images[0].reason, images[-1].reason) == ("no dog", "no dog") and images[20].reason == ""


def test_a_prompt_is_correct_if_one_of_its_images_is():
    results = [(record("colors", 0), k == 2) for k in range(4)] + [(record("colors", 1), False)] * 4
    results += [(record("counting", 0), True)]
    images, records = judged(results)
    assert [(image.prompt_id, image.k) for image in images[3:6]] == [("00000", 3), ("00001", 0), ("00001", 1)]
    assert shares(images, records) == pytest.approx({"images": 2 / 9, "prompts": 2 / 3})
    assert estimates(images, GENEVAL.combine)[OVERALL].value == pytest.approx((1 / 8 + 1) / 2)
    assert missing_tags(images) == ["single_object", "two_object", "position", "color_attr"]
    # Two lines of the file with the same record are one prompt, as in the published script.
    twice = {**records, "00001": records["00000"]}
    assert shares(images, twice)["prompts"] == 1


def test_intervals_resample_prompts_within_their_tag():
    # Whatever is drawn, one tag has all right and the other none: nothing is uncertain.
    images, _ = judged((record(tag, index), tag == "colors") for tag in ("colors", "counting") for index in range(10))
    score = estimates(images, GENEVAL.combine)[OVERALL]
    assert score.value == score.low == score.high == 0.5


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
