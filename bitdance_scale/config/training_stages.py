"""The stages of training (arXiv 2602.14041 Table 4) and the rules of their order.

What a stage trains on, and for how long, is in its TOML file (`bitdance_scale/config/files/`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitdance_scale.config.rule import RuleSet
from bitdance_scale.config.schema import RunConfig

RULES = RuleSet()
NEW_QUERIES = ("repeat", "mean", "noise")


@dataclass(frozen=True)
class TrainingStage:
    """A stage of training.

    Attributes:
        label: what tables and plots call it.
        title: what it is called in words.
        follows: the stage whose weights it starts from; empty for the first.
        entry_point: the script that runs it.
        changes_block_side: whether its blocks may be larger than those of its start.
    """

    label: str
    title: str
    follows: str
    entry_point: str
    changes_block_side: bool = False


STAGES: Mapping[str, TrainingStage] = {
    "pt": TrainingStage("PT", "pretraining", "", "pipelines/pretrain.py"),
    "ct": TrainingStage("CT", "continued training", "pt", "pipelines/continue_train.py"),
    "sft": TrainingStage("SFT", "supervised fine-tuning", "ct", "pipelines/sft.py"),
    "distill": TrainingStage("distillation", "distillation", "sft", "pipelines/distill.py", changes_block_side=True),
}


@RULES.rule("run.stage", "run.start_from")
def _later_stages_start_from_weights(config: RunConfig) -> Iterator[str]:
    """`run.start_from` is set in every stage but pretraining.

    Continued training, fine-tuning and distillation go on from weights (arXiv 2602.14041 Sec. 4.3).
    """
    stage = STAGES[config.run.stage]
    if stage.follows and not config.run.start_from:
        yield (
            f"run.start_from = '': {stage.title} goes on from weights; name the run of stage {stage.follows!r} "
            "(run.start_from=runs/NAME) or an imported release"
        )


@RULES.rule("run.start_weights", "run.start_from")
def _random_weights_have_no_averages(config: RunConfig) -> Iterator[str]:
    """`run.start_weights` is averaged only with `run.start_from`.

    It chooses between the weights of the run that is started from.
    """
    if config.run.start_weights == "averaged" and not config.run.start_from:
        yield (
            "run.start_weights = 'averaged': run.start_from = '', so the run starts from random weights; name the run "
            "that it starts from (run.start_from=runs/NAME), or set run.start_weights=trained"
        )
