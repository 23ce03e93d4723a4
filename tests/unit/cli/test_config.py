"""`bitdance check` and `bitdance config`."""

from __future__ import annotations

import pytest

from bitdance_scale.cli.main import main
from bitdance_scale.config.kinds import load_any
from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.rules import RULES
from bitdance_scale.config.shipped import shipped_configs

NUM_RANK_RULES = 5


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_file_is_printed_and_loads_back(name, capsys, tmp_path):
    assert main(["config", "print", name]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_any(printed) == load_any(name)
    assert main(["train", name, "--print-config"]) == 0
    assert capsys.readouterr().out == printed.read_text()


def test_check_counts_the_rules(capsys):
    assert main(["check", "pt_14b"]) == 0
    assert f"all {len(RULES) - NUM_RANK_RULES} rules that do not depend on the number" in capsys.readouterr().out
    assert main(["check", "--ranks", "64", "pt_14b"]) == 0
    assert capsys.readouterr().out == f"pt_14b keeps all {len(RULES)} rules for 64 ranks\n"
    assert main(["check", "demo_tokenizer", "--ranks", "1"]) == 0
    assert "all rules of a tokenizer's training for 1 rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pt_14b", "--ranks", "6"], "their product 4 must divide the 6 ranks"),
        (["--ranks", "2", "demo", "parallel.tensor=3"], "parallel.tensor = 3"),
        (["demo_tokenizer", "--ranks", "5"], "a step of 128 x 128 px has 2 images, fewer than the 5 ranks"),
        (["demo", "run.steps=0"], "run.steps = 0: must be at least 1"),
    ],
)
def test_check_refuses(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ranks_that_are_known_are_checked_when_printing(capsys):
    assert main(["train", "pt_14b", "--print-config", "--nproc", "3", "--nnodes", "2"]) == 2
    assert "must divide the 6 ranks" in capsys.readouterr().err


def test_list_has_every_file_and_preset(capsys):
    assert main(["config", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*shipped_configs(), *PRESETS):
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), name


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "data.resolutions",
            [
                "data.resolutions  (list of tables, required)",
                "data.resolutions[].share",
                "must not be empty",
                "whole number",
            ],
        ),
        ("data.resolutions[1].share", ["data.resolutions[].share  (integer, required)", "must be at least 1"]),
        ("run.steps", ["text-to-image training:", "training of the visual tokenizer:", "must be at least 1"]),
        ("data.shards", ["(list of strings, default [])", """example: data.shards='["data/demo"]'"""]),
        ("quantiser", ["quantiser.num_groups  (integer, default 0)", "quantiser.flip_max"]),
        ("adversarial.start_step", ["adversarial.start_step  (integer, default 0)", "First step with a discriminator"]),
        ("optim.eps", ["must be at least 1.17549e-38", "default 1e-15"]),
    ],
)
def test_explain(key, expected, capsys):
    assert main(["config", "explain", key]) == 0
    printed = capsys.readouterr().out
    for part in expected:
        assert part in printed, part


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.resolution", "did you mean data.resolutions"),
        ("steps", "did you mean run.steps"),
        ("data.classes", "it is called data.resolutions since version 0.2"),
        ("zzz", "the sections are run, model, head"),
    ],
)
def test_explain_names_the_nearest(key, message, capsys):
    assert main(["config", "explain", key]) == 2
    assert message in capsys.readouterr().err


def test_explain_without_a_key_has_every_section(capsys):
    assert main(["config", "explain"]) == 0
    printed = capsys.readouterr().out
    assert "parallel.tensor  (integer, default 1)" in printed and "autoencoder.channels" in printed
