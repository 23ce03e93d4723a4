"""The recipes of the published tokenizers against the paper (arXiv 2602.14041 Sec. 4.1, Table 1) and WeTok's."""

from __future__ import annotations

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.config.shipped import shipped_configs
from bitdance_scale.config.tokenizer_rules import check_tokenizer
from bitdance_scale.config.tokenizer_schema import TokenizerConfig

# Bits, downsampling, groups of 8 bits, compression: 24 bits per pixel over stored bits per pixel.
SIZES = {"ae_d16c32": (32, 16, 4, 192), "ae_d32c128": (128, 32, 16, 192), "ae_d32c256": (256, 32, 32, 96)}


@pytest.mark.parametrize("name", [*SIZES, "ae_d32c128_gan", "ae_d32c256_gan"])
def test_recipe_is_the_published_one(name):
    config = load_config(name, schema=TokenizerConfig)
    # What 32 and 64 GPUs share, and what no number of ranks divides.
    for num_ranks in (32, 64, 96):
        check_tokenizer(config, num_ranks)
    network, quantiser, optim = config.autoencoder, config.quantiser, config.optim
    bits, downsample, groups, compression = SIZES[name.removesuffix("_gan")]
    assert config.run.name == name and config.run.output == f"runs/{name}/weights"
    assert (network.num_bits, network.downsample, config.num_groups) == (bits, downsample, groups)
    assert 24 * downsample**2 / bits == compression
    assert (network.channels, network.num_res_blocks) == (256, 4)
    assert network.channel_mult == ((1, 1, 2, 2, 4) if downsample == 16 else (1, 1, 2, 2, 4, 8))
    assert (config.run.steps, config.run.dtype, config.data.sizes_px) == (400_000, "bfloat16", ((256, 256),))
    assert config.data.images_px == 1024 * 256 * 256
    assert (optim.lr, optim.lr_min, optim.schedule) == (1e-4, 0.0, "constant")
    assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.5, 0.9, 0.0)
    assert optim.average_decay > 0 and config.evaluate.weights == "averaged" and config.run.output_weights == "auto"
    reconstruction, adversarial = config.reconstruction, config.adversarial
    assert (reconstruction.l1_weight, reconstruction.l2_weight, reconstruction.edge_weight) == (1, 0, 0)
    assert reconstruction.lpips_weight == 1 and reconstruction.lpips_weights
    assert (adversarial.weight, adversarial.lecam_weight, adversarial.lecam_decay) == (0.1, 0.05, 0.999)
    assert (adversarial.channels, adversarial.num_layers, adversarial.rate_factor) == (64, 3, 1)
    assert (quantiser.temperature, quantiser.entropy_weight, quantiser.commit_weight) == (0.01, 0.1, 0.25)
    assert (quantiser.entropy_ramp, quantiser.entropy_ramp_steps, quantiser.flip_max) == (0, 2000, 0)


@pytest.mark.parametrize("name", ["ae_d32c128", "ae_d32c256"])
def test_second_stage_goes_on_from_what_the_first_one_writes(name):
    first, second = (load_config(stage, schema=TokenizerConfig) for stage in (name, f"{name}_gan"))
    assert second.run.start_from == first.run.output
    assert (second.run.trains, second.autoencoder.gan_decoder) == ("decoder", True)
    assert (first.run.trains, first.autoencoder.gan_decoder, first.run.start_from) == ("all", False, "")


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("ae_small")])
def test_small_recipes_need_no_weights_of_others_and_any_number_of_ranks(name):
    config = load_config(name, schema=TokenizerConfig)
    for num_ranks in (1, 2, 3, 8):
        check_tokenizer(config, num_ranks)
    assert config.reconstruction.lpips_weight == 0 and not config.run.start_from
    assert config.run.name == name and config.autoencoder.num_bits == 32
    assert config.autoencoder.downsample == (16 if "d16" in name else 32)
