"""What a tokenizer's training starts with: published weights, the second stage, and files that are something else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_scale.checkpoint.run_checkpoint import TENSORS_DIR
from bitdance_scale.checkpoint.step_names import step_name
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.cli import launch, stage, train
from bitdance_scale.config.schema import VisionSection
from bitdance_scale.config.tokenizer_schema import AutoencoderSection
from bitdance_scale.errors import CheckpointError, ConfigError, DataError
from bitdance_scale.train.tokenizer import run_tokenizer
from bitdance_scale.train.tokenizer_networks import TokenizerNetworks
from bitdance_scale.train.tokenizer_start import check_start_files, load_start
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.tokenizer import VisionTokenizer
from bitdance_scale.vision.weights import save_weights
from tests.small_tokenizer import ADVERSARY, DEMO, small_config, small_tokenizer, write_small_shards
from tests.unit.vision.test_perceptual import random_state

SECTION = AutoencoderSection(num_bits=16, channels=32, channel_mult=(1, 1), num_res_blocks=1)
GAN = dataclasses.replace(SECTION, gan_decoder=True)


def network(section: AutoencoderSection, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(**dataclasses.asdict(section))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small tokenizer, as released, and shards to train on."""
    folder = tmp_path_factory.mktemp("published")
    save_weights(folder, network(SECTION, 7).state_dict(), published_config(**dataclasses.asdict(SECTION)))
    write_small_shards(folder)
    return folder


def test_a_folder_and_a_file_of_either_naming_are_read(published: Path, tmp_path: Path):
    wanted = load_file(published / "ae.safetensors")
    shutil.copy(published / "ae.safetensors", tmp_path / "ae_d2c16.safetensors")
    shutil.copy(published / "ae_config.json", tmp_path / "ae_d2c16_config.json")
    for where in (published, published / "ae.safetensors", tmp_path / "ae_d2c16.safetensors"):
        autoencoder = network(SECTION)
        load_start(autoencoder, where, SECTION)
        assert all(torch.equal(value, wanted[name]) for name, value in autoencoder.state_dict().items())


def test_a_decoder_that_takes_noise_starts_as_the_plain_one(published: Path):
    plain, gan = network(SECTION), network(GAN)
    load_start(plain, published, SECTION)
    load_start(gan, published, GAN)
    bits = torch.randn(2, 16, 8, 8).sign()
    assert torch.equal(gan.decoder(bits, torch.zeros_like(bits)), gan.decoder(bits, torch.randn_like(bits)))
    # The convolution adds up twice as many channels.
    torch.testing.assert_close(gan.decoder(bits, torch.randn_like(bits)), plain.decoder(bits), rtol=1e-4, atol=1e-5)
    loss = gan.decoder(bits, torch.randn_like(bits)).sum()
    loss.backward()
    assert gan.decoder.conv_in.weight.grad[:, 16:].abs().max() > 0, "it can learn to use the noise"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dataclasses.replace(SECTION, num_bits=32), r"autoencoder.num_bits = 32, the file's is 16"),
        (dataclasses.replace(SECTION, channel_mult=(1, 1, 2), channels=64),
         r"channels = 64, the file's is 32; autoencoder.channel_mult = \[1, 1, 2\], the file's is \[1, 1\]"),
        (dataclasses.replace(SECTION, num_res_blocks=2), r"num_res_blocks = 2, the file's is 1.* set these to"),
    ],
)  # fmt: skip
def test_other_sizes_are_named(published: Path, section: AutoencoderSection, message: str):
    with pytest.raises(ConfigError, match=f"run.start_from = .*{message}"):
        load_start(network(SECTION), published, section)


def test_a_decoder_with_noise_is_no_start_of_one_without(tmp_path: Path):
    save_weights(tmp_path, network(GAN).state_dict(), published_config(**dataclasses.asdict(GAN)))
    with pytest.raises(ConfigError, match="autoencoder.gan_decoder = false, but the file's decoder takes noise"):
        load_start(network(SECTION), tmp_path, SECTION)


