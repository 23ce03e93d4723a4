"""The command line: what is imported to answer, what is refused, and where options may stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitdance_scale.cli import config, export_release, main, tokenizer
from bitdance_scale.cli.command import CommandParser
from bitdance_scale.config.load import load_config
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.published_names import Part

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "numpy", "transformers", "megatron", "deepspeed", "matplotlib", "boto3", "wandb")
CALLS = [
    [],
    *([name] for name in main.COMMANDS),
    *(["config", name] for name in config.COMMANDS),
    *(["tokenizer", name] for name in tokenizer.COMMANDS),
]
# Answers every call in one process, and says after each what is imported.
ANSWER_ALL = """
import contextlib, io, json, sys
from bitdance_scale.cli.main import main
found = []
for call in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*call, "--help"])
    found.append([out.getvalue(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(found))
"""


def test_help_imports_nothing_heavy():
    import json

    arguments = [json.dumps(CALLS), json.dumps(HEAVY)]
    done = subprocess.run(
        [sys.executable, "-c", ANSWER_ALL, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for call, (text, heavy) in zip(CALLS, json.loads(done.stdout), strict=True):
        assert text.startswith(f"usage: {' '.join(['bitdance', *call])} "), call
        assert heavy == [], call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "bitdance: there is no command 'trian'; did you mean train?"),
        (["quite", "another"], "the commands are train, sample, caption, import"),
        (["config", "explane"], "bitdance config: there is no command 'explane'; did you mean explain?"),
        (["draw", "demo"], "command 'draw' any more; it is `bitdance evaluate draw imagenet RUN --out DIR`"),
        (["train"], "bitdance train: the following arguments are required: CONFIG;"),
        (["train", "demo", "--bogus"], "unrecognized arguments: --bogus"),
        (["train", "demo", "--nproc", "0"], "argument --nproc: 0: must be a whole number, at least 1"),
        (["train", "demo", "--nproc", "two"], "argument --nproc: two: must be a whole number"),
        (["train", "demo", "--nnodes", "2"], "--nnodes 2: name the first machine and a free port of it"),
        (["train", "demo", "--nnodes", "2", "--rdzv-endpoint", "here"], "--rdzv-endpoint here: must be HOST:PORT"),
        (["train", "demo", "--node-rank", "1"], "--node-rank 1: must be from 0 to 0 with --nnodes 1"),
        (["tokenizer", "train", "demo"], "demo: is no configuration of a tokenizer; start it with `bitdance train`"),
        (["export", "runs/nothing", "out"], "runs/nothing: no checkpoint is there"),
        (["plot", "runs/nothing", "--out", "page.png"], "runs/nothing/metrics.jsonl does not exist"),
    ],
)
def test_refusals_end_with_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_the_list_is_shown(capsys):
    assert main.main([]) == 2
    assert "train " in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    import bitdance_scale

    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitdance_scale {bitdance_scale.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "4", "demo", "a=1", "b=2"],
        ["demo", "--ranks", "4", "a=1", "b=2"],
        ["demo", "a=1", "--ranks=4", "b=2"],
    ],
)
def test_options_stand_anywhere(arguments):
    parser = CommandParser("bitdance", "")
    parser.add_config()
    parser.add_argument("--ranks", type=int)
    options = parser.parse(arguments)
    assert (options.config, options.overrides, options.ranks) == ("demo", ["a=1", "b=2"], 4)


def test_parts_of_an_export_have_their_options():
    assert list(export_release.PARTS) == list(Part)


def test_a_closed_pipe_is_no_fault():
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m bitdance_scale.cli config explain | head -1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "text-to-image training:\n" and done.stderr == ""


def test_a_parser_refuses_with_an_error():
    with pytest.raises(ConfigError, match="prog: unrecognized arguments: --no; `prog --help`"):
        CommandParser("prog", "").parse(["--no"])


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}])
def test_a_prompt_in_chinese_passes_through_any_locale(tmp_path, locale):
    command = [sys.executable, "-m", "bitdance_scale.cli.stage", "demo", 'sample.prompts=["\u732b"]', "--print-config"]
    command = [part.encode("utf-8") for part in command]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | locale, capture_output=True, check=True)
    (tmp_path / "printed.toml").write_bytes(result.stdout)
    # What the locale cannot print is an escape, which TOML reads.
    assert load_config(tmp_path / "printed.toml").sample.prompts == ("\u732b",)
