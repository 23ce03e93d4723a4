"""One interface over scorers with and without networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitdance_scale.config.benchmark_schema import RUN_METRICS
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.distributions.clip_score import clip_cosines
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage, on_device
from bitdance_scale.evaluation.picture_scorers import ScorerNetworks, load_picture_scorer
from tests.unit.evaluation.geneval.small_networks import save_clip, save_mask2former


def drawn(number: int, k: int = 0) -> DrawnImage:
    wanted = {"class": "bench", "count": 1, "color": "red"}
    record = {"tag": "colors", "include": [wanted], "prompt": "a photo of a red bench"}
    pixels = np.random.default_rng([number, k]).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return DrawnImage(Prompt(f"{number:05d}", record["prompt"], "colors", 2, record), k, pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("networks")
    return {"clip": str(save_clip(root / "clip")), "detector": str(save_mask2former(root / "detector"))}


def test_networks_are_read_once_and_moved_only_for_the_time_of_scoring(folders: dict[str, str]) -> None:
    networks = ScorerNetworks()
    scorers = [load_picture_scorer(name, networks, **folders) for name in ("geneval", "clip-score", "scenes")]
    assert scorers[0].networks[1] is scorers[1].networks[0] and scorers[2].networks == ()

    def places() -> set[str]:
        return {p.device.type for scorer in scorers for network in scorer.networks for p in network.parameters()}

    with pytest.raises(ValueError, match="broken"), on_device(scorers, torch.device("cpu")):
        assert places() == {"cpu"}
        raise ValueError("broken")
    moved = []
    for network in (networks.clip(folders["clip"]), networks.detector(folders["detector"]).network):
        network.to = lambda device, found=moved: found.append(str(device))
    with on_device(scorers, torch.device("meta")):
        assert moved == ["meta"] * 2
    assert moved == ["meta"] * 2 + ["cpu"] * 2


def test_geneval_scores_are_its_verdicts(folders: dict[str, str]) -> None:
    scorer = load_picture_scorer("geneval", ScorerNetworks(), **folders)
    images = [drawn(number, k) for number in range(2) for k in range(2)]
    scores = scorer(images)
    assert [(score.prompt_id, score.k, score.category) for score in scores] == [
        (image.prompt.id, image.k, "colors") for image in images
    ]
    for score in scores:
        assert score.parts == {"colors": (score.value, 1.0)} and bool(score.reason) == (score.value == 0.0)
    assert estimates(scores, find_metric("geneval").combine)[OVERALL].value == np.mean([s.value for s in scores])


def test_clip_scores_are_those_of_the_set(folders: dict[str, str]) -> None:
    networks = ScorerNetworks()
    scorer, images = load_picture_scorer("clip-score", networks, **folders), [drawn(number) for number in range(4)]
    found = estimates(scorer(images), find_metric("clip-score").combine)
    pixels, texts = [image.pixels for image in images], [image.prompt.text for image in images]
    cosines = clip_cosines(networks.clip(folders["clip"]), pixels, texts)
    assert found[OVERALL].value == found["colors"].value == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-6)
    assert found["cosine"].value == pytest.approx(cosines.mean(), rel=1e-6)


def test_every_metric_of_a_run_has_a_scorer(folders: dict[str, str], tmp_path: Path) -> None:
    for name in RUN_METRICS:
        load_picture_scorer(name, ScorerNetworks(), **folders)
    with pytest.raises(ConfigError, match="metric = 'distribution': is none of single pictures; must be one of scenes"):
        load_picture_scorer("distribution", ScorerNetworks())
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_picture_scorer("clip-score", ScorerNetworks(), clip=str(tmp_path))
