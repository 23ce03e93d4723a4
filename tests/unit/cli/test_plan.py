"""`bitdance plan`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bitdance_scale.cli.plan import main
from bitdance_scale.planning import calibration
from bitdance_scale.planning.machine import load_machine


def test_it_prints_writes_and_draws(tmp_path: Path, capsys) -> None:
    document, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["demo", "--gpus", "4", "--gpu", "a100-80", "--json", str(document), "--plot", str(picture)]
    assert main([*arguments, "--show", "2"]) == 0
    printed = capsys.readouterr().out
    assert "demo on 4 x A100 80 GB" in printed and "What to change next" in printed
    (stage,) = json.loads(document.read_text(encoding="utf-8"))
    assert stage["num_gpus"] == 4 and stage["ranked"] and stage["dropped"]
    with Image.open(picture) as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_a_run_with_adapters_is_planned(capsys) -> None:
    assert main(["finetune_demo", "--gpus", "2"]) == 0
    assert "finetune_demo on 2 x H100 80 GB" in capsys.readouterr().out


def test_a_recipe_has_all_stages(capsys) -> None:
    assert main(["demo", "--gpus", "2", "--stage", "all"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "ct_demo", "sft_demo", "distill_demo", "sum"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "needs CONFIG and --gpus N"),
        (["demo", "--gpus", "4", "--gpu", "v100"], "--gpu v100: there is no such file"),
        (["ae_d16c32", "--gpus", "32"], "trains a tokenizer"),
        (["demo", "--gpus", "4", "parallel.tensor=3", "data.global_batch=7"], "data.global_batch = 7"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message, capsys) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_calibration_writes_a_machine(tmp_path: Path, capsys, monkeypatch) -> None:
    small = calibration._Sizes(product=(64, 32, 64), moved_elements=2**14, image_px=16, message_elements=2**12)
    monkeypatch.setattr(calibration, "_CORE", small)
    file = tmp_path / "mine.toml"
    assert main(["--calibrate", str(file)]) == 0
    machine, base = load_machine(str(file)), load_machine("h100-80")
    assert machine.device == "cpu" and "--gpu" in capsys.readouterr().out
    for name in ("float32_flops", "memory_bytes_per_s", "node_bytes_per_s", "message_s", "kernel_gap_s"):
        assert getattr(machine, name).value > 0
        assert "measured by bitdance plan --calibrate" in getattr(machine, name).source
    # What cannot be measured here is kept, with its source.
    assert machine.network_bytes_per_s == base.network_bytes_per_s
