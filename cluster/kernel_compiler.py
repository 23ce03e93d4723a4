"""Whether a node can compile kernels: Triton builds what launches them with a C compiler and Python's header."""

from __future__ import annotations

import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.compilers import find_compiler
from bitdance_scale.config.load import load_config
from bitdance_scale.errors import ConfigError

_SOURCE = "#include <Python.h>\nint version(void) { return PY_MAJOR_VERSION; }\n"
_TIMEOUT_S = 120.0


def compiles_on_cuda(path: str, settings: Sequence[str]) -> bool:
    """Whether training compiles kernels on GPUs.

    Args:
        path: of the configuration, or its name.
        settings: `section.key=value`, as for the entry points.
    """
    try:
        config = load_config(path, settings)
    except ConfigError:
        # The trainer refuses it, and says why.
        return False
    # Takes seconds to import.
    import torch

    from bitdance_scale.model.attention import uses_flex

    return config.parallel.compile or uses_flex(config.model, torch.device("cuda"))


def compiler_fault() -> str | None:
    """What a library for Python in C lacks on this machine, one line; None if one was built."""
    compiler = find_compiler("c")
    if compiler is None:
        return "neither gcc nor clang is installed, and CC is not set"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"{header} does not exist"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "version.c"
        source.write_text(_SOURCE, encoding="utf-8")
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{header.parent}", "-o", f"{folder}/version.so"]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                check=False,
                timeout=_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler} cannot be run: {error}"
    if done.returncode:
        # The first line of a compiler often says only where it is.
        lines = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines() or [""]
        return f"{compiler} ends with {done.returncode}: {lines[0].strip()}"
    return None
