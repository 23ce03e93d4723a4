"""Peak memory of a process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

STATUS_FILE = Path("/proc/self/status")


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has used so far, in bytes.

    On a CUDA device that is what PyTorch's allocator had in use on it; on the CPU it is the resident set of the whole
    process, libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # Not `getrusage`: on Linux its maximum includes that of the process that forked this one.
        return int(re.search(r"^VmHWM:\s+(\d+) kB$", STATUS_FILE.read_text(), re.MULTILINE)[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
