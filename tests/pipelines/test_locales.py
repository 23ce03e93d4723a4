"""A run with a Chinese prompt under a locale that cannot say it, from its TOML to its files and what it prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bitdance_scale.config.load import load_config
from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.small_demo import small_demo

ROOT = Path(__file__).parents[2]
NAME = "en_US.ISO-8859-1"
PROMPT = "红色的圆"
CONFIG = f"""extends = "demo"
[run]
name = "locale"
[sample]
prompts = ["{PROMPT}"]
num_steps = 2
size_px = [32, 32]
"""


def narrow_locale(folder: Path) -> dict[str, str]:
    """The variables of a locale in ISO-8859-1, which is made for the test; of the C locale where it cannot be made."""
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / NAME)]
    if shutil.which("localedef") and subprocess.run(command, capture_output=True, check=False).returncode == 0:
        return {"LOCPATH": str(folder), "LC_ALL": NAME, "LANG": NAME, "PYTHONIOENCODING": "latin-1"}
    return {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}


def test_a_run_under_a_locale_that_cannot_say_its_prompt(tmp_path):
    environment = os.environ | {"PYTHONUTF8": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= narrow_locale(tmp_path)
    encoding = [sys.executable, "-c", "import locale; print(locale.getencoding())"]
    found = subprocess.run(encoding, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert found in ("ISO-8859-1", "ANSI_X3.4-1968")
    # With a byte order mark, as editors of Windows write it.
    (tmp_path / "config.toml").write_text(CONFIG, encoding="utf-8-sig")
    overrides = [part for part in small_demo(tmp_path, num_steps=1, save_every=1) if "sample.every" not in part]
    command = [sys.executable, "-m", "bitdance_scale.cli", "train", "config.toml", "--nproc", "1"]
    result = subprocess.run(
        [*command, *overrides, "sample.every_steps=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "runs" / "locale"
    assert load_config(run / "config.toml").sample.prompts == (PROMPT,)
    assert PROMPT.encode() in (run / "config.toml").read_bytes()
    assert [point.step for point in read_metrics(run / METRICS_FILE)] == [1]
    assert [*(run / "samples").iterdir()]
