"""Folders as they are published, written byte by byte: JSON as text and safetensors from the format's description.

Nothing here calls the libraries that read them, so that what today's versions save is not what is tested.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.released import qwen_like, save_as_qwen3

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 32, 4, 2, 16, 48, 2
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> (dtype as in a header, shape, values)."""
_ITEM_BYTES = {"BF16": 2, "F32": 4}


def random_tensor(seed: int, *shape: int, dtype: str = "BF16") -> tuple[str, tuple[int, ...], bytes]:
    """Normal values of a tenth; bfloat16 is the upper half of a float32."""
    values = np.random.default_rng(seed).normal(0, 0.1, shape).astype("<f4")
    if dtype == "F32":
        return dtype, shape, values.tobytes()
    return dtype, shape, (values.view("<u4") >> 16).astype("<u2").tobytes()


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Eight bytes with the length of the header, the header as JSON, the values one after another."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape, values) in tensors.items():
        assert len(values) == int(np.prod(shape)) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(values)]}
        start += len(values)
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + b"".join(values for _, _, values in tensors.values())
    path.write_bytes(content)


def write_index(path: Path, weight_map: Mapping[str, str]) -> None:
    """The index beside several files."""
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def qwen3_tensors(num_rows: int, *, is_tied: bool) -> Tensors:
    """The tensors of a small Qwen3."""
    tensors = {"model.embed_tokens.weight": random_tensor(1, num_rows, HIDDEN), "model.norm.weight": _ones(HIDDEN)}
    for layer in range(LAYERS):
        prefix, seed = f"model.layers.{layer}.", 100 * (layer + 1)
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }
        for number, (name, shape) in enumerate(shapes.items()):
            tensors[f"{prefix}{name}.weight"] = random_tensor(seed + number, *shape)
        for name, size in (
            ("self_attn.q_norm", HEAD_DIM),
            ("self_attn.k_norm", HEAD_DIM),
            ("input_layernorm", HIDDEN),
            ("post_attention_layernorm", HIDDEN),
        ):
            tensors[f"{prefix}{name}.weight"] = _ones(size)
    if not is_tied:
        tensors["lm_head.weight"] = random_tensor(2, num_rows, HIDDEN)
    return tensors


def write_qwen3(folder: Path, *, is_tied: bool = True) -> Tensors:
    """A Qwen3 folder as those of Qwen are; returns its tensors. A tied one has no `lm_head.weight`."""
    folder.mkdir()
    tokenizer = qwen_like()
    save_as_qwen3(tokenizer, folder)
    num_rows = len(tokenizer) + 5
    (folder / "config.json").write_text(f"""{{
  "architectures": ["Qwen3ForCausalLM"],
  "attention_bias": false,
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "head_dim": {HEAD_DIM},
  "hidden_act": "silu",
  "hidden_size": {HIDDEN},
  "initializer_range": 0.02,
  "intermediate_size": {FFN},
  "max_position_embeddings": 40960,
  "max_window_layers": {LAYERS},
  "model_type": "qwen3",
  "num_attention_heads": {HEADS},
  "num_hidden_layers": {LAYERS},
  "num_key_value_heads": {KV_HEADS},
  "rms_norm_eps": 1e-06,
  "rope_scaling": null,
  "rope_theta": 1000000,
  "sliding_window": null,
  "tie_word_embeddings": {"true" if is_tied else "false"},
  "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0",
  "use_cache": true,
  "use_sliding_window": false,
  "vocab_size": {num_rows}
}}
""")
    tensors = qwen3_tensors(num_rows, is_tied=is_tied)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return tensors


def _ones(size: int) -> tuple[str, tuple[int, ...], bytes]:
    return "BF16", (size,), b"\x80\x3f" * size
