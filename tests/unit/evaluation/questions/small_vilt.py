"""A ViLT of a few thousand random weights, written as published ones are."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "a", "cat", "?", "[DEC]", "[ENC]")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def tokenizer(folder: Path):
    """Of `WORDS`."""
    from transformers import BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=12)


def save_vilt(folder: Path) -> Path:
    """A classifier of answers, which are yes, no and a dog."""
    from transformers import ViltConfig, ViltForQuestionAnswering, ViltImageProcessor, ViltProcessor

    labels = {0: "yes", 1: "no", 2: "a dog"}
    config = ViltConfig(
        **SMALL, vocab_size=len(WORDS), image_size=32, patch_size=16, max_position_embeddings=12, id2label=labels
    )
    torch.manual_seed(0)
    ViltForQuestionAnswering(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    ViltProcessor(ViltImageProcessor(size=size, size_divisor=16), tokenizer(folder)).save_pretrained(folder)
    return folder
