"""Imported once by the server that ranks are forked from: the engines take seconds to import.

Importing starts no thread and opens no process group, so forking afterwards is safe.
"""

from __future__ import annotations

import threading

import torch

from bitdance_scale.parallel.cpu import redirect_cuda_calls

redirect_cuda_calls()

import bitdance_scale.checkpoint.run_checkpoint  # noqa: E402
import bitdance_scale.parallel.build  # noqa: E402
import bitdance_scale.parallel.layout_decode  # noqa: E402
import bitdance_scale.parallel.step  # noqa: E402
import bitdance_scale.train.text_to_image  # noqa: E402, F401

# The variable that says so comes too late for a process that has imported torch.
torch.set_num_threads(1)

assert threading.active_count() == 1, f"a thread would not survive the fork: {threading.enumerate()}"
