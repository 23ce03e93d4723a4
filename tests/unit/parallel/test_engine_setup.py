"""The engines do not load what is not used here, and what was hidden from them is available afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

IMPORTS = """
import sys
import torch
compile_before = torch.compile
import bitdance_scale.parallel.build
import bitdance_scale.parallel.distributed_optimizer
import bitdance_scale.parallel.zero
import bitdance_scale.parallel.layout_decode
import bitdance_scale.parallel.step
"""


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_engines_are_imported_without_what_is_not_used():
    unused = ["matplotlib", "torch._dynamo", "torch._inductor.compile_fx", "transformers", "wandb"]
    assert run_python(f"{IMPORTS}\nprint([name for name in {unused} if name in sys.modules])") == "[]\n"


def test_what_was_hidden_works_afterwards():
    pytest.importorskip("wandb")
    checks = "import wandb; print(wandb.__name__, torch.compile is compile_before)"
    assert run_python(f"{IMPORTS}\n{checks}") == "wandb True\n"


def test_an_imported_package_stays():
    pytest.importorskip("wandb")
    assert run_python(f"import wandb\n{IMPORTS}\nprint(sys.modules['wandb'] is wandb)") == "True\n"


def test_warnings_of_the_engines_are_not_shown():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert "Apex" not in done.stderr and "CUDA_DEVICE_MAX_CONNECTIONS" not in done.stderr


def _builds_without_compiler(_rank: int) -> bool:
    from tests.distributed.layout_run import make_engine

    make_engine(toy_config())
    return "torch._inductor.compile_fx" not in sys.modules


def test_engines_are_built_without_the_compiler():
    assert run_ranks(1, _builds_without_compiler) == [True]
