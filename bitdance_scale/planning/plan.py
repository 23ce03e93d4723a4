"""The plan of a stage: every layout with its memory and its time, the best first, and every refusal with its reason."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from bitdance_scale.config.coerce import toml_value
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.cost import step_flops, utilisation
from bitdance_scale.parallel.stage_split import StageCosts, balanced_split, stage_costs, stage_split
from bitdance_scale.planning.adapters import rank_parameters
from bitdance_scale.planning.layouts import Dropped, candidates, check_besides_layout, refusals, with_layout
from bitdance_scale.planning.machine import Machine
from bitdance_scale.planning.parameters import RankStages, rank_stages
from bitdance_scale.planning.rank_memory import FullestPack, RankMemory, fullest_pack, rank_memory
from bitdance_scale.planning.step_time import StepTime, step_time
from bitdance_scale.planning.workload import Workload, step_lengths, typical_workload
from bitdance_scale.sequence.condition import vocab_size
from bitdance_scale.vision.tokenizer import num_elements

GIB = 2**30
DAY_S = 86_400
HOUR_S = 3_600
DOES_NOT_FIT = "What a rank needs is at most the memory of its GPU less what is reserved."
NOTHING_TO_TRAIN = "Every rank of a pipeline has something to train."
CANNOT_DIVIDE = "The global batch can be divided into packs for all replicas."


@dataclass(frozen=True)
class Prediction:
    """A legal layout.

    Attributes:
        parallel: the layout.
        split: backbone layers of every stage.
        num_replicas: data-parallel ranks.
        num_micro_batches: packs of a replica in a step.
        memory: of the fullest pipeline rank.
        fullest_rank: which that is.
        time: of a step.
        images_per_s: over all GPUs.
        mfu: model FLOPs utilisation, 0 to 1.
        stage_s: seconds of all steps of the stage.
        num_gpus: of the job.
    """

    parallel: ParallelSection
    split: tuple[int, ...]
    num_replicas: int
    num_micro_batches: int
    memory: RankMemory
    fullest_rank: int
    time: StepTime
    images_per_s: float
    mfu: float
    stage_s: float
    num_gpus: int

    @property
    def days(self) -> float:
        """Days of the stage."""
        return self.stage_s / DAY_S

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together for the stage."""
        return self.stage_s / HOUR_S * self.num_gpus


@dataclass(frozen=True)
class StagePlan:
    """All layouts of a stage on some GPUs.

    Attributes:
        config: the run as it is configured.
        machine: what it runs on.
        num_gpus: how many.
        ranked: layouts that fit, the fastest first.
        too_large: legal layouts that do not fit, with their time all the same.
        dropped: all that are not in `ranked`, with reasons.
    """

    config: RunConfig
    machine: Machine
    num_gpus: int
    ranked: list[Prediction]
    too_large: list[Prediction]
    dropped: list[Dropped]

    @property
    def configured(self) -> Prediction | None:
        """The layout that the run is configured with, if it fits."""
        return next((item for item in self.ranked if item.parallel == self.config.parallel), None)


class Planner:
    """Predicts layouts of one run; what several layouts share is computed once.

    Args:
        config: the run.
        num_gpus: of the job.
        machine: what it runs on.
        num_entries: entries of the tokenizer; None: those of the run's own, or of Qwen3's.
    """

    def __init__(self, config: RunConfig, num_gpus: int, machine: Machine, num_entries: int | None = None) -> None:
        self.config, self.num_gpus, self.machine = config, num_gpus, machine
        self.vocab_size = vocab_size(config) if num_entries is None else num_entries
        self._tokenizer_bytes = num_elements(config.vision) * 4
        self._lengths = step_lengths(config)
        self._pack = functools.cache(self._make_pack)
        self._workload = functools.cache(self._make_workload)
        self._costs = functools.cache(self._make_costs)

    def predict(self, parallel: ParallelSection) -> Prediction:
        """Memory and time of a legal layout.

        Raises:
            ConfigError: the global batch cannot be divided among its replicas.
        """
        config = with_layout(self.config, parallel)
        num_replicas = self.num_gpus // (parallel.tensor * parallel.pipeline)
        workload = self._workload(num_replicas, parallel.packs_multiple)
        pack = self._pack(num_replicas, parallel.packs_multiple)
        split = self._split(config)
        ranks = rank_stages(split, parallel.pipeline)
        memories = [self._memory(config, pack, num_replicas, stages) for stages in ranks]
        fullest = max(range(len(ranks)), key=lambda rank: memories[rank].needed)
        time = step_time(config, self.vocab_size, workload, ranks, num_replicas, self.machine)
        flops = step_flops(config, self.vocab_size, workload.counts).training
        mfu = utilisation(flops, time.total, self.num_gpus, self.machine.peak_flops(config.run.dtype))
        assert mfu is not None, "a machine has a peak"
        return Prediction(
            parallel=parallel,
            split=split,
            num_replicas=num_replicas,
            num_micro_batches=workload.num_micro_batches,
            memory=memories[fullest],
            fullest_rank=fullest,
            time=time,
            images_per_s=workload.num_images / time.total,
            mfu=mfu,
            stage_s=time.total * config.run.steps,
            num_gpus=self.num_gpus,
        )

    def idle_rank(self, parallel: ParallelSection) -> int | None:
        """The first pipeline rank of a layout on which all is frozen; None: there is none."""
        config = with_layout(self.config, parallel)
        for stages in rank_stages(self._split(config), parallel.pipeline):
            if not rank_parameters(config, self.vocab_size, stages).trained:
                return stages.rank
        return None

    def _memory(self, config: RunConfig, pack: FullestPack, num_replicas: int, stages: RankStages) -> RankMemory:
        return rank_memory(config, self.vocab_size, pack, num_replicas, stages, self._tokenizer_bytes)

    def _split(self, config: RunConfig) -> tuple[int, ...]:
        if config.parallel.pipeline_split != "auto" or config.parallel.num_stages == 1:
            return stage_split(config, self.vocab_size)
        costs = self._costs(config.parallel.recompute)
        return balanced_split(costs, config.model.num_layers, config.parallel.num_stages)

    def _make_costs(self, recompute: str) -> StageCosts:
        parallel = ParallelSection(recompute=recompute)
        return stage_costs(with_layout(self.config, parallel), self.vocab_size)

    def _make_pack(self, num_replicas: int, packs_multiple: int) -> FullestPack:
        return fullest_pack(self._of_multiple(packs_multiple), num_replicas)

    def _make_workload(self, num_replicas: int, packs_multiple: int) -> Workload:
        return typical_workload(self._of_multiple(packs_multiple), self._lengths, num_replicas)

    def _of_multiple(self, packs_multiple: int) -> RunConfig:
        """The run under a layout whose steps have a multiple of so many packs."""
        virtual = 2 if packs_multiple > 1 else 1
        return with_layout(self.config, ParallelSection(pipeline=packs_multiple, virtual_stages=virtual))


