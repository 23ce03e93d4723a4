"""The life of one rank of a job of any size on a fake CUDA device: built, two steps, a checkpoint, an evaluation.

Nothing has values or memory: only shapes, dtypes, devices and the order of things are real. Numbers that the program
reads are 1. `server.py` calls `walk_here`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.fake_cuda.device import tensors_on_the_device
from tests.fake_cuda.plants import plant
from tests.fake_cuda.recording import Recorder
from tests.fake_cuda.walks import Request, SavedTensor, Walk

_NUM_STEPS = 2


# What engines import when they are built or first run, some of which brings hundreds of modules with it.
_LATE_MODULES = (
    "deepspeed.compile.backend",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_experts",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "einops._torch_specific",
    "functorch.compile",
    "megatron.core.activations",
    "torch.distributed._tools.fake_collectives",
    "torch.testing._internal.distributed.fake_pg",
)


def import_engines() -> None:
    """Imports what a walk needs; within `cuda_device`, because the engines look for CUDA then."""
    import bitdance_scale.checkpoint.staging
    import bitdance_scale.parallel.memory_estimate
    import bitdance_scale.train.evaluation
    import bitdance_scale.train.text_to_image  # noqa: F401  (all imported for the time it takes)

    for module in _LATE_MODULES:
        importlib.import_module(module)


def walk_here(recorder: Recorder, request: Request) -> Walk:
    """The walk, in this process, which becomes the rank for good."""
    from bitdance_scale.config.load import load_config
    from bitdance_scale.config.rules import check
    from bitdance_scale.parallel import fake_ranks

    config = load_config(request.config, list(request.overrides))
    check(config, request.world)
    with contextlib.ExitStack() as replaced:
        enter = replaced.enter_context
        _answer_for_other_ranks(replaced)
        topology = fake_ranks.join_fake_job(request.world, request.rank, config.parallel)
        packs = choose_packs(config, topology.data_size, request.is_uneven)
        log = enter(fake_ranks.no_memory(device_type="cuda"))
        enter(recorder)
        if request.plant:
            plant(request.plant, replaced)

        def on_literal(tensor: torch.Tensor, values: object) -> None:
            log.remember(tensor, values)
            # From memory that is not pinned.
            recorder.wait("numbers are copied to the device")

        enter(tensors_on_the_device(on_literal))
        return _Life(request, config, topology, packs, log, recorder).walk()


def choose_packs(config: Any, data_size: int, is_uneven: bool) -> list[Any]:
    """The micro-batches of every rank: as many as the first stage has in flight, and one more.

    Args:
        config: the run.
        data_size: replicas.
        is_uneven: whether they are of all lengths that occur, rather than one pack again and again.
    """
    from bitdance_scale.data.plan.synthetic_packs import typical_packs
    from bitdance_scale.parallel import memory_estimate

    in_flight = memory_estimate.num_in_flight(config.parallel, 0)
    packs, _ = memory_estimate.packs_to_run(config, data_size, in_flight)
    if not is_uneven:
        return packs
    if config.parallel.virtual_stages == 1:
        # Only virtual stages take packs in rounds of the pipeline.
        packs = packs[: max(2, in_flight + 1)]
    by_length = sorted(typical_packs(config, data_size), key=lambda pack: -pack.num_positions)
    return [by_length[place * (len(by_length) - 1) // max(len(packs) - 1, 1)] for place in range(len(packs))]


def makers_of(peak: Any) -> Counter[tuple[str, str]]:
    """Bytes at a peak by role and maker."""
    found: Counter[tuple[str, str]] = Counter()
    for storage in peak.storages:
        found[storage.role, storage.maker] += storage.nbytes
    return found


class _Life:
    """What a walk does, in order."""

    def __init__(
        self, request: Request, config: Any, topology: Any, packs: list[Any], log: Any, recorder: Recorder
    ) -> None:
        self._request, self._config, self._topology, self._packs = request, config, topology, packs
        self._log, self._recorder = log, recorder
        self._started_s = time.process_time()

    def walk(self) -> Walk:
        from bitdance_scale.parallel import memory_estimate

        log, phase, topology = self._log, self._recorder.phase, self._topology
        with phase("build"):
            engine = memory_estimate.build_logged(log, self._config, self._request.vocab, topology, is_fused=True)
        building_peak = log.peak(0, log.position).total
        held: dict[str, int] = {}
        start = log.position
        for step, batch, read_ahead in self._steps():
            start = log.position
            held = self._take_step(engine, batch, "first " if step == 0 else "", read_ahead)
        memory_estimate.assign_rest(log)
        peak, most = log.peak(start, log.position), log.most_of("activations", start)
        saved = self._save(engine) if "save" in self._request.parts else {}
        if "evaluate" in self._request.parts:
            self._evaluate(engine)
        return Walk(
            request=self._request,
            coordinates=(topology.tensor_rank, topology.data_rank, topology.pipeline_rank),
            lengths=tuple(pack.num_positions for pack in self._packs),
            num_layers=sum(len(stage.layers) for stage in engine.stages),
            device=str(topology.device),
            record=self._recorder.record,
            held=held,
            peak=peak.by_role,
            building_peak=building_peak,
            most_activations=most,
            makers=makers_of(peak),
            saved=saved,
            placements={name: located.placement for name, located in engine.parameters.items()},
            groups=self._groups(engine),
            cpu_s=time.process_time() - self._started_s,
        )

    def _steps(self) -> Iterator[tuple[int, list[Any], Callable[[], None]]]:
        """(step, its batch, what makes the next one) of the feed, which has a stream of its own."""
        if "steps" not in self._request.parts:
            return
        from bitdance_scale.train import step_feed
        from bitdance_scale.train.text_to_image import TextToImageJob

        def prepare(packs: Sequence[Any], step: int) -> list[Any]:
            job = mock.Mock(config=self._config, topology=self._topology)
            start = self._log.position
            with self._recorder.phase("inputs"):
                batch = TextToImageJob._prepare(job, packs, step)
            for storage, _ in self._log.events[start:]:
                storage.role = storage.role or "inputs"
            return batch

        read = mock.Mock(return_value=mock.Mock(packs=[mock.Mock(pack=pack) for pack in self._packs], wait_s=0.0))
        with (
            mock.patch.object(step_feed, "ThreadPoolExecutor", _Here),
            step_feed.StepFeed(read, prepare, 0, _NUM_STEPS + 1, self._topology.device) as feed,
        ):

            def read_ahead() -> None:
                with self._recorder.phase("feed"):
                    feed.read_ahead()

            for step in range(_NUM_STEPS):
                with self._recorder.phase("feed"):
                    ready = feed.take()
                yield step, ready.batch, read_ahead

    def _take_step(self, engine: Any, batch: list[Any], which: str, read_ahead: Callable[[], None]) -> dict[str, int]:
        """One step; bytes held before the update."""
        from bitdance_scale.parallel import memory_estimate
        from bitdance_scale.parallel.step import accumulate_gradients, count_targets

        memory_estimate.assign_holdings(self._log, engine)
        with self._recorder.phase(f"{which}micro-batches"):
            counts = count_targets(batch, self._topology)
            accumulate_gradients(engine, batch, counts, self._config.loss, self._topology, meanwhile=read_ahead)
        held = memory_estimate.held_before_update(self._log, engine)
        with self._recorder.phase(f"{which}optimiser"):
            engine.step(self._config.optim.lr)
        return held

    def _save(self, engine: Any) -> dict[str, SavedTensor]:
        """Stages what this rank may write of a checkpoint; what it holds."""
        from bitdance_scale.checkpoint import staging
        from bitdance_scale.checkpoint.boxes import Box
        from bitdance_scale.checkpoint.run_checkpoint import MODEL_PREFIX, OPTIMIZER_PREFIX

        values = {MODEL_PREFIX + name: value for name, value in engine.model_values().items()}
        values |= {OPTIMIZER_PREFIX + name: value for name, value in engine.optimizer_values().items()}
        boxes = {name: [Box.of_piece(piece) for piece in value.pieces] for name, value in values.items()}
        # The first rank of a job says who writes what; here every rank writes what it holds.
        with mock.patch.object(staging, "planned_boxes", lambda *_: boxes), self._recorder.phase("save"):
            stager = staging.Stager(None, self._topology.device)
            stager.prepare(values)
            stager.stage(values)
        return {
            name: SavedTensor(value.global_shape, value.dtype, tuple(boxes[name])) for name, value in values.items()
        }

    def _groups(self, engine: Any) -> tuple[tuple[str, ...], ...]:
        """Names of the parameters of the optimiser's groups."""
        from bitdance_scale.parallel.engine import decay_groups

        names = {id(located.parameter): name for name, located in engine.parameters.items()}
        groups = decay_groups(engine.parameters, self._config.optim)
        return tuple(tuple(names[id(parameter)] for parameter in group["params"]) for group in groups)

    def _evaluate(self, engine: Any) -> None:
        from bitdance_scale.train.evaluation import Evaluator

        with self._recorder.phase("evaluation"), engine.weights_of(self._config.evaluate.weights):
            Evaluator(self._config, self._packs, self._topology).evaluate(engine, 1)


