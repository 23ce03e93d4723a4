"""A trained network without its training: what draws and judges with the weights of a checkpoint begins here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bitdance_scale.checkpoint.run_checkpoint import check_vision, read_state
from bitdance_scale.checkpoint.start_weights import load_start_weights
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.adaptable import is_trained
from bitdance_scale.parallel.agreement import on_first_rank
from bitdance_scale.parallel.partition import ConsumedValue, ShardedValue
from bitdance_scale.parallel.still_model import StillModel
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.condition import Condition, load_condition
from bitdance_scale.train.start_checks import Start, check_start
from bitdance_scale.train.starting import check_base, find_base, of_network
from bitdance_scale.vision.tokenizer import VisionTokenizer, vision_digest


@dataclass(frozen=True)
class StillRun:
    """A trained network on this rank, with what its sequences and images are made of.

    Attributes:
        condition: what images are drawn from.
        vision: the vision tokenizer.
        model: the stages, with the weights of the checkpoint.
    """

    condition: Condition
    vision: VisionTokenizer
    model: StillModel


def load_still_run(config: RunConfig, checkpoint: Path, weights: str, topology: Topology) -> StillRun:
    """Builds the network of a run and fills it from a checkpoint, also of a run that has not finished; a collective.

    Of a run with adapters the frozen weights are those of its start.

    Args:
        config: the run, checked.
        checkpoint: where the weights are.
        weights: trained or averaged.
        topology: the ranks.

    Raises:
        BitDanceError: on all ranks: the checkpoint does not fit, does not have these weights, or is of another vision
            tokenizer.
    """
    condition = load_condition(config)
    vision = VisionTokenizer(config.vision, topology.device)
    digest = on_first_rank(lambda: vision_digest(config.vision))
    # Its own run is no start that may be forced: with another decoder, its bits are other images.
    on_first_rank(lambda: check_vision(checkpoint, read_state(checkpoint), digest))
    model = StillModel(config, condition.vocab_size, topology)
    values = model.start_values()
    run = replace(config.run, start_from_any=True)
    if config.lora.is_used:
        base = find_base(replace(config, run=run), checkpoint.absolute().parents[1], digest, checkpoint)
        on_first_rank(lambda: check_base(checkpoint, base))
        _load(base.start, of_network(values), config.run.start_weights)
        values = {name: value for name, value in values.items() if is_trained(name, config.lora)}
        start = Start(checkpoint, condition.digest, None)
    else:
        run = replace(run, start_weights=weights, start_from=str(checkpoint))
        start = on_first_rank(lambda: check_start(checkpoint, replace(config, run=run), digest))
    _load(start, values, weights)
    return StillRun(condition, vision, model)


def _load(start: Start, values: Mapping[str, ShardedValue | ConsumedValue], weights: str) -> None:
    load_start_weights(
        start.path,
        values,
        None,
        tokenizer_digest=start.tokenizer_digest,
        weights=weights,
        new_queries=start.new_queries,
        is_partial=start.is_partial,
    )
