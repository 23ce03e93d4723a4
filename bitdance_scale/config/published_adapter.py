"""The `adapter_config.json` of a folder of adapters, as PEFT writes and reads it.

Only plain LoRA changes a linear by scale * B A alone. What else PEFT can keep in such a folder is refused by its key:
whoever passed it over would compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.published_backbone import is_number
from bitdance_scale.errors import CheckpointError
from bitdance_scale.wording import first_few

ADAPTER_CONFIG_NAME = "adapter_config.json"
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
# Keys with no influence on what trained matrices compute: where they came from, how they began, how they were trained.
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    }
)
_READ = frozenset(
    {"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
)
# Beginnings that leave the weights of the base as they are.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
_REASONS: Mapping[str, str] = {
    "use_dora": "DoRA also scales the weights",
    "lora_bias": "its B matrices have biases",
    "modules_to_save": "it has whole modules beside the adapters",
    "trainable_token_indices": "it changes embeddings of tokens",
    "target_parameters": "it changes parameters that are no linears",
    "layer_replication": "it is of a model with copied layers",
    "fan_in_fan_out": "its weights are transposed",
}


@dataclass(frozen=True)
class AdapterScales:
    """What an `adapter_config.json` says of the matrices.

    Attributes:
        rank: of all but those of `rank_pattern`.
        alpha: likewise.
        rank_stabilized: whether the scale falls with the square root of the rank.
        rank_pattern: end of a linear's name, as a regular expression -> its rank; the first that matches counts.
        alpha_pattern: the same of alpha.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, name: str) -> int:
        """Rank of the adapter of a linear."""
        return _matched(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What the product of the matrices of a linear is multiplied by."""
        section = LoraSection(
            rank=self.rank_of(name),
            alpha=_matched(self.alpha_pattern, name, self.alpha),
            rank_stabilized=self.rank_stabilized,
        )
        return section.scale


def published_adapter(section: LoraSection, base: str, names: Sequence[str], num_layers: int) -> dict[str, Any]:
    """The content of an `adapter_config.json`.

    Args:
        section: the adapters.
        base: name or path of the base, for whoever loads them.
        names: the adapted linears of the backbone, such as `model.layers.3.self_attn.q_proj`; at least one.
        num_layers: layers of the backbone.
    """
    modules, layers = _targets(names)
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None if layers == [*range(num_layers)] else layers,
        "lora_alpha": int(section.alpha) if section.alpha.is_integer() else section.alpha,
        "lora_bias": False,
        "lora_dropout": section.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": section.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": modules,
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": section.rank_stabilized,
    }


def read_adapter(config: Mapping[str, Any], where: str) -> AdapterScales:
    """What an `adapter_config.json` says.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        CheckpointError: it is not of plain LoRA, or a value is not possible; names key and reason.
    """
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: peft_type = {config.get('peft_type')!r}: only adapters of type LORA are read; merge it into its "
            "base with PEFT (merge_and_unload), and import that"
        )
    problems = [
        f"{key} = {value!r}: {_REASONS.get(key, 'what it changes is not known here')}"
        for key, value in config.items()
        if key not in _INERT | _READ and value not in (None, False, {}, [], "")
    ]
    if config.get("bias", "none") != "none":
        problems.append(f"bias = {config['bias']!r}: it has biases beside the adapters")
    beginning = config.get("init_lora_weights", True)
    if beginning not in _PLAIN_BEGINNINGS:
        problems.append(f"init_lora_weights = {beginning!r}: it belongs to weights that this beginning has changed")
    problems += _faulty_values(config)
    if problems:
        raise CheckpointError(
            f"{where}: {first_few(problems)}. Only low-rank matrices are read; merge it into its base with PEFT "
            "(merge_and_unload), and import that"
        )
    return AdapterScales(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rank_stabilized=config.get("use_rslora") or False,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def _faulty_values(config: Mapping[str, Any]) -> list[str]:
    """Numbers that ranks and scales cannot have."""
    problems = []
    if not _is_rank(config.get("r")):
        problems.append(f"r = {config.get('r')!r}: must be a rank of at least 1")
    if not is_number(config.get("lora_alpha")):
        problems.append(f"lora_alpha = {config.get('lora_alpha')!r}: must be a finite number")
    if not isinstance(config.get("use_rslora") or False, bool):
        problems.append(f"use_rslora = {config['use_rslora']!r}: must be true or false")
    for key, is_legal in (("rank_pattern", _is_rank), ("alpha_pattern", is_number)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(is_legal, patterns.values())):
            problems.append(f"{key} = {patterns!r}: must say a number for each pattern")
            continue
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{key} has {pattern!r}, which is no regular expression ({error})")
    return problems


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _matched(patterns: Mapping[str, Any], name: str, usual: Any) -> Any:
    """The value of the first pattern that is a name or the end of it after a dot, as PEFT matches them."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), usual)


def _targets(names: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform`, which PEFT makes exactly these linears of."""
    linears: dict[int, set[str]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        assert match is not None, f"{name} is in no layer"
        linears.setdefault(int(match[1]), set()).add(match[2])
    kinds = {frozenset(found) for found in linears.values()}
    if len(kinds) > 1:
        # Without the beginning that a model with an output projection has and one without it lacks.
        return sorted(name.removeprefix("model.") for name in names), None
    modules = sorted(name.rpartition(".")[2] for name in next(iter(kinds)))
    return modules, sorted(linears)
