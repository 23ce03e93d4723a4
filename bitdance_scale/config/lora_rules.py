"""Rules of low-rank adaptation."""

from __future__ import annotations

from collections.abc import Iterator

from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.rule import RuleSet
from bitdance_scale.config.schema import RunConfig

RULES = RuleSet()


@RULES.rule("lora.rank", "run.start_from")
def _something_to_adapt(config: RunConfig) -> Iterator[str]:
    """`lora.rank` greater than 0 goes with `run.start_from`.

    The frozen weights stay as they begin, and random ones draw nothing.
    """
    if config.lora.is_used and not config.run.start_from:
        yield (
            f"lora.rank = {config.lora.rank}: run.start_from = '', so the frozen weights would be random; name an "
            "imported release or a run (run.start_from=runs/NAME), or set lora.rank=0 to train all weights"
        )


@RULES.rule("lora")
def _only_with_a_rank(config: RunConfig) -> Iterator[str]:
    """The other settings of `lora` go with `lora.rank` greater than 0.

    Without adapters all weights are trained, those that the settings name among them.
    """
    lora, default = config.lora, LoraSection()
    for name in ("dropout", "train_projector", "train_queries", "start_from"):
        value = getattr(lora, name)
        if not lora.is_used and value != getattr(default, name):
            yield f"lora.{name} = {value!r}: lora.rank = 0, so there are no adapters; set lora.rank, such as 16"


@RULES.rule("lora.train_queries", "vision.block_side")
def _there_are_queries(config: RunConfig) -> Iterator[str]:
    """`lora.train_queries` goes with blocks of several tokens.

    Blocks of one token have no query tokens.
    """
    if config.lora.train_queries and config.vision.block_side == 1:
        yield "lora.train_queries = true: vision.block_side = 1 has no query tokens; set lora.train_queries=false"


@RULES.rule("lora.rank", "run.stage")
def _new_queries_are_trained(config: RunConfig) -> Iterator[str]:
    """Distillation with adapters trains the query tokens (`lora.train_queries`).

    It adds query tokens whose embeddings no one has trained.
    """
    if config.lora.is_used and config.run.stage == "distill" and not config.lora.train_queries:
        yield "lora.train_queries = false: stage distill adds query tokens; set lora.train_queries=true"
