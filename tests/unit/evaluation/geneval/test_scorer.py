import numpy as np
import pytest

from bitdance_scale.errors import CheckpointError, DataError
from bitdance_scale.evaluation.geneval.preprocessing import Preprocessing
from bitdance_scale.evaluation.geneval.rules import COLOURS
from bitdance_scale.evaluation.geneval.scorer import load_scorer


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def asks_for(name, **more):
    return {"tag": "colors", "prompt": "p", "include": [{"class": name, "count": 1} | more]}


def test_the_whole_chain(mask2former_folder, clip_folder):
    scorer = load_scorer(str(mask2former_folder), str(clip_folder), preprocessing=Preprocessing(64, 96))
    images = [picture(48, 40, 0), picture(40, 60, 1), picture(48, 40, 2)]
    names = [next(iter(verdict.objects)) for verdict in scorer(images, [asks_for("person")] * 3)]
    records = [asks_for(name) for name in names]
    verdicts = scorer(images, records)
    assert [str(verdict) for verdict in verdicts] == ["correct"] * 3
    # A batch of one, and the same again.
    for image, record, verdict in zip(images, records, verdicts, strict=True):
        (alone,) = scorer([image], [record])
        assert (alone.correct, alone.reasons, alone.objects.keys()) == (True, (), verdict.objects.keys())
    # Of all colours CLIP sees exactly one, every time, and says which one it is instead.
    by_colour = [scorer(images[:1], [asks_for(names[0], color=colour)])[0] for colour in COLOURS]
    (seen,) = [colour for colour, verdict in zip(COLOURS, by_colour, strict=True) if verdict.correct]
    assert {str(verdict) for verdict in by_colour if not verdict.correct} == {
        f"wrong: expected 1 x {colour} {names[0]}, found 1 x {seen}" for colour in COLOURS if colour != seen
    }
    with pytest.raises(DataError, match="^record 1: tag is None"):
        scorer(images[:2], [records[0], {}])


def test_what_is_missing_is_said(clip_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"the detector: .*no_detector.*\. CLIP: .*no_clip"):
        load_scorer(str(tmp_path / "no_detector"), str(tmp_path / "no_clip"))
    with pytest.raises(CheckpointError) as refused:
        load_scorer(str(tmp_path / "no_detector"), str(clip_folder))
    assert "CLIP: " not in str(refused.value)
