"""GenEval's rules over all published lines, from detections to scores and the published summary."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark
from bitdance_scale.evaluation.geneval.rules import TAGS, Detection, judge
from bitdance_scale.evaluation.metrics.catalogue import GENEVAL
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.scoring.drawn import Drawn
from bitdance_scale.evaluation.scoring.geneval import RESULTS_NAME, GenEvalScoring
from bitdance_scale.evaluation.scoring.scoring import ScoringChoices
from tests.benchmark_data import benchmark_data

# Where the boxes of an object must be for it to be left of, ... an object in the middle.
PLACES = {"left of": (0, 400), "right of": (800, 400), "above": (400, 0), "below": (400, 800)}


def wanted(record):
    """Detections that are what a record asks for, one box per object."""
    found = {}
    for entry in record["include"]:
        relation = entry.get("position", (None,))[0]
        left, top = PLACES.get(relation, (400, 400))
        boxes = [Detection((left, top, left + 50, top + 50), 0.95)] * entry["count"]
        found.setdefault(entry["class"], []).extend(boxes)
    return found


class FromRecords:
    """In place of the networks: the first half of a prompt's images show what is asked for, the others nothing."""

    def __call__(self, images, records):
        def colour_of(record):
            return lambda name, found: [
                next(one["color"] for one in record["include"] if one["class"] == name) for _ in found
            ]

        return [
            judge(record, wanted(record) if image[0, 0, 0] else {}, colour_of(record))
            for image, record in zip(images, records, strict=True)
        ]


class Folder:
    """The first two images of every prompt are white."""

    def read(self, prompt):
        return [np.full((2, 2, 3), 255 * (k < 2), np.uint8) for k in range(prompt.num_images)]


@pytest.mark.parametrize("name", ["geneval_evaluation_metadata.jsonl", "geneval_evaluation_metadata_long.jsonl"])
def test_all_published_lines(tmp_path, name):
    benchmark = find_benchmark("geneval")
    prompts = benchmark.read(benchmark_data(name))
    drawn = Drawn(tmp_path, "ours", benchmark, {}, prompts, Folder(), None, (2, 2))
    scoring = GenEvalScoring(drawn, ScoringChoices(batch_size=7))
    scoring.scorer = FromRecords()
    scores = scoring.score()
    values = estimates(scores.images, GENEVAL.combine)
    assert {tag: values[tag].value for tag in (*TAGS, OVERALL)} == dict.fromkeys((*TAGS, OVERALL), 0.5)
    assert (len(scores.images), scores.notes) == (4 * 553, ())
    assert scores.figures == {"images": 0.5, "prompts": 1}
    lines = [json.loads(line) for line in (tmp_path / "scores" / RESULTS_NAME).read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, True, False, False] * 553
    assert [json.loads(line["metadata"]) for line in lines[::4]] == [dict(prompt.record) for prompt in prompts]