class _Here:
    """An executor that runs in the calling thread, where the modes of the walk are."""

    def __init__(self, **_: Any) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


def _answer_for_other_ranks(replaced: contextlib.ExitStack) -> None:
    """Gives the answers of ranks, libraries and compilers that are not there."""
    from deepspeed.runtime.zero import utils as zero_utils

    from bitdance_scale.model import attention, initial
    from bitdance_scale.parallel import topology as topologies

    host_groups: list[Any] = []

    def host_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
        host_groups.append(dist.new_group(list(ranks), backend="fake"))
        return host_groups[-1]

    def backend(group: Any = None) -> str:
        return "gloo" if group in host_groups else "nccl"

    def compare_length(numbers: list[int]) -> None:
        with contextlib.suppress(RuntimeError):
            compared(numbers)

    def of_rank_0(numbers: list[int]) -> list[int]:
        told(numbers)
        return numbers

    # ZeRO-3 compares numbers of every rank with those of rank 0, which here are not sent.
    compared, told = zero_utils.assert_lst_len_same_as_other_ranks, zero_utils.get_lst_from_rank0
    make_flex = attention.flex_mask
    for where, name, answer in (
        (topologies, "_host_group", host_group),
        (dist, "get_backend", backend),
        (zero_utils, "assert_lst_len_same_as_other_ranks", compare_length),
        (zero_utils, "get_lst_from_rank0", of_rank_0),
        (initial, "named_generator", lambda *_: None),
        # Compiling has nothing to do with what is asked here.
        (attention, "flex_mask", functools.partial(make_flex, is_compiled=False)),
    ):
        replaced.enter_context(mock.patch.object(where, name, answer))
