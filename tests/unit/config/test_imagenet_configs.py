"""The recipes of the class-conditional release against the table of the paper (arXiv 2602.14041 Tables 2, 3, 12)."""

from __future__ import annotations

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check

# layers, width, heads; blocks, width and adaLN modules of the head; greatest share of flipped bits; GPUs of the run
SIZES = {
    "b": (24, 768, 12, 6, 768, 2, 0.1, 16),
    "l": (32, 1024, 16, 8, 1024, 2, 0.05, 32),
    "h": (40, 1280, 20, 12, 1280, 3, 0.05, 64),
}
GUIDANCE = {"b": {1: 3.2, 4: 3.9, 16: 6.1}, "l": dict.fromkeys((1, 4, 16), 4.0), "h": dict.fromkeys((1, 4, 16), 4.55)}
BLOCK_SIDES = {1: 1, 4: 2, 16: 4}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block_tokens", BLOCK_SIDES)
def test_recipe_is_that_of_the_table(size, block_tokens):
    config = load_config(f"imagenet_{size}_{block_tokens}x")
    layers, width, heads, blocks, head_width, adaln, flip_max, num_gpus = SIZES[size]
    check(config, num_gpus)
    model, head, optim, augment = config.model, config.head, config.optim, config.data.augment
    assert config.run.name == f"imagenet_{size}_{block_tokens}x"
    assert (model.family, model.num_layers, model.hidden_size) == ("class_conditional", layers, width)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (heads, heads, 64)
    assert (head.num_blocks, head.width, head.num_adaln, head.head_dim) == (blocks, head_width, adaln, 64)
    assert (head.kind, head.diff_batch_mul, head.time_mean, head.time_std) == ("diffusion", 4, -0.8, 0.8)
    assert (config.vision.block_side, config.vision.num_bits) == (BLOCK_SIDES[block_tokens], 32)
    assert (config.vision.downsample, config.vision.flip_max, config.vision.order) == (16, flip_max, "block")
    assert (config.classes.num_classes, config.classes.num_tokens, config.classes.grid) == (1000, 64, (16, 16))
    assert config.run.steps == round(800 * 1_281_167 / config.data.global_batch) and config.data.global_batch == 1024
    assert (optim.lr, optim.lr_min, optim.schedule, optim.warmup_steps) == (6e-4, 1e-5, "cosine", 20_000)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 1e-8, 0.05, 1.0)
    assert not optim.decays_vectors and optim.decay_exempt == ("embedding.weight", "projector.*")
    assert optim.average_decay == 0.9999 and config.run.dtype == "bfloat16" and config.data.text_drop == 0.1
    assert (augment.flip, augment.crop, augment.crop_zoom) == (0.5, 1.0, 1.25)
    assert (augment.crop_until_epoch, augment.crop_ends_epoch, config.data.resize) == (700, 750, "adm")
    sample = config.sample
    assert (sample.num_steps, sample.guidance, sample.guidance_growth) == (100, GUIDANCE[size][block_tokens], "linear")
    assert sample.weights == config.evaluate.weights == "averaged" and sample.sampler == "euler_maruyama"
    # One full pack a step for each GPU of the published run.
    positions = 64 + config.vision.block_tokens - 1 + 256 - config.vision.block_tokens
    assert (
        0 <= config.data.max_pack_tokens - config.data.global_batch // num_gpus * positions < config.data.pack_multiple
    )
