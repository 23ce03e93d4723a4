"""What takes long to import is imported where it is used: on the one rank that draws or logs."""

from __future__ import annotations

import subprocess
import sys

import pytest


def imported(module: str) -> list[str]:
    """Those of the slow packages that come with a module."""
    program = f"import sys, {module}; print(*sys.modules.keys() & {{'matplotlib', 'wandb'}})"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("name", ["console", "cost", "figures", "metrics", "wandb_sink"])
def test_neither_matplotlib_nor_wandb_comes_with_what_every_rank_imports(name):
    assert imported(f"bitdance_scale.observe.{name}") == []


def test_matplotlib_does_not_come_with_the_trainer():
    # Megatron imports wandb where it is installed.
    assert "matplotlib" not in imported("bitdance_scale.train.text_to_image")