def make_plan(config: RunConfig, num_gpus: int, machine: Machine, num_entries: int | None = None) -> StagePlan:
    """Predicts every layout of a run on so many GPUs.

    Raises:
        ConfigError: no layout can make the run legal.
    """
    check_besides_layout(config)
    planner = Planner(config, num_gpus, machine, num_entries)
    ranked: list[Prediction] = []
    too_large: list[Prediction] = []
    dropped: list[Dropped] = []
    for parallel in candidates(config, num_gpus, machine.gpus_per_node):
        refused = next(refusals(with_layout(config, parallel), num_gpus), None)
        if refused is not None:
            dropped.append(refused)
            continue
        idle = planner.idle_rank(parallel)
        if idle is not None:
            dropped.append(Dropped(parallel, "illegal", NOTHING_TO_TRAIN, idle_reason(config, idle)))
            continue
        try:
            prediction = planner.predict(parallel)
        except ConfigError as error:
            dropped.append(Dropped(parallel, "batch", CANNOT_DIVIDE, str(error)))
            continue
        if prediction.memory.needed > machine.usable_bytes:
            too_large.append(prediction)
            dropped.append(Dropped(parallel, "memory", DOES_NOT_FIT, memory_reason(prediction, machine)))
        else:
            ranked.append(prediction)
    ranked.sort(key=lambda item: (item.time.total, item.memory.needed))
    return StagePlan(config, machine, num_gpus, ranked, too_large, dropped)


def idle_reason(config: RunConfig, rank: int) -> str:
    """Why a pipeline cannot have a rank on which all is frozen."""
    return (
        f"lora.targets = {toml_value(config.lora.targets)}: none of them is on rank {rank} of the pipeline, which "
        "would have nothing to train; add linears of the backbone, or set parallel.pipeline=1"
    )


def memory_reason(prediction: Prediction, machine: Machine) -> str:
    """Why a layout does not fit: what it needs, what there is, and the largest part."""
    memory = prediction.memory
    parts = {name: getattr(memory.peak, name) for name in memory.peak.__dataclass_fields__}
    name = max(parts, key=lambda part: parts[part])
    while_built = memory.building_peak > memory.peak.total
    what = "while the model is built" if while_built else f"of which {parts[name] / GIB:.1f} GiB are {name}"
    fix = _FIXES.get(name, "divide the model among more ranks") if not while_built else "raise parallel.tensor"
    return (
        f"pipeline rank {prediction.fullest_rank} needs {memory.needed / GIB:.1f} GiB, {what}, and "
        f"{machine.usable_bytes / GIB:.1f} of {machine.memory_gib.value:g} GiB are usable; {fix}"
    )


_FIXES = {
    "activations": "set parallel.recompute=full, raise parallel.tensor or lower data.max_pack_tokens",
    "gradients": "raise parallel.tensor or parallel.pipeline, or set parallel.zero_stage=2 or 3 (DeepSpeed alone)",
    "weights": "raise parallel.tensor or parallel.pipeline, or set parallel.zero_stage=3 (DeepSpeed alone)",
    "moments": "raise parallel.tensor or use more GPUs",
}


def fastest(plans: Sequence[StagePlan]) -> list[Prediction]:
    """The fastest layout of every stage.

    Raises:
        ConfigError: a stage has none.
    """
    found = []
    for plan in plans:
        if not plan.ranked:
            raise ConfigError(no_layout(plan))
        found.append(plan.ranked[0])
    return found


def no_layout(plan: StagePlan) -> str:
    """That nothing fits, and what comes closest."""
    heading = f"run {plan.config.run.name!r}: no layout of {plan.num_gpus} x {plan.machine.name} is legal and fits"
    if not plan.too_large:
        return f"{heading}; all break a rule: {plan.dropped[0].reason}"
    closest = min(plan.too_large, key=lambda item: item.memory.needed)
    return f"{heading}; closest: {memory_reason(closest, plan.machine)}. Use more GPUs or larger ones."
