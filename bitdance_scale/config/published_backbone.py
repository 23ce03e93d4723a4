"""The `config.json` of a published folder as the `[model]` section, and back.

It is a plain Qwen3's, and is read as transformers reads it. `MODEL_KEYS` says of every key that Qwen3 folders have
whether it describes the network, must have one value, or changes nothing. Keys that are in no row change nothing in
transformers' Qwen3 either; `unknown_model_keys` names them for the user.

The release pins transformers 4.57, where a rotary base is `rope_theta` and a dtype `torch_dtype`; transformers 5 writes
`rope_parameters` and `dtype`. Each version silently takes a default where its own name is missing. Both names are
written, either is read, and two that disagree are refused.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from bitdance_scale.config.ranges import CONSTRAINTS
from bitdance_scale.config.schema import ModelSection
from bitdance_scale.errors import CheckpointError

MODEL_CONFIG_NAME = "config.json"
CONTEXT_KEY = "bitdance_context"
"""Says how context images were laid (`vision.context`), where it is not as in the release, whose folders lack it."""
ARCHITECTURE = "Qwen3ForCausalLM"
FULL_ATTENTION = "full_attention"

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)
# Settings of config.json with no influence on the network, and their values where no folder gave others (Qwen3's).
_INERT: Mapping[str, object] = {
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 40960,
    "pad_token_id": None,
}
# The objects that may hold the rotary base, each with its own way to name a scaling.
_ROPE_OBJECTS = ("rope_parameters", "rope_scaling")
_ROPE_TYPES = ("rope_type", "type")


class Use(enum.Enum):
    """What a key of `config.json` is to the network."""

    READ = "describes the network"
    FIXED = "must have one value, as another would change what the network computes"
    HARMLESS = "changes nothing in what the network computes"


FIXED_VALUES: Mapping[str, object] = {
    "attention_bias": False,
    "auto_map": None,
    "compression_config": None,
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "per_layer_config": None,
    "pruned_heads": None,
    "quantization_config": None,
}
"""The one value of each key that is fixed; null and an empty object say the same as a key that is missing."""

MODEL_KEYS: Mapping[str, Use] = {
    **dict.fromkeys(_SIZES, Use.READ),
    **dict.fromkeys(("architectures", "model_type", "rms_norm_eps", "tie_word_embeddings"), Use.READ),
    **dict.fromkeys(("initializer_range", "rope_theta", *_ROPE_OBJECTS), Use.READ),
    **dict.fromkeys(("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"), Use.READ),
    CONTEXT_KEY: Use.READ,
    **dict.fromkeys(FIXED_VALUES, Use.FIXED),
    **dict.fromkeys(_INERT, Use.HARMLESS),
    **dict.fromkeys(
        (
            "_attn_implementation_autoset",
            "_name_or_path",
            "add_cross_attention",
            "attention_dropout",
            "attn_implementation",
            "chunk_size_feed_forward",
            "dtype",
            "id2label",
            "is_decoder",
            "is_encoder_decoder",
            "label2id",
            "output_attentions",
            "output_hidden_states",
            "problem_type",
            "return_dict",
            "tokenizer_class",
            "torch_dtype",
            "torchscript",
            "transformers_version",
            "use_cache",
        ),
        Use.HARMLESS,
    ),
}
"""Key of `config.json` -> what it is to the network."""


def read_model(config: Mapping[str, Any], where: str) -> ModelSection:
    """The backbone that a `config.json` describes.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        CheckpointError: another architecture, a missing value, or one that changes the network in a way that is not
            supported; names key, value and a way out.
    """
    problems = [*_problems(config)]
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
    return ModelSection(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn_size=config["intermediate_size"],
        norm_eps=float(config["rms_norm_eps"]),
        rope_base=float(next(iter(_rope_bases(config).values()))),
        tie_embeddings=config["tie_word_embeddings"],
        init_std=float(config.get("initializer_range", 0.02)),
    )


def read_context(config: Mapping[str, Any]) -> str:
    """How the model of a `config.json` that `read_model` has checked reads context images, as `vision.context`."""
    return str(config.get(CONTEXT_KEY, "plain"))


def published_model(
    section: ModelSection, vocab_size: int, dtype: str, inert: Mapping[str, Any], context: str = "plain"
) -> dict[str, Any]:
    """The `config.json` of a backbone, for transformers 4.57 and 5 alike.

    Args:
        section: its sizes.
        vocab_size: rows of the embedding.
        dtype: name of the dtype of its tensors.
        inert: values of the keys without influence, from `inert_model_settings`.
        context: `vision.context`; the release's way is not written.
    """
    said = {} if context == "plain" else {CONTEXT_KEY: context}
    return (
        said
        | {key: inert.get(key, default) for key, default in _INERT.items()}
        | {
            "architectures": [ARCHITECTURE],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": dtype,
            "head_dim": section.head_dim,
            "hidden_act": "silu",
            "hidden_size": section.hidden_size,
            "initializer_range": section.init_std,
            "intermediate_size": section.ffn_size,
            "layer_types": [FULL_ATTENTION] * section.num_layers,
            "max_window_layers": section.num_layers,
            "model_type": "qwen3",
            "num_attention_heads": section.num_heads,
            "num_hidden_layers": section.num_layers,
            "num_key_value_heads": section.num_kv_heads,
            "rms_norm_eps": section.norm_eps,
            "rope_parameters": {"rope_theta": section.rope_base, "rope_type": "default"},
            "rope_scaling": None,
            "rope_theta": section.rope_base,
            "sliding_window": None,
            "tie_word_embeddings": section.tie_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": vocab_size,
        }
    )


def inert_model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `config.json` that change nothing in the network, to be written back as they were."""
    return {key: config[key] for key in _INERT if key in config}


