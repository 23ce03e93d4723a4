"""The checks of a GPU: each is on its own, and what is known is written at once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import ROOT, Check, checks_on_cpu, checks_on_gpu, main, run_all


def check(name: str, code: str, limit_s: float = 20.0) -> Check:
    return Check(name, f"what {name} asks", ("-c", code), limit_s)


HANGS = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); import time; time.sleep(60)"


def test_a_check_that_fails_or_hangs_costs_no_other(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    checks = [
        check("says", "print('words'); print('{\"rate\": 3.5}'); print('{no json')"),
        check("fails", "raise ValueError('the reason')\n"),
        check("hangs", HANGS.format(child=child), limit_s=1.5),
        check("after", "print('still here')"),
    ]
    shown: list[str] = []
    outcomes = run_all(checks, tmp_path / "out", 1.0, shown.append)
    assert [outcome.state for outcome in outcomes] == ["passed", "failed", "killed at its limit", "passed"]
    assert outcomes[0].said == ({"rate": 3.5},)
    assert outcomes[1].exit_code == 1 and "ValueError: the reason" in outcomes[1].tail[0]
    assert outcomes[2].exit_code is None and outcomes[2].seconds < 10
    lines = (tmp_path / "out/results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == [one.name for one in checks]
    page = (tmp_path / "out/summary.md").read_text(encoding="utf-8")
    assert "| fails | what fails asks | failed |" in page and '{"rate": 3.5}' in page
    assert "still here" in (tmp_path / "out/log.txt").read_text(encoding="utf-8")
    # What the hanging check started is gone as well.
    time.sleep(4)
    assert not mark.exists()


def test_no_check_is_begun_that_the_time_does_not_allow(tmp_path):
    checks = [check("sleeps", "import time; time.sleep(1.2)", 2.0), check("long", "print(1)", 60.0)]
    outcomes = run_all(checks, tmp_path, 4.0 / 60, lambda line: None)
    assert [outcome.state for outcome in outcomes] == ["passed", "left out"]
    assert "s were left" in outcomes[1].tail[0]


def test_the_checks_fit_the_time_that_a_gpu_is_had_for():
    names = [one.name for one in checks_on_gpu(Path("out"))]
    assert len(set(names)) == len(names)
    # All limits add up to more than the time: most checks end long before theirs. The first ones must fit.
    assert sum(one.limit_s for one in checks_on_gpu(Path("out"))[:5]) <= 13 * 60


@pytest.mark.parametrize("find", [checks_on_gpu, checks_on_cpu])
def test_every_check_names_what_is_there(find):
    for one in find(Path("out")):
        for argument in one.command:
            if argument.endswith(".py"):
                assert (ROOT / argument).is_file(), argument


def test_an_unknown_check_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--only", "slices"])
    assert "must be one of environment" in capsys.readouterr().err


def test_the_command_line_says_whether_all_is_well(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_check.checks_on_cpu", lambda out: [check("one", "raise SystemExit(3)")])
    assert main(["--out", str(tmp_path), "--device", "cpu"]) == 1
