"""A trained network without its training: what draws and judges with the weights of a checkpoint begins here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bitdance_scale.checkpoint.start_weights import load_start_weights
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.parallel.agreement import on_first_rank
from bitdance_scale.parallel.still_model import StillModel
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.condition import Condition, load_condition
from bitdance_scale.train.start_checks import check_start
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

    Args:
        config: the run, checked.
        checkpoint: where the weights are.
        weights: trained or averaged.
        topology: the ranks.

    Raises:
        BitDanceError: on all ranks: the checkpoint does not fit, or does not have these weights.
    """
    condition = load_condition(config)
    vision = VisionTokenizer(config.vision, topology.device)
    run = replace(config.run, start_from_any=True, start_weights=weights, start_from=str(checkpoint))
    digest = on_first_rank(lambda: vision_digest(config.vision))
    start = on_first_rank(lambda: check_start(checkpoint, replace(config, run=run), digest))
    model = StillModel(config, condition.vocab_size, topology)
    load_start_weights(checkpoint, model.model_values(), None, tokenizer_digest=start.tokenizer_digest, weights=weights)
    return StillRun(condition, vision, model)
