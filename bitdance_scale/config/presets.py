"""Network sizes by name.

They are the dense Qwen3 family (arXiv 2505.09388, published configurations), the class-conditional BitDance-B, L and H
(arXiv 2602.14041 Table 2, published release), and the demo.

A preset overrides the schema's defaults, and explicit settings override the preset. The diffusion head of every Qwen3
preset is as wide as the backbone, as in the release (arXiv 2602.14041 Sec. 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping

Preset = Mapping[str, Mapping[str, bool | int | float | str]]


def _qwen3(num_layers: int, hidden_size: int, num_heads: int, ffn_size: int, *, tie_embeddings: bool) -> Preset:
    model = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn_size": ffn_size,
        "norm_eps": 1e-6,
        "rope_base": 1e6,
        "tie_embeddings": tie_embeddings,
    }
    return {"model": model, "head": {"width": hidden_size}}


def _class_conditional(num_layers: int, width: int, num_heads: int, num_blocks: int, num_adaln: int) -> Preset:
    # 2/3 of four times the width, up to the next multiple of 256.
    ffn_size = -(-(8 * width) // (3 * 256)) * 256
    return {
        "model": {
            "family": "class_conditional",
            "num_layers": num_layers,
            "hidden_size": width,
            "num_heads": num_heads,
            "num_kv_heads": num_heads,
            "head_dim": 64,
            "ffn_size": ffn_size,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
        },
        "head": {"width": width, "num_blocks": num_blocks, "num_adaln": num_adaln, "head_dim": 64},
    }


PRESETS: Mapping[str, Preset] = {
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tie_embeddings=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tie_embeddings=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tie_embeddings=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, tie_embeddings=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408, tie_embeddings=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600, tie_embeddings=False),
    "bitdance-b": _class_conditional(24, 768, 12, 6, 2),
    "bitdance-l": _class_conditional(32, 1024, 16, 8, 2),
    "bitdance-h": _class_conditional(40, 1280, 20, 12, 3),
    "demo": {
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
            "ffn_size": 384,
            "tie_embeddings": False,
        },
        "head": {"width": 128, "head_dim": 32, "num_blocks": 2, "num_adaln": 1},
    },
}
"""Name -> section -> settings."""