def test_files_that_are_no_weights_are_named(published: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"run.start_from = .*nowhere': .*no such file; name a folder with ae.saf"):
        load_start(network(SECTION), tmp_path / "nowhere", SECTION)
    torch.save(network(SECTION).state_dict(), tmp_path / "ae.pth")
    with pytest.raises(ConfigError, match=r"ae.pth': a file of torch.save; .*`bitdance import FILE OUT`"):
        load_start(network(SECTION), tmp_path / "ae.pth", SECTION)
    shutil.copy(published / "ae_config.json", tmp_path)
    content = (published / "ae.safetensors").read_bytes()
    (tmp_path / "ae.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"ae.safetensors: not a readable safetensors file"):
        load_start(network(SECTION), tmp_path, SECTION)
    state = load_file(published / "ae.safetensors")
    save_file({name: value for name, value in state.items() if name != "decoder.conv_out.bias"},
              tmp_path / "ae.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="decoder.conv_out.bias is missing"):
        load_start(network(SECTION), tmp_path, SECTION)
    state["encoder.conv_out.bias"][3] = torch.nan
    save_file(state, tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match="encoder.conv_out.bias holds NaN or infinity"):
        load_start(network(SECTION), tmp_path, SECTION)


def test_averages_begin_with_the_weights_that_a_run_starts_from(published: Path):
    networks = TokenizerNetworks(small_config(published, "optim.average_decay=0.9"), torch.device("cpu"))
    networks.start_from(str(published))
    with networks.weights_of("averaged"):
        state = {name: value.clone() for name, value in networks.autoencoder.state_dict().items()}
    wanted = load_file(published / "ae.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in state.items())


def bad_files(folder: Path) -> None:
    torch.save({"conv1.weight": torch.ones(2)}, folder / "other.pth")
    torch.save(random_state("alex"), folder / "alex.pth")


@pytest.mark.parametrize("num_ranks", [None, 1, 2])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["reconstruction.lpips_weight=1.0", "reconstruction.lpips_weights={}/gone.pth"],
         "reconstruction.lpips_weights: {}/gone.pth is missing"),
        (["reconstruction.lpips_weight=1.0", "reconstruction.lpips_weights={}/alex.pth"],
         "Name the state dict of torchvision's VGG-16, such as vgg16-397923af.pth, or set reconstruction.lpips_w"),
        (["reconstruction.lpips_weight=1.0", "reconstruction.lpips_weights={}/other.pth"],
         "holds no tensor named features.N.weight"),
        (["run.start_from={}/gone"], "run.start_from = '{0}/gone': {0}/gone: no such file; name a folder with ae."),
        (["run.start_from={}", "autoencoder.num_bits=32"], "autoencoder.num_bits = 32, the file's is 16"),
    ],
)  # fmt: skip
def test_no_rank_starts_without_its_files(published, tmp_path, monkeypatch, capsys, num_ranks, settings, message):
    def refuse(*_: object) -> int:
        raise AssertionError("a rank was started")

    for module, name in ((launch, "launch"), (train, "launch"), (stage, "run_stage")):
        monkeypatch.setattr(module, name, refuse)
    bad_files(published)
    settings = [*small_tokenizer(published, f"run.root={tmp_path}"), *(part.format(published) for part in settings)]
    command = [str(DEMO), *settings]
    if num_ranks is None:
        assert stage.main(None, command) == 2
        # Those beside the first leave the reading to it.
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(AssertionError, match="a rank was started"):
            stage.main(None, command)
    else:
        assert train.main([*command, "--nproc", str(num_ranks)]) == 2
    assert message.format(published) in capsys.readouterr().err


def test_a_run_that_goes_on_does_not_look_for_its_start(published: Path, tmp_path: Path):
    config = small_config(published, "run.start_from=gone", f"run.root={tmp_path}")
    with pytest.raises(ConfigError, match="run.start_from = 'gone'"):
        check_start_files(config)
    (tmp_path / "demo_tokenizer" / "checkpoints" / step_name(3)).mkdir(parents=True)
    check_start_files(config)


