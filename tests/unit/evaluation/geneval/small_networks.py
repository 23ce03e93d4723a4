"""A Mask2Former and a CLIP of a few thousand weights, random, in folders as transformers writes them."""

import json
from pathlib import Path

import torch

from bitdance_scale.evaluation.geneval.classes import COCO_CLASSES

NUM_QUERIES = 20


def mask2former_config(num_queries: int = NUM_QUERIES, classes: tuple[str, ...] = COCO_CLASSES):
    from transformers import Mask2FormerConfig, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64, out_features=stages
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=24,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=4,
        num_queries=num_queries,
        id2label=dict(enumerate(classes)),
    )


def save_mask2former(folder: Path, classes: tuple[str, ...] = COCO_CLASSES) -> Path:
    """One that is sure of what it sees: its classes and masks are far from undecided."""
    from transformers import Mask2FormerForUniversalSegmentation

    torch.manual_seed(0)
    network = Mask2FormerForUniversalSegmentation(mask2former_config(classes=classes))
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=(2 / value[0].numel()) ** 0.5)
            if name == "class_predictor.weight" or "mask_embedder.2" in name:
                value.mul_(4)
    network.save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """With a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPModel

    letters = "abcdefghijklmnopqrstuvwxyz-"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "re", "<|startoftext|>", "<|endoftext|>"]
    last = len(vocabulary) - 1
    part = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = part | {"vocab_size": len(vocabulary), "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    torch.manual_seed(1)
    network = CLIPModel(
        CLIPConfig(
            text_config=text | {"max_position_embeddings": 77, "projection_dim": 12},
            vision_config=part | {"image_size": 32, "patch_size": 8, "projection_dim": 12},
            projection_dim=12,
        )
    )
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.3)
    network.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = names | {"tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
