"""Looks at the image from inside; run.sh starts it as the image's user."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import torch

from bitdance_scale.compilers import find_compiler
from cluster.kernel_compiler import compiler_fault

CHECKOUT = Path("/opt/bitdance")


def main() -> int:
    """Prints what the image has; an assertion says what it lacks."""
    assert os.getuid() != 0
    assert Path.cwd() == CHECKOUT
    pinned = dict(
        line.split("==") for line in (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    versions = {
        (each.metadata["Name"] or "").lower().replace("_", "-"): each.version
        for each in importlib.metadata.distributions()
    }
    others = {
        name: version
        for name, version in versions.items()
        if name in pinned and version.partition("+")[0] != pinned[name]
    }
    assert others == {}, others
    free = sorted(name for name in versions.keys() - pinned.keys())
    assert torch.version.cuda is not None
    assert compiler_fault() is None, compiler_fault()
    assert find_compiler("c++") is not None
    for library in ("libibverbs.so.1", "librdmacm.so.1"):
        ctypes.CDLL(library)
    assert shutil.which("bitdance") and shutil.which("torchrun")
    for folder in (CHECKOUT, Path("/opt/venv"), Path("/usr")):
        assert not os.access(folder, os.W_OK), folder
    for folder in (CHECKOUT / "runs", Path(os.environ["HOME"])):
        assert os.access(folder, os.W_OK), folder
    size_gib = sum(path.lstat().st_size for path in Path("/opt/venv").rglob("*")) / 2**30
    print(f"image: Python {sys.version.split()[0]}, torch {torch.__version__} with CUDA {torch.version.cuda}")
    print(f"image: {len(versions)} packages, {size_gib:.1f} GiB; not in constraints.txt: {', '.join(free)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
