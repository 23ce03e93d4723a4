"""The pipeline against generation written out as the paper describes it, and against itself in other batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.literal_generation import draw_literally
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.sampler import GeneratorNoise
from bitdance_scale.vision.bits import pack_bits
from tests.released import HEAD, write_published

# A prompt of few tokens and one of many, so that the batch has padding on the left.
PROMPTS = ["a red circle", "two blue squares and a red circle, a blue circle and two red squares"]
SETTINGS = {"height": 32, "width": 48, "num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "bits"}
GRID = (8, 12)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> BitDancePipeline:
    return BitDancePipeline.from_pretrained(write_published(tmp_path_factory.mktemp("published")), device="cpu")


def numbers(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_same_bits_as_the_literal_loop(pipeline):
    model = pipeline.model
    shape = (7, model.vision.section.block_tokens, model.vision.section.num_bits)
    noise = GeneratorNoise(numbers(1, 2), 2, shape, pipeline.device)
    rows = [model.text.prompt_ids(prompt) for prompt in PROMPTS] + [model.text.unconditional_ids()] * 2
    expected = draw_literally(model, rows, GRID, [noise() for _ in range(6)], num_steps=6, guidance=2.0)
    found = pipeline(PROMPTS, generator=numbers(1, 2), **SETTINGS).images
    assert (found == pack_bits(expected).numpy()).all()


def test_the_time_shift_of_the_head_moves_the_steps(tmp_path):
    shifted = BitDancePipeline.from_pretrained(
        write_published(tmp_path, head=dataclasses.replace(HEAD, time_shift=3.0)), device="cpu"
    )
    model = shifted.model
    shape = (7, model.vision.section.block_tokens, model.vision.section.num_bits)
    noise = GeneratorNoise(numbers(1), 1, shape, shifted.device)
    draws = [noise() for _ in range(6)]
    rows = [model.text.prompt_ids(PROMPTS[0]), model.text.unconditional_ids()]
    expected = draw_literally(model, rows, GRID, draws, num_steps=6, guidance=2.0)
    found = shifted(PROMPTS[0], generator=numbers(1), **SETTINGS).images
    assert (found == pack_bits(expected).numpy()).all()
    model.head.time_shift = 1.0
    assert not torch.equal(draw_literally(model, rows, GRID, draws, num_steps=6, guidance=2.0), expected)


def test_an_image_is_the_same_in_every_batch(pipeline):
    together = pipeline([*PROMPTS, "a"], generator=numbers(1, 2, 3), **SETTINGS).images
    for index, prompt in enumerate([*PROMPTS, "a"]):
        alone = pipeline(prompt, generator=numbers(index + 1), **SETTINGS).images[0]
        # float32 rounds batches of another shape differently, but none of the 1536 bits is close enough to a tie.
        assert (together[index] == alone).all()
    reordered = pipeline(PROMPTS[::-1], generator=numbers(2, 1), **SETTINGS).images
    assert (reordered[::-1] == together[:2]).all()


def test_one_generator_draws_whole_batches_in_the_published_order(pipeline):
    """A start tensor [n, P, C] per block, then one per step."""
    found = pipeline(PROMPTS, generator=numbers(5)[0], **SETTINGS).images
    model, source = pipeline.model, numbers(5)[0]
    draws = [torch.stack([torch.randn(2, 16, 16, generator=source) for _ in range(7)]) for _ in range(6)]
    rows = [model.text.prompt_ids(prompt) for prompt in PROMPTS] + [model.text.unconditional_ids()] * 2
    expected = draw_literally(model, rows, GRID, draws, num_steps=6, guidance=2.0)
    assert (found == pack_bits(expected).numpy()).all()


def test_seed_prompt_guidance_steps_and_sampler_all_matter(pipeline):
    def draw(prompt: str = PROMPTS[0], seed: int = 1, **changes: object):
        return pipeline(prompt, generator=numbers(seed), **SETTINGS | changes).images

    images = [
        draw(),
        draw(seed=2),
        draw(PROMPTS[1]),
        draw(guidance_scale=1.0),
        draw(guidance_scale=3.0),
        draw(num_inference_steps=7),
        draw(sampler="euler"),
    ]
    assert len({image.tobytes() for image in images}) == len(images)
    assert (draw() == images[0]).all()