def unknown_model_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of a `config.json` that are in no row of `MODEL_KEYS`; transformers' Qwen3 does not use them either."""
    return sorted({*config} - {*MODEL_KEYS})


def is_number(value: object, *, above: float = -math.inf) -> bool:
    """Whether a value of a JSON file is a finite number above a bound."""
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    architectures = config.get("architectures")
    if architectures != [ARCHITECTURE] or config.get("model_type") != "qwen3":
        yield (
            f"architectures = {architectures}, model_type = {config.get('model_type')!r}: must be [{ARCHITECTURE!r}] "
            "and 'qwen3'; only dense Qwen3 backbones are supported"
        )
        return
    for key in _SIZES:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            yield f"{key} = {value!r}: must be a positive integer"
    if not is_number(config.get("rms_norm_eps"), above=0):
        yield f"rms_norm_eps = {config.get('rms_norm_eps')!r}: must be a number above 0"
    if not is_number(config.get("initializer_range", 0.02)):
        yield f"initializer_range = {config['initializer_range']!r}: must be a number"
    if not isinstance(config.get("tie_word_embeddings"), bool):
        yield f"tie_word_embeddings = {config.get('tie_word_embeddings')!r}: must be true or false"
    context, contexts = read_context(config), CONSTRAINTS["vision.context"]
    if context not in contexts:
        yield f"{CONTEXT_KEY} = {context!r}: must be {contexts}; export the folder again"
    for key, wanted in FIXED_VALUES.items():
        value = config.get(key)
        if value not in (None, {}, wanted):
            yield f"{key} = {value!r}: must be {json.dumps(wanted)} or missing; import a backbone without it"
    yield from _window_problems(config)
    yield from _rope_problems(config)


def _window_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Layers whose attention is not full, as transformers derives them."""
    num_layers = config.get("num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is not None:
        if kinds != [FULL_ATTENTION] * len(kinds if isinstance(kinds, list) else ()):
            yield f"layer_types = {kinds!r}: only layers of {FULL_ATTENTION!r} are supported; import another backbone"
        elif len(kinds) != num_layers:
            yield f"layer_types: has {len(kinds)} entries, num_hidden_layers is {num_layers}; they must be as many"
        return
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    # The first layers see everything; Qwen3's default is 28 of them.
    num_full = config.get("max_window_layers", 28)
    if (
        window is not None
        and isinstance(num_layers, int)
        and not (isinstance(num_full, int) and num_full >= num_layers)
    ):
        yield (
            f"use_sliding_window = {config['use_sliding_window']!r}: layers from max_window_layers = {num_full!r} on "
            f"see sliding_window = {window!r} positions only; only full attention is supported, import another backbone"
        )


def _rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Rotary positions that are scaled, or whose base is not clear."""
    for place in _ROPE_OBJECTS:
        rope = config.get(place)
        if rope is not None and not isinstance(rope, Mapping):
            yield f"{place} = {rope!r}: must be an object"
            return
        # The old name of rope_type is type. Versions of transformers differ in which of two they take.
        for key, value in (rope or {}).items():
            is_plain = value is None or key == "rope_theta" or (key == "partial_rotary_factor" and value == 1)
            if not is_plain and not (key in _ROPE_TYPES and value == "default"):
                yield (
                    f"{place}.{key} = {value!r}: scaled positions are not supported, only rope_type 'default' with a "
                    f"rope_theta; if the weights were trained without it, remove {key}"
                )
    bases = _rope_bases(config)
    for place, base in bases.items():
        if not is_number(base, above=0):
            yield f"{place} = {base!r}: must be a number above 0"
            return
    if not bases:
        yield "rope_theta or rope_parameters.rope_theta: one of them must give the rotary base"
    elif len({float(base) for base in bases.values()}) > 1:
        named = " and ".join(f"{place} = {base}" for place, base in bases.items())
        yield f"{named} disagree: keep the one that was trained with"


def _rope_bases(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the names of the rotary base say, without those that say nothing."""
    places = {"rope_theta": config.get("rope_theta")}
    for place in _ROPE_OBJECTS:
        places[f"{place}.rope_theta"] = (config.get(place) or {}).get("rope_theta")
    return {place: base for place, base in places.items() if base is not None}
