"""Drawings of one model that differ in one number are lines of a sweep."""

from __future__ import annotations

from pathlib import Path

from bitdance_scale.evaluation.report.comparison import compare
from bitdance_scale.evaluation.report.scored_folder import ScoredFolder, parse_folder, read_folders
from bitdance_scale.evaluation.report.sweep import find_sweeps, panels_of
from tests.unit.evaluation.report.scored_drawings import score, score_set, write_drawing


def folders_of(*roots: Path) -> list[ScoredFolder]:
    return read_folders([parse_folder(str(root)) for root in roots])


def drawn(root: Path, **settings) -> Path:
    return score(write_drawing(root, **settings))


def test_a_sweep_has_a_line_per_model(tmp_path):
    roots = [
        drawn(tmp_path / f"{name}{steps}", name=name, sha256=name * 32, steps=steps)
        for name in ("p4", "p8")
        for steps in (50, 10, 25)
    ]
    # Other seeds, other batches and other models are no points of it.
    others = [
        drawn(tmp_path / "seed", name="p4", sha256="p4" * 32, steps=100, seed=1),
        drawn(tmp_path / "third", name="p4", sha256="c" * 64, steps=100),
        drawn(tmp_path / "batches", name="p4", sha256="p4" * 32, steps=50, batch_size=1),
    ]
    folders = folders_of(*roots, *others)
    (sweep,) = find_sweeps(folders)
    assert (sweep.benchmark, sweep.setting) == ("demo-scenes", "settings.steps")
    assert [line.label for line in sweep.lines] == ["p4", "p8"]
    for name, line in zip(("p4", "p8"), sweep.lines, strict=True):
        assert [(position, folder.name) for position, folder in line.points] == [
            (10, f"{name}10"), (25, f"{name}25"), (50, f"{name}50")
        ]  # fmt: skip
    sections = compare(folders, folders[0].name, 1)
    ((title, curves),) = panels_of(sweep, sections).items()
    assert title == "Demo scenes" and [curve.label for curve in curves] == ["p4", "p8"]
    assert list(curves[0].positions) == [10, 25, 50]
    assert list(curves[0].values) == [sections[0].results[f"p4{n}"].values["overall"].estimate for n in (10, 25, 50)]


def test_lines_of_one_model_are_told_apart_by_their_settings(tmp_path):
    roots = [
        drawn(tmp_path / f"{steps}-{guidance}", steps=steps, guidance=guidance)
        for steps in (10, 25)
        for guidance in (1.0, 3.0)
    ]
    steps, guidance = find_sweeps(folders_of(*roots))
    assert [line.label for line in steps.lines] == ["small, guidance 1.0", "small, guidance 3.0"]
    assert [line.label for line in guidance.lines] == ["small, steps 10", "small, steps 25"]
    roots = [drawn(tmp_path / f"other{n}", sha256="b" * 64, steps=n, guidance=1.0) for n in (10, 25)]
    roots += [tmp_path / "10-1.0", tmp_path / "25-1.0"]
    (sweep,) = find_sweeps(folders_of(*roots))
    assert [line.label for line in sweep.lines] == [
        f"small, weights (SHA-256) {'b' * 12}", f"small, weights (SHA-256) {'a' * 12}"
    ]  # fmt: skip


def test_values_of_whole_sets_are_drawn_without_intervals(tmp_path):
    roots = [
        score_set(write_drawing(tmp_path / f"s{steps}", steps=steps), {"FID": 10.0 / steps, "recall": 0.5})
        for steps in (10, 20)
    ]
    folders = folders_of(*roots)
    (sweep,) = find_sweeps(folders)
    panels = panels_of(sweep, compare(folders, "s10", 1))
    assert {title: list(curves[0].values) for title, curves in panels.items()} == {
        "FID": [1.0, 0.5],
        "recall": [0.5, 0.5],
    }


def test_drawings_that_are_not_known_are_no_sweep(tmp_path):
    roots = [drawn(tmp_path / f"s{steps}", steps=steps) for steps in (10, 20)]
    score(roots[1], drawing={})
    (roots[1] / "drawing.json").unlink()
    assert find_sweeps(folders_of(*roots)) == []
