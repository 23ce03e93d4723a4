"""What a machine for training has: device, driver, compilers, versions; and whether Triton compiles there.

    python benchmarks/gpu_environment.py

Prints a line of JSON. FlexAttention and compiled layers need a C compiler on every node at run time, because Triton
builds its launchers with it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys

import torch

_PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "transformers", "webdataset", "numpy")
_COMPILERS = ("cc", "gcc", "g++", "nvcc")


def version(package: str) -> str | None:
    """Of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(*command: str) -> str | None:
    """That a program says; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, timeout=30
    )
    return (done.stdout.splitlines() or [""])[0] if done.returncode == 0 else None


def device() -> dict[str, object]:
    """The first CUDA device; empty without one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "processors": properties.multi_processor_count,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
        "tf32": {
            "convolutions": torch.backends.cudnn.conv.fp32_precision,
            "products": torch.backends.cuda.matmul.fp32_precision,
        },
    }


def compiles() -> str:
    """Whether a function compiles and gives what it gives uncompiled; the reason if not."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = torch.linspace(-3, 3, 1000, device=where)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * x + 1

    try:
        found = torch.compile(function)(values)
    except Exception as error:  # noqa: BLE001  # Whatever the compiler raises is the answer.
        return f"no: {type(error).__name__}: {str(error).splitlines()[0]}"
    return "yes" if torch.allclose(found, function(values), atol=1e-5) else "no: other values"


def main() -> None:
    print(
        json.dumps(
            {
                "python": sys.version.split()[0],
                "system": platform.platform(),
                "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                "compilers": {name: first_line(name, "--version") for name in _COMPILERS},
                "packages": {name: version(name) for name in _PACKAGES},
                "device": device(),
                "compiles": compiles(),
            }
        )
    )


if __name__ == "__main__":
    main()
