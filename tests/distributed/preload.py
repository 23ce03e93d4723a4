"""Imported once by the server that ranks are forked from: the engines take seconds to import.

`torch._dynamo` is one of their imports: PyTorch imports it when it makes an optimiser. Importing starts no thread and
opens no process group, so forking afterwards is safe.
"""

from __future__ import annotations

import threading

import torch
import torch._dynamo

import bitdance_scale.checkpoint.run_checkpoint
import bitdance_scale.parallel.build
import bitdance_scale.parallel.distributed_optimizer
import bitdance_scale.parallel.layout_decode
import bitdance_scale.parallel.step
import bitdance_scale.parallel.zero
import bitdance_scale.train.text_to_image
import bitdance_scale.train.tokenizer  # noqa: F401  (imported for the side effect)

# OMP_NUM_THREADS comes too late for a process that has imported torch.
torch.set_num_threads(1)

assert threading.active_count() == 1, f"a thread would not survive the fork: {threading.enumerate()}"
