"""One training run under a layout, recorded in global names; imported by the spawned ranks."""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import dataclass, field

import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.initial import draw_initial
from bitdance_scale.model.inputs import PackInputs, make_inputs
from bitdance_scale.parallel.topology import Topology, make_topology, start_process_group
from bitdance_scale.sequence.noise import pack_noise
from tests.distributed.class_toy import class_packs, class_tokens
from tests.distributed.toy import VOCAB_SIZE, lopsided_packs, toy_packs

Slices = dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]


@dataclass
class RankRecord:
    """What one rank records: losses of every step, and its slices of the first gradients and of the final weights.

    With `optim.average_decay` also its slices of the weights before and after every step, of the averages that the
    optimiser holds at the end, and of the weights that the model then has in their place.
    """

    losses: list[tuple[float, float, float]]
    grad_norms: list[float]
    gradients: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]
    weights: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]
    shapes: dict[str, tuple[int, ...]]
    history: list[Slices] = field(default_factory=list)
    averages: Slices = field(default_factory=dict)
    averaged: Slices = field(default_factory=dict)


def make_engine(config: RunConfig) -> tuple[object, Topology]:
    """The engine of the toy model on this rank."""
    start_process_group(timeout_s=120)
    topology = make_topology(config.parallel)
    from bitdance_scale.parallel.build import build_stages, engine_of

    vocab_size = VOCAB_SIZE if config.model.parts.has_text else class_tokens(config).vocab_size
    stages = build_stages(config, vocab_size, topology)
    _disturb(stages, config, topology)
    return engine_of(stages, config, topology), topology


def _disturb(stages: object, config: RunConfig, topology: Topology) -> None:
    """Moves every weight off its initial value: adaLN starts at zero, which makes the gradients before it zero."""
    from bitdance_scale.parallel.parameter_names import name_parameters
    from bitdance_scale.parallel.quantised_linears import quantised_weights

    def noise(name: str, placement: object) -> torch.Tensor:
        numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(placement.global_shape, generator=numbers) * 0.05
        return placement.local_part(whole).to(getattr(torch, config.run.dtype))

    for name, (parameter, placement) in name_parameters(stages, topology).items():
        parameter.data.add_(noise(name, placement))
    for base in quantised_weights(stages):
        whole = draw_initial(
            base.name, base.placement.global_shape, config.run.seed, config.model.init_std, topology.device
        )
        initial = base.placement.local_part(whole).to(getattr(torch, config.run.dtype))
        base.keep(initial + noise(base.name, base.placement))


def step_inputs(
    config: RunConfig, topology: Topology, num_micro: int, step: int, is_lopsided: bool = False
) -> list[PackInputs]:
    """The replica's micro-batches with the noise of the step."""
    deal = lopsided_packs if is_lopsided else toy_packs
    deal = deal if config.model.parts.has_text else class_packs
    packs = deal(topology.data_rank, topology.data_size, num_micro, config)
    num_bits = config.vision.num_bits
    noises = [pack_noise(pack, num_bits, config.run.seed, step, num_draws=config.head.diff_batch_mul) for pack in packs]
    return [make_inputs(pack, noise, config, topology.device) for pack, noise in zip(packs, noises, strict=True)]


def train(rank: int, config: RunConfig, num_micro: int, num_steps: int, is_lopsided: bool = False) -> RankRecord:
    """Runs `num_steps` optimiser steps; with `is_lopsided` on packs with very uneven targets."""
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.partition import whole_pieces
    from bitdance_scale.parallel.step import accumulate_gradients, count_targets

    record = RankRecord([], [], {}, {}, {})
    if config.optim.average_decay:
        record.history.append(_slices(engine.trained_values()))
    for step in range(num_steps):
        batch = step_inputs(config, topology, num_micro, step, is_lopsided)
        counts = count_targets(batch, topology)
        losses = accumulate_gradients(engine, batch, counts, config.loss, topology)
        record.losses.append((losses.total, losses.vision, losses.text))
        if step == 0:
            for name, (_, placement) in engine.trained.items():
                value = whole_pieces(engine.gradient(name).view(placement.local_shape), placement)
                record.gradients[name] = [(piece.offsets, piece.tensor.clone()) for piece in value.pieces]
                record.shapes[name] = value.global_shape
        record.grad_norms.append(engine.step(config.optim.lr).grad_norm)
        if config.optim.average_decay:
            record.history.append(_slices(engine.trained_values()))
    record.weights = _slices(engine.trained_values())
    if config.optim.average_decay:
        _record_averages(engine, record)
    return record


def _slices(values: dict[str, object]) -> Slices:
    return {name: [(piece.offsets, piece.tensor.clone()) for piece in value.pieces] for name, value in values.items()}


def _record_averages(engine: object, record: RankRecord) -> None:
    values, prefix = engine.optimizer_values(), "average."
    averages = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    record.averages = _slices(averages)
    held = _slices(values)
    with engine.weights_of("averaged"):
        record.averaged = _slices(engine.trained_values())
    # Everything is back, bit for bit; after an error too.
    _check_back(record.weights, held, engine)
    with contextlib.suppress(ZeroDivisionError), engine.weights_of("averaged"):
        raise ZeroDivisionError
    _check_back(record.weights, held, engine)


def _check_back(weights: Slices, held: Slices, engine: object) -> None:
    for before, after in ((weights, _slices(engine.trained_values())), (held, _slices(engine.optimizer_values()))):
        assert before.keys() == after.keys()
        for name, parts in before.items():
            for (_, part), (_, again) in zip(parts, after[name], strict=True):
                assert torch.equal(part, again), f"{name} is another after the averages were in its place"


def assemble(records: list[RankRecord], field: str | int) -> dict[str, torch.Tensor]:
    """Whole tensors from the slices of all ranks, or those of one step; every element must be covered."""
    whole: dict[str, torch.Tensor] = {}
    for record in records:
        slices = getattr(record, field) if isinstance(field, str) else record.history[field]
        for name, pieces in slices.items():
            tensor = whole.setdefault(name, torch.full(record.shapes[name], float("nan")))
            for offsets, part in pieces:
                box = tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))
                tensor[box] = part
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: some elements lie on no rank, or are not a number"
    return whole