def stored(root: Path, step: int) -> dict[str, torch.Tensor]:
    files = StoredTensors(root / "demo_tokenizer" / "checkpoints" / step_name(step) / TENSORS_DIR)
    return {name: files.read_rows(name, 0, files.index.spec(name).shape[0]) for name in files.index.tensors}


SECOND_STAGE = (
    *ADVERSARY, "run.trains=decoder", "autoencoder.gan_decoder=true", "adversarial.start_step=0", "run.steps=3",
    "checkpoint.every_steps=3", "optim.lr=1e-3",
)  # fmt: skip


def test_the_second_stage_trains_the_decoder_alone_and_exports_it(published: Path, tmp_path: Path):
    settings = (*SECOND_STAGE, f"run.start_from={published}", f"run.root={tmp_path}", f"run.output={tmp_path / 'out'}")
    config = small_config(published, *settings, num_images=2)
    assert run_tokenizer(config) == 0
    before, after = load_file(published / "ae.safetensors"), load_file(tmp_path / "out" / "ae.safetensors")
    for name, value in before.items():
        if name != "decoder.conv_in.weight":
            assert torch.equal(after[name], value) == name.startswith("encoder."), name
    assert after["decoder.conv_in.weight"][:, 16:].abs().max() > 0
    assert json.loads((tmp_path / "out" / "ae_config.json").read_text())["gan_decoder"] is True
    tensors = stored(tmp_path, 3)
    assert "model.encoder.conv_in.weight" in tensors
    assert not any(name.startswith("optimizer.") and ".encoder." in name for name in tensors)

    def tokenizer(folder: Path, is_gan: bool) -> VisionTokenizer:
        weights, sizes = str(folder / "ae.safetensors"), {"channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1}
        return VisionTokenizer(VisionSection(weights=weights, num_bits=16, gan_decoder=is_gan, **sizes), "cpu")

    image = torch.randint(256, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    first, second = tokenizer(published, False), tokenizer(tmp_path / "out", True)
    (bits,), (same_bits,) = first.encode([image]), second.encode([image])
    assert torch.equal(torch.as_tensor(bits), torch.as_tensor(same_bits))
    assert second.decode(bits, (8, 12)).shape == (16, 24, 3)
    # It goes on without the weights that it started from, and not with another part.
    longer = small_config(published, *settings, "run.start_from=gone", "run.steps=4", num_images=2)
    assert run_tokenizer(longer) == 0
    with pytest.raises(ConfigError, match="run.trains = 'all'.*was trained with 'decoder'"):
        run_tokenizer(small_config(published, *settings, "run.trains=all", "run.steps=5", num_images=2))


@pytest.mark.parametrize("had_one", [True, False])
def test_a_discriminator_neither_comes_nor_goes_within_a_run(published: Path, tmp_path: Path, had_one: bool):
    settings = (*ADVERSARY, "run.steps=1", f"run.root={tmp_path}", f"run.output={tmp_path / 'out'}")
    weights = ("adversarial.weight=0.1", "adversarial.weight=0.0")
    first, second = weights if had_one else weights[::-1]
    assert run_tokenizer(small_config(published, *settings, first, num_images=1)) == 0
    message = (
        r"adversarial.weight = 0.0: .* was trained with a discriminator, which cannot go within a run; set it as in"
        if had_one
        else r"adversarial.weight = 0.1: .* was trained without a discriminator.*; set adversarial.weight=0, or give"
    )
    with pytest.raises(ConfigError, match=message):
        run_tokenizer(small_config(published, *settings, second, "run.steps=2", num_images=1))
    # Another weight is no other network.
    if had_one:
        assert run_tokenizer(small_config(published, *settings, "adversarial.weight=0.2", num_images=1)) == 0


def test_no_image_as_large_as_the_crop(published: Path, tmp_path: Path):
    config = small_config(published, "data.sizes_px=[[2048, 2048]]", "data.images_px=4194304", f"run.root={tmp_path}")
    with pytest.raises(DataError, match=r"none of 16 images covers a crop of 2048 x 2048 px. Remove this size or add"):
        run_tokenizer(config)
