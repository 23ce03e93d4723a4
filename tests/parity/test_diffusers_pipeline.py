"""The pipeline that exports in diffusers' layout carry, loaded by diffusers, against `generate/`: the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.config.schema import HeadSection
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.published_layout import DIFFUSERS
from tests.released import AUTOENCODER, write_published

diffusers = pytest.importorskip("diffusers")

SMALL_HEAD = HeadSection(width=128, num_blocks=4, num_adaln=2, head_dim=32, mlp_ratio=1.25, time_shift=2.0)
PROMPTS = ["a red circle", "two blue squares, a tail that pads the other prompt: <|im_end|>"]


def exported(folder: Path, **options) -> Path:
    """A published folder, imported and exported in diffusers' layout."""
    published = write_published(folder / "published", **({"backbone_dtype": torch.float32} | options))
    import_release(open_source(published, None), folder / "imported")
    export_release(open_checkpoint(folder / "imported", layout=DIFFUSERS), folder / "exported")
    return folder / "exported"


def load_with_diffusers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, modules: Path, torch_dtype: torch.dtype | None = torch.float32
):
    """The pipeline of a folder, from its own code, which is copied to `modules`; nothing is fetched."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    dtype = {} if torch_dtype is None else {"torch_dtype": torch_dtype}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, **dtype
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A model with what the release's does not have: a small head, shifted times, a decoder that takes noise."""
    folder = tmp_path_factory.mktemp("other")
    return exported(
        folder, block_side=2, is_tied=True, head=SMALL_HEAD, autoencoder=AUTOENCODER | {"gan_decoder": True}
    )


@pytest.fixture(scope="module", params=[4, 8])
def folder(request, tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp(f"p{request.param}"), block_side=request.param)


@pytest.fixture
def pair(folder, monkeypatch, tmp_path):
    """(our pipeline of the published folder, diffusers' of the export)."""
    ours = BitDancePipeline.from_pretrained(folder.parent / "published", torch.float32, "cpu")
    return ours, load_with_diffusers(folder, monkeypatch, tmp_path / "modules")


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_bits_are_equal_in_all_sizes(pair, guidance):
    ours, theirs = pair
    side = ours.model.vision.section.block_side * ours.model.vision.section.downsample
    for height, width in [(side, side), (2 * side, 3 * side), (3 * side, side)]:
        settings = {"height": height, "width": width, "num_inference_steps": 3, "guidance_scale": guidance}
        wanted = ours(PROMPTS, generator=generators([1, 2]), output_type="bits", **settings).images
        latents = theirs(PROMPTS, generator=generators([1, 2]), output_type="latent", **settings).images
        p, grid = ours.model.vision.section.block_side, (height // side, width // side)
        blocks = latents.unflatten(2, (grid[0], p)).unflatten(4, (grid[1], p)).permute(0, 2, 4, 3, 5, 1)
        found = np.packbits(blocks.reshape(len(PROMPTS), -1, latents.shape[1]).numpy() > 0, axis=-1)
        assert np.array_equal(found, wanted)


def test_the_pictures_are_equal(pair):
    ours, theirs = pair
    side = ours.model.vision.section.block_side * ours.model.vision.section.downsample
    settings = {"height": side, "width": 2 * side, "num_inference_steps": 2, "num_images_per_prompt": 2}
    for output_type in ("pil", "np", "pt"):
        wanted = ours("a red circle", generator=torch.Generator().manual_seed(3), output_type=output_type, **settings)
        found = theirs("a red circle", generator=torch.Generator().manual_seed(3), output_type=output_type, **settings)
        assert all(np.array_equal(a, b) for a, b in zip(found.images, wanted.images, strict=True))


@pytest.mark.parametrize("sampler", ["euler", "euler_maruyama"])
def test_other_networks_and_solvers_are_equal(other, sampler, monkeypatch, tmp_path):
    ours = BitDancePipeline.from_pretrained(other.parent / "published", torch.float32, "cpu")
    theirs = load_with_diffusers(other, monkeypatch, tmp_path / "modules")
    settings = {"height": 24, "width": 16, "num_inference_steps": 4, "guidance_scale": 2.0, "sampler": sampler}
    wanted, found = (
        pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pil", **settings).images[0]
        for pipeline in (ours, theirs)
    )
    assert wanted.tobytes() == found.tobytes()


def test_dtypes_of_the_files_draw_too(tmp_path, monkeypatch):
    # A backbone in bfloat16 with a head in float32, as it is published.
    folder = exported(tmp_path, block_side=2, backbone_dtype=torch.bfloat16)
    pipeline = load_with_diffusers(folder, monkeypatch, tmp_path / "modules", torch_dtype=None)
    blocks = []
    pipeline("a red circle", 16, 16, 1, callback_on_block=lambda *block: blocks.append(block))
    assert blocks == [(number, 4) for number in range(1, 5)]
    for options, message in [
        ({"height": 10}, "height = 10: must be a multiple of 8 px, up to 1024 px"),
        ({"sampler": "ddim"}, "sampler = 'ddim' must be one of"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0 at least 1"),
        ({"generator": [torch.Generator()] * 2}, "generator: give one, or a list with one of its own for each"),
        ({"output_type": "jpeg"}, "output_type = 'jpeg' must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipeline("a red circle", **({"height": 16, "width": 16} | options))


def test_no_code_is_run_without_leave(folder):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
