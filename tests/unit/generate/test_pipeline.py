"""What a call takes, refuses and returns."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.vision.bits import pack_bits

FAST = {"height": 32, "width": 48, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline(published) -> BitDancePipeline:
    return BitDancePipeline.from_pretrained(published, device="cpu")


def numbers(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_defaults_are_those_of_the_release():
    defaults = {name: value.default for name, value in inspect.signature(BitDancePipeline.__call__).parameters.items()}
    assert (defaults["height"], defaults["width"]) == (1024, 1024)
    assert (defaults["num_inference_steps"], defaults["guidance_scale"]) == (50, 7.5)
    assert defaults["sampler"] == "euler_maruyama"


def test_the_cpu_computes_in_float32_unless_told(published, pipeline):
    assert pipeline.model.backbone.dtype is torch.float32
    narrow = BitDancePipeline.from_pretrained(published, dtype=torch.bfloat16, device="cpu")
    image = narrow("a red circle", **FAST).images[0]
    assert image.size == (48, 32)


def test_output_types_hold_the_same_image(pipeline):
    pil, fractions, tensor, bits = (
        pipeline(["a", "b"], generator=numbers(1, 2), output_type=kind, **FAST).images
        for kind in ("pil", "np", "pt", "bits")
    )
    assert all(isinstance(image, Image.Image) for image in pil)
    stacked = np.stack([np.asarray(image) for image in pil])
    assert stacked.shape == (2, 32, 48, 3)
    assert fractions.dtype == np.float32 and (np.rint(fractions * 255) == stacked).all()
    assert torch.equal(tensor, torch.from_numpy(fractions).permute(0, 3, 1, 2))
    assert bits.shape == (2, 8 * 12, 2)
    decoded = pipeline.model.vision.decode(bits[1], (8, 12)).numpy()
    assert (decoded == stacked[1]).all()


def test_images_of_a_prompt_stand_together(pipeline):
    found = pipeline(["a", "b"], num_images_per_prompt=2, generator=numbers(1, 2, 3, 4), output_type="bits", **FAST)
    for index, prompt in enumerate("aabb"):
        alone = pipeline(prompt, generator=numbers(index + 1), output_type="bits", **FAST)
        assert (found.images[index] == alone.images[0]).all()


def test_guidance_of_one_needs_no_second_sequence(pipeline):
    lengths = []
    hook = pipeline.model.backbone.layers[0].register_forward_pre_hook(
        lambda module, arguments: lengths.append(len(arguments[0]))
    )
    pipeline("a", guidance_scale=1.0, **FAST)
    pipeline("a", guidance_scale=0.5, **FAST)
    hook.remove()
    assert lengths == [1] * 6 + [2] * 6


def test_every_block_is_seen_as_it_is_drawn(pipeline):
    seen = []

    def look(blocks):
        assert [tuple(block.shape) for block in blocks] == [(2, 16, 16)] * len(blocks)
        seen.append(torch.cat(list(blocks), dim=1))

    watched = pipeline(["a", "b"], generator=numbers(1, 2), output_type="bits", on_block=look, **FAST).images
    alone = pipeline(["a", "b"], generator=numbers(1, 2), output_type="bits", **FAST).images
    assert [bits.shape[1] // 16 for bits in seen] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(part, seen[-1][:, : part.shape[1]]) for part in seen)
    assert (pack_bits(seen[-1]).numpy() == watched).all() and (watched == alone).all()


def test_what_a_watcher_raises_ends_the_drawing(pipeline):
    def stop(blocks):
        if len(blocks) == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pipeline("a", generator=numbers(1), output_type="bits", on_block=stop, **FAST)
    # The decoder draws on as if nothing had been.
    again = pipeline("a", generator=numbers(1), output_type="bits", **FAST).images
    fresh = BitDancePipeline(pipeline.model)("a", generator=numbers(1), output_type="bits", **FAST).images
    assert (again == fresh).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt = .*at least one"),
        ({"prompt": [3]}, "prompt = .*must be a text"),
        ({"height": 33}, "height = 33"),
        ({"num_inference_steps": 0}, "steps = 0"),
        ({"guidance_scale": float("nan")}, "guidance scale = nan"),
        ({"sampler": "heun"}, "sampler = 'heun'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt = 0"),
        ({"output_type": "latent"}, "output_type = 'latent': must be one of pil, np, pt, bits"),
        ({"generator": numbers(1)}, "a list of 1 for 2 images"),
        ({"generator": numbers(1) * 2}, "one is in the list twice"),
    ],
)
def test_refusals_come_before_any_work(pipeline, monkeypatch, changes, message):
    monkeypatch.setattr(pipeline, "_draw_bits", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match=message):
        pipeline(**({"prompt": ["a", "b"]} | FAST | changes))


def test_no_folder():
    with pytest.raises(CheckpointError, match="no such folder"):
        BitDancePipeline.from_pretrained("nowhere")
