"""Whether a run can go on from a checkpoint: a stage from another's weights, or the same run from its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.checkpoint.remote_folder import is_remote
from bitdance_scale.checkpoint.run_checkpoint import (
    CONFIG_NAME,
    TENSORS_DIR,
    TrainState,
    check_vision,
    read_run_section,
    read_state,
)
from bitdance_scale.checkpoint.start_weights import NewQueries, check_network, start_files, start_prefix
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.config.kinds import AnyConfig
from bitdance_scale.config.load import load_lora, load_network
from bitdance_scale.config.resuming import Change, Effect, changes
from bitdance_scale.config.schema import NetworkConfig, RunConfig
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.sequence.condition import load_condition

SAME_SETTINGS = (
    ("model", "family"),
    ("classes", "num_classes"),
    ("classes", "num_tokens"),
    ("classes", "grid"),
    ("model", "mask"),
    ("model", "rope_base"),
    ("model", "norm_eps"),
    ("model", "num_heads"),
    ("model", "num_kv_heads"),
    ("model", "head_dim"),
    ("head", "head_dim"),
    ("head", "kind"),
    ("vision", "order"),
    ("vision", "latents"),
)
"""Section and name of settings that change what the parameters compute without changing all of their shapes.

A start compares these and the shapes; a resume compares every setting (`config/resuming.py`)."""


@dataclass(frozen=True)
class Start:
    """A checkpoint that a stage starts from.

    Attributes:
        path: the checkpoint.
        tokenizer_digest: of the text tokenizer that it must have been trained with: the stage's, with the query tokens
            of the checkpoint's blocks.
        new_queries: query tokens that it lacks; None: none.
        is_partial: whether it was fetched from S3, with the files that a start reads.
    """

    path: Path
    tokenizer_digest: str
    new_queries: NewQueries | None
    is_partial: bool = False


def check_start(path: Path, config: RunConfig, vision_digest: str = "") -> Start:
    """Compares a checkpoint with the stage that is to start from it, reading no tensor.

    Args:
        path: the checkpoint.
        config: the stage.
        vision_digest: of its vision tokenizer; empty: not compared.

    Raises:
        ConfigError: it is of a stage that this one does not follow, of a run that has not finished, with blocks of
            another side than the stage may start from, or trained with another of `SAME_SETTINGS`.
        CheckpointError: it is damaged, of another network, without the averaged weights that it is to start from, or
            trained with another vision tokenizer, unless `run.start_from_any` is set.
    """
    is_partial = is_remote(config.run.start_from)
    weights = config.run.start_weights
    state = read_state(path, start_files(path, read_index(path / TENSORS_DIR), weights) if is_partial else None)
    network = load_network(path / CONFIG_NAME)
    _check_whole(path, config)
    if not config.run.start_from_any:
        _check_order(path, state, config)
        if vision_digest:
            check_vision(path, state, vision_digest)
    old, new = network.vision.block_side, config.vision.block_side
    if old != new and not (STAGES[config.run.stage].changes_block_side and old < new):
        raise ConfigError(
            f"vision.block_side = {new}: {path} was trained with {old}; only stage distill makes blocks larger. Set "
            f"vision.block_side={old}, or run stage distill"
        )
    if old == 1 and new > 1 and config.run.new_queries != "noise":
        raise ConfigError(
            f"run.new_queries = {config.run.new_queries!r}: {path} has blocks of one token, and so no query token to "
            "derive new ones from; set run.new_queries=noise"
        )
    _check_meaning(path, network, config)
    condition = load_condition(config, old**2)
    expected = dataclasses.replace(config.network, vision=dataclasses.replace(config.vision, block_side=old))
    index = read_index(path / TENSORS_DIR)
    check_network(path, index, expected, condition.vocab_size)
    start_prefix(path, index, weights)
    new_queries = None
    if old != new:
        new_queries = NewQueries(
            num_old_rows=condition.vocab_size,
            num_trained=old**2 - 1,
            num_new=new**2 - old**2,
            rule=config.run.new_queries,
            seed=config.run.seed,
            init_std=config.model.init_std,
        )
    return Start(path, condition.digest, new_queries, is_partial)


def check_resume(path: Path, config: AnyConfig) -> list[Change]:
    """Compares a run's own checkpoint, found whole, with the configuration that is to go on with it; reads no tensor.

    Returns:
        Changes that a run may make on its way and that change what is trained, which are to be told.

    Raises:
        ConfigError: a setting that must stay has changed; names each with both values.
        CheckpointError: the configuration of the checkpoint cannot be read.
    """
    file = path / CONFIG_NAME
    try:
        found = changes(file.read_text(encoding="utf-8"), config)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); load another checkpoint") from error
    refused = [
        f"{change.setting} = {change.new!r}: {path} was trained with {change.old!r}; set {change.setting}={change.old}"
        for change in found
        if change.effect is Effect.FIXED
    ]
    if refused:
        raise ConfigError("\n".join(refused) + f", or give the run another name (run.name = {config.run.name!r})")
    return [change for change in found if change.effect is Effect.TOLD]


def _check_whole(path: Path, config: RunConfig) -> None:
    """Refuses a checkpoint that has adapters without the weights that they change."""
    if load_lora(path / CONFIG_NAME).is_used:
        base = read_run_section(path).get("start_from", "")
        raise ConfigError(
            f"run.start_from = {config.run.start_from!r}: a run with adapters, whose checkpoints do not have the "
            f"frozen weights. To go on with its adapters, set run.start_from={base} and lora.start_from="
            f"{config.run.start_from}; otherwise export it with its adapters merged (bitdance export --merge), and "
            "import that"
        )


def _check_meaning(path: Path, network: NetworkConfig, config: RunConfig) -> None:
    """Refuses values that would fit the tensors and compute something else with them."""
    for section, name in SAME_SETTINGS:
        found, wanted = (getattr(getattr(tree, section), name) for tree in (network, config))
        if found != wanted:
            raise ConfigError(
                f"{section}.{name} = {wanted!r}: {path} was trained with {found!r}; set {section}.{name}={found}"
            )


def _check_order(path: Path, state: TrainState, config: RunConfig) -> None:
    """The stage of the checkpoint's run against the one that is to start."""
    stage = STAGES[config.run.stage]
    anyway = "or set run.start_from_any=true to start anyway"
    run = read_run_section(path)
    if "steps" not in run:
        # An import, made by no stage.
        if stage.follows and state.release.get("kind") == "Qwen3":
            raise ConfigError(
                f"run.start_from = {config.run.start_from!r}: a Qwen3 with an untrained head; {stage.title} follows "
                f"stage {stage.follows!r}. Pretrain it first ({STAGES['pt'].entry_point}), {anyway}"
            )
        return
    found, steps = run.get("stage", "pt"), run["steps"]
    # A stage may continue on other data.
    if found not in (stage.follows, config.run.stage):
        follows = f"follows stage {stage.follows!r}" if stage.follows else "is the first stage"
        raise ConfigError(
            f"run.start_from = {config.run.start_from!r}: a run of stage {found!r}; {stage.title} {follows}. Name a "
            f"run of that stage, {anyway}"
        )
    if state.step < steps:
        raise ConfigError(
            f"run.start_from = {config.run.start_from!r}: its run of stage {found!r} is at step {state.step} "
            f"of {steps}. Run it to its end, {anyway}"
        )
