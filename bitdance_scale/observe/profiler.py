"""Traces of single steps: what the CPU and the GPU did when, and on CUDA what was allocated.

The parts of a step (`phases.py`) are ranges of the trace. On CUDA they are NVTX ranges in every step, so that Nsight
Systems shows them too; a range costs about a microsecond where nobody looks.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from bitdance_scale.atomic_files import replacing
from bitdance_scale.phases import Phase, listening

PROFILE_DIR = "profile"
MAX_ALLOCATIONS = 200_000
"""Allocations of a step that a memory snapshot holds with their stacks."""

logger = logging.getLogger(__name__)


def trace_path(run_folder: Path, step: int, rank: int) -> Path:
    """Where the trace of a step on a rank goes: Chrome's format, for chrome://tracing or Perfetto."""
    return run_folder / PROFILE_DIR / f"step_{step:06d}_rank_{rank:05d}.json.gz"


def snapshot_path(run_folder: Path, step: int, rank: int) -> Path:
    """Where the memory snapshot of a step goes, for https://pytorch.org/memory_viz."""
    return run_folder / PROFILE_DIR / f"step_{step:06d}_rank_{rank:05d}_memory.pickle"


class StepProfiler:
    """Profiles the configured steps on this rank, and names the phases of all; a context manager.

    What the profiler cannot do is warned of, and training goes on. No number of the run depends on it.

    Args:
        steps: the steps, counted from 1; none for a rank that is not profiled.
        run_folder: the run's folder.
        rank: this rank.
        is_cuda: whether the rank trains on a GPU.
    """

    def __init__(self, steps: Sequence[int], run_folder: Path, rank: int, *, is_cuda: bool) -> None:
        self._steps, self._run_folder, self._rank, self._is_cuda = frozenset(steps), run_folder, rank, is_cuda
        self._profile: torch.profiler.profile | None = None
        self._step = 0
        self._listening = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._steps or self._is_cuda:
            self._listening.enter_context(listening(self._range))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.close()
        self.end()

    def begin(self, step: int) -> None:
        """The step begins."""
        if step in self._steps:
            self._step = step
            self._try("begin", self._begin)

    def end(self) -> None:
        """The step that began last has ended; writes its trace."""
        if self._profile is not None:
            self._try("end", self._end)
            self._profile = None

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # A trace must not end a run.
            logger.warning("the profile of step %d could not %s; training goes on", self._step, what, exc_info=True)

    def _begin(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._is_cuda:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        profile = torch.profiler.profile(activities=kinds, record_shapes=True)
        profile.start()
        self._profile = profile
        if self._is_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)

    def _end(self) -> None:
        assert self._profile is not None, "a step has begun"
        if self._is_cuda:
            torch.cuda.synchronize()
        self._profile.stop()
        path = trace_path(self._run_folder, self._step, self._rank)
        try:
            with replacing(path, is_durable=False) as writing, tempfile.TemporaryDirectory(dir=path.parent) as folder:
                whole = Path(folder) / "trace.json"
                self._profile.export_chrome_trace(str(whole))
                with whole.open("rb") as source, gzip.open(writing, "wb") as target:
                    shutil.copyfileobj(source, target)
            if self._is_cuda:
                with replacing(snapshot_path(self._run_folder, self._step, self._rank), is_durable=False) as writing:
                    torch.cuda.memory._dump_snapshot(str(writing))
        finally:
            if self._is_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profile of step %d: %s", self._step, path)

    @contextlib.contextmanager
    def _range(self, kind: Phase) -> Iterator[None]:
        """A phase as a range of the trace, and of NVTX."""
        with contextlib.ExitStack() as ranges:
            if self._profile is not None:
                ranges.enter_context(torch.profiler.record_function(kind.value))
            if self._is_cuda:
                ranges.enter_context(torch.cuda.nvtx.range(kind.value))
            yield
