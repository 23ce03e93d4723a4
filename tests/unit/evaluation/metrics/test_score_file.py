import json

import pytest

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.score_file import Scores, find_scores, read_scores, scores_path, write_scores

SCORES = Scores(
    "geneval",
    "geneval",
    "one",
    {"benchmark": "geneval", "seed": 0},
    {"detector": "somewhere"},
    {"00001": "a photo of a bench"},
    (ImageScore("00001", 2, "colors", 1.0, {"colors": (1.0, 1.0)}, "all there: \u00e4"),),
    {"images": 0.5},
    ("a note",),
)


def test_scores_come_back_as_they_were_written(tmp_path):
    path = write_scores(tmp_path, SCORES)
    assert path == scores_path(tmp_path, "geneval")
    assert find_scores(tmp_path) == [path]
    assert read_scores(path) == SCORES


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content | {"version": 2}, "of version 1"),
        (lambda content: [content], "of version 1"),
        (lambda content: {"version": 1, "metric": "geneval"}, "is no file of scores"),
        (lambda content: content | {"images": [{"prompt_id": "1"}]}, "is no file of scores"),
        (lambda content: content | {"images": [3]}, "is no file of scores"),
        (lambda content: content | {"more": 1}, "is no file of scores"),
    ],
)
def test_other_files_are_refused(tmp_path, change, says):
    path = write_scores(tmp_path, SCORES)
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(DataError, match=says):
        read_scores(path)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    path = write_scores(tmp_path, SCORES)
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        read_scores(path)
