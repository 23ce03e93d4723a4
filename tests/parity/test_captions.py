"""Captions against transformers' Qwen3 reading the whole sequence again for every token, written out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from bitdance_scale.generate.caption_decode import TokenChoice
from bitdance_scale.generate.caption_pipeline import CaptionPipeline
from tests.released import HIDDEN_SIZE, write_published

SIZES_PX = ((32, 32), (32, 64), (48, 32))
NUM_TOKENS = 10
BLOCK_SIDE = 4
DOWNSAMPLE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"), backbone_dtype=torch.float32)


@pytest.fixture(scope="module")
def pipelines(folder) -> dict[str, CaptionPipeline]:
    return {
        context: CaptionPipeline.from_pretrained(folder, device="cpu", context=context)
        for context in ("plain", "queries")
    }


def images() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(SIZES_PX)]


class Literal:
    """The model as a user of transformers would call it: rows of the sequence, a mask, logits of the last position."""

    def __init__(self, folder, autoencoder) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self._projector = load_file(folder / "projector.safetensors")
        self._autoencoder = autoencoder
        vocabulary = self._tokenizer.get_vocab()
        is_markup = ("<|im_start|>", "<|vision_", "<|res_", "<|query_", "<|endoftext|>", "<think>", "</think>")
        self._markup = [index for name, index in vocabulary.items() if name.startswith(is_markup)]
        self.end = vocabulary["<|im_end|>"]

    def _text(self, text: str) -> torch.Tensor:
        ids = torch.tensor(self._tokenizer(text, add_special_tokens=False).input_ids)
        return self._model.model.embed_tokens(ids)

    def _vision(self, image: np.ndarray) -> torch.Tensor:
        """Rows of an image, block after block."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
        bits = self._autoencoder.encode(pixels)[0]
        height, width = bits.shape[1:]
        rows = []
        for top in range(0, height, BLOCK_SIDE):
            for left in range(0, width, BLOCK_SIDE):
                for y in range(top, top + BLOCK_SIDE):
                    rows += [self._project(bits[:, y, x]) + place(y, x) for x in range(left, left + BLOCK_SIDE)]
        return torch.stack(rows)

    def _project(self, bits: torch.Tensor) -> torch.Tensor:
        weights = self._projector
        hidden = weights["fc1.weight"] @ torch.where(bits > 0, 1.0, -1.0) + weights["fc1.bias"]
        return weights["fc2.weight"] @ torch.nn.functional.gelu(hidden, approximate="tanh") + weights["fc2.bias"]

    @torch.no_grad()
    def describe(self, image: np.ndarray, has_queries: bool, num_tokens: int) -> list[int]:
        height, width = image.shape[0] // DOWNSAMPLE, image.shape[1] // DOWNSAMPLE
        queries = "".join(f"<|query_{number}|>" for number in range(1, BLOCK_SIDE**2)) if has_queries else ""
        before = self._text(f"<|im_start|>user\n<|vision_start|><|res_{height}|><|res_{width}|>{queries}")
        vision = self._vision(image)
        after = self._text("<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
        rows, found = torch.cat([before, vision, after]), []
        for _ in range(num_tokens):
            mask = torch.ones(len(rows), len(rows)).tril()
            if has_queries:
                # `<|res_w|>` with the queries is a group whose positions see each other, and so is every block.
                for start in range(len(before) - BLOCK_SIDE**2, len(before) + len(vision), BLOCK_SIDE**2):
                    mask[start : start + BLOCK_SIDE**2, start : start + BLOCK_SIDE**2] = 1
            additive = torch.where(mask > 0, 0.0, -torch.inf)[None, None]
            positions = torch.arange(len(rows))[None]
            logits = self._model(inputs_embeds=rows[None], attention_mask=additive, position_ids=positions).logits
            logits = logits[0, -1].clone()
            logits[self._markup] = -torch.inf
            found.append(int(logits.argmax()))
            if found[-1] == self.end:
                break
            rows = torch.cat([rows, self._model.model.embed_tokens(torch.tensor([found[-1]]))])
        return found


def place(row: int, column: int) -> torch.Tensor:
    """[column, row], of each half sines and then half cosines."""
    quarter = HIDDEN_SIZE // 4
    parts = []
    for coordinate in (column, row):
        angles = [coordinate / 10000 ** (i / quarter) for i in range(quarter)]
        parts += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(parts)


def texts(pipeline: CaptionPipeline, captions: Sequence[list[int]]) -> list[str]:
    return [pipeline.model.text.decode(ids) for ids in captions]


@pytest.mark.parametrize("context", ["plain", "queries"])
def test_greedy_captions_are_the_argmax_of_the_whole_sequence(folder, pipelines, context):
    pipeline = pipelines[context]
    literal = Literal(folder, pipeline.model.vision.autoencoder)
    expected = [literal.describe(image, context == "queries", NUM_TOKENS) for image in images()]
    assert len({tuple(ids) for ids in expected}) > 1, "the images would not matter"
    found = pipeline(images(), max_tokens=NUM_TOKENS)
    assert [caption.text for caption in found] == texts(pipeline, expected)
    assert [caption.num_tokens for caption in found] == [len(ids) for ids in expected]


def test_the_two_layouts_are_two_models(pipelines):
    plain, queries = (pipelines[context](images(), max_tokens=NUM_TOKENS) for context in ("plain", "queries"))
    assert [caption.text for caption in plain] != [caption.text for caption in queries]


@pytest.mark.parametrize("choice", [TokenChoice(), TokenChoice(0.9, 1.3)])
def test_a_caption_is_the_same_in_every_batch(pipelines, choice):
    def generator(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    pipeline = pipelines["plain"]
    together = pipeline(images(), choice, [generator(n) for n in range(3)], max_tokens=NUM_TOKENS)
    for number, image in enumerate(images()):
        assert pipeline([image], choice, [generator(number)], max_tokens=NUM_TOKENS) == [together[number]]


def test_rows_without_an_entry_are_never_chosen(pipelines):
    model = pipelines["plain"].model
    expected = pipelines["plain"](images(), max_tokens=NUM_TOKENS)
    # Rows behind the tokenizer's entries that would win everywhere.
    padded = dataclasses.replace(model, output=torch.cat([model.output, 50 * model.output]))
    assert CaptionPipeline(padded)(images(), max_tokens=NUM_TOKENS) == expected


def test_a_tied_output_is_the_embedding(tmp_path):
    folder = write_published(tmp_path, is_tied=True, backbone_dtype=torch.float32)
    pipeline = CaptionPipeline.from_pretrained(folder, device="cpu")
    literal = Literal(folder, pipeline.model.vision.autoencoder)
    image = images()[0]
    assert pipeline([image], max_tokens=4)[0].text == texts(pipeline, [literal.describe(image, False, 4)])[0]
