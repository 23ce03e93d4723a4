"""CLIP with random weights against transformers' own chain, and folders that are no CLIP."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.clip import load_clip
from bitdance_scale.evaluation.distributions.clip_score import clip_cosines
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage
from bitdance_scale.evaluation.picture_scorers import COSINE, ClipScorer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP in transformers' layout."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    vocabulary = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), START, END]
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "pad_token_id": len(vocabulary) - 1,
    }
    text = layers | ids | {"vocab_size": len(vocabulary), "max_position_embeddings": 12}
    config = CLIPConfig(text_config=text, vision_config=layers | {"image_size": 16, "patch_size": 8}, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    (path / "vocab.json").write_text(
        json.dumps({name: place for place, name in enumerate(vocabulary)}), encoding="utf-8"
    )
    (path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END, "model_max_length": 12}
    settings = json.dumps({"tokenizer_class": "CLIPTokenizer"} | marks)
    (path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return path


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_embeddings_are_those_of_transformers_chain(folder):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip, model = load_clip(str(folder)), CLIPModel.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    images = [noise(24, 24), noise(40, 31), noise(19, 50), noise(9, 12)]
    found = clip.embed_images(images)
    assert found.shape == (4, 24) and torch.allclose(found.norm(dim=1), torch.ones(4))
    for image, embedding in zip(images, found, strict=True):
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        expected = model.get_image_features(pixel_values=pixels).pooler_output[0]
        assert torch.allclose(embedding, expected / expected.norm(), atol=1e-5)

    texts = ["a red cat", "b"]
    found = clip.embed_texts(texts)
    for text, embedding in zip(texts, found, strict=True):
        # Without padding: start, a token per letter, end.
        letters = [LETTERS.index(c) + 26 * (n + 1 == len(word)) for word in text.split() for n, c in enumerate(word)]
        expected = model.get_text_features(input_ids=torch.tensor([[52, *letters, 53]])).pooler_output[0]
        assert torch.allclose(embedding, expected / expected.norm(), atol=1e-5)
        assert torch.allclose(clip.embed_texts([text])[0], embedding, atol=1e-6)
    assert (clip.is_cut("a b c d e f g h i j"), clip.is_cut("a b c d e f g h i j k")) == (False, True)
    with pytest.raises(ValueError, match=r"an image is uint8 \[24, 24\], expected uint8 \[height, width, 3\]"):
        clip.embed_images([noise(24, 24)[..., 0]])


class Planes:
    """Embeddings in a plane, at the angle that an image's first pixel or a text says."""

    def embed_images(self, images):
        return self._at([float(image[0, 0, 0]) for image in images])

    def embed_texts(self, texts):
        return self._at([float(text) for text in texts])

    def is_cut(self, text):
        return len(text) > 2

    def _at(self, degrees):
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_score_counts_opposite_images_as_0():
    images = [np.full((2, 2, 3), value, dtype=np.uint8) for value in (60, 180, 30)]
    prompts = [Prompt(text, text, "", 1, {}) for text in ("0", "00", "120")]
    scorer = ClipScorer(Planes())
    found = scorer([DrawnImage(prompt, 0, image) for prompt, image in zip(prompts, images, strict=True)])
    assert [score.value for score in found] == pytest.approx([50, 0, 0], abs=1e-4)
    assert [score.parts[COSINE][0] for score in found] == pytest.approx([0.5, -1, 0], abs=1e-6)
    assert scorer.num_cut([prompt.text for prompt in prompts]) == 1
    with pytest.raises(ValueError, match="2 images have 1 prompts"):
        clip_cosines(Planes(), images[:2], ["0"])


def test_folders_that_are_no_clip(folder, tmp_path):
    def changed(name):
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    other = changed("other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"other: is a model of type 'siglip', expected 'clip'; name the folder"):
        load_clip(str(other))

    half = changed("half")
    state = load_file(half / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "visual_projection" not in k}, half / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"half: visual_projection.weight is missing; the weights are of another"):
        load_clip(str(half))

    pickled = changed("pickled")
    torch.save(state, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pickled: OSError"):
        load_clip(str(pickled))

    fewer = changed("fewer")
    vocabulary = json.loads((fewer / "vocab.json").read_text(encoding="utf-8"))
    shorter = {name: place for place, name in enumerate(name for name in vocabulary if name != "z")}
    (fewer / "vocab.json").write_text(json.dumps(shorter), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"fewer: its tokenizer has 53 entries and its network 54"):
        load_clip(str(fewer))
    with pytest.raises(CheckpointError, match=r"OSError|ValueError"):
        load_clip(str(tmp_path / "missing"))
