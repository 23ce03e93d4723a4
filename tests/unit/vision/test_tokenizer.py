"""Images to bits and back: token order, independence of the batch, and errors about bad weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.errors import CheckpointError, ConfigError, DataError
from bitdance_scale.float32_products import float32_products
from bitdance_scale.sequence.layout import block_raster_cells
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.bits import pack_bits, unpack_bits
from bitdance_scale.vision.tokenizer import VisionTokenizer
from bitdance_scale.vision.weights import save_weights

SIZES = {"num_bits": 16, "channels": 32, "channel_mult": (1, 1, 2), "num_res_blocks": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    save_weights(folder, Autoencoder(**SIZES).state_dict(), published_config(**SIZES))
    return folder


def section(folder: Path, **changes: object) -> VisionSection:
    return VisionSection(**({"weights": str(folder / "ae.safetensors"), "block_side": 4} | SIZES | changes))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> VisionTokenizer:
    return VisionTokenizer(section(folder), "cpu")


def random_images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]


def test_tokens_stand_in_block_raster_order(tokenizer: VisionTokenizer):
    (image,) = random_images((32, 64))
    pixels = (image.permute(2, 0, 1).float() / 127.5 - 1)[None]
    grid_bits = tokenizer.autoencoder.encode(pixels)[0]
    cells = block_raster_cells((8, 16), block_side=4)
    expected = torch.stack([grid_bits[:, row, column] for row, column in cells.tolist()])
    (packed,) = tokenizer.encode([image])
    assert packed.dtype == np.uint8 and packed.shape == (128, 2)
    np.testing.assert_array_equal(unpack_bits(packed), expected.numpy())


@pytest.mark.parametrize("order", ["block", "raster"])
def test_the_first_tokens_are_an_image_with_grey_cells(folder: Path, order: str):
    tokenizer, grid = VisionTokenizer(section(folder, order=order), "cpu"), (8, 12)
    bits = torch.randint(0, 2, (96, 16), generator=torch.Generator().manual_seed(2)) * 2.0 - 1
    with_zeros = bits.clone()
    with_zeros[32:] = 0
    expected = tokenizer.decode(with_zeros, grid)
    found = tokenizer.decode_first(bits[:32], grid)
    # Two of the blocks of 4 x 4 cells, side by side, or rows of 12 cells; a cell is 4 px.
    is_drawn = torch.zeros(32, 48, dtype=torch.bool)
    if order == "block":
        is_drawn[:16, :32] = True
    else:
        is_drawn[:8], is_drawn[8:12, :32] = True, True
    assert (found[is_drawn] == expected[is_drawn]).all() and (found[~is_drawn] == 128).all()
    assert (expected[~is_drawn] != 128).any()
    assert torch.equal(tokenizer.decode_first(bits, grid), tokenizer.decode(bits, grid))
    with pytest.raises(ValueError, match="bits of 96 cells do not fit into grid"):
        tokenizer.decode_first(bits, (4, 4))


def to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to the ten bits of mantissa that tensor cores multiply, to the nearest, at a tie to the even one."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def coarse(folder: Path) -> VisionTokenizer:
    """A tokenizer that multiplies as tensor cores do in TF32; nothing else about it is said."""
    tokenizer = VisionTokenizer(section(folder), "cpu")
    for module in tokenizer.autoencoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = to_tf32(module.weight.data)
            module.register_forward_pre_hook(lambda _module, inputs: (to_tf32(inputs[0]),))
    return tokenizer


def test_a_code_is_of_its_image_up_to_the_rounding_that_is_said(
    folder: Path, tokenizer: VisionTokenizer, coarse: VisionTokenizer
):
    image, other = random_images((256, 256), (256, 256))
    (exact,), (rounded,) = tokenizer.encode([image]), coarse.encode([image])
    share = float(np.unpackbits(exact ^ rounded).mean())
    assert 0 < share < 5e-3, "otherwise the test says nothing"
    said = VisionTokenizer(section(folder, precision="tf32"), "cpu")
    assert tokenizer.is_of(exact.tobytes(), image) and not tokenizer.is_of(rounded.tobytes(), image)
    assert said.is_of(exact.tobytes(), image) and said.is_of(rounded.tobytes(), image)
    # What is not rounding: another image, or a bit whose latent is far from 0.
    assert not said.is_of(exact.tobytes(), other)
    values = tokenizer._rows(image[None], tokenizer.autoencoder.latents)[0].abs()
    token, bit = divmod(int(values.argmax()), values.shape[1])
    exact[token, bit // 8] ^= 0x80 >> bit % 8
    assert not said.is_of(exact.tobytes(), image)


def test_the_network_runs_with_the_precision_that_is_said(folder: Path):
    tokenizer = VisionTokenizer(section(folder, precision="tf32"), "cpu")
    found = []
    for part in (tokenizer.autoencoder.encoder, tokenizer.autoencoder.decoder):
        part.register_forward_hook(lambda *_: found.append(torch.backends.cudnn.conv.fp32_precision))
    with float32_products("float32"):
        (bits,) = tokenizer.encode(random_images((32, 32)))
        tokenizer.decode(bits, (8, 8))
        assert found == ["tf32", "tf32"] and torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_bits_do_not_depend_on_the_batch(folder: Path):
    sizes = [(32, 32), (16, 48), (32, 32), (64, 64), (32, 32), (64, 64), (16, 48), (32, 32)]
    images = random_images(*sizes)
    together = VisionTokenizer(section(folder), "cpu").encode(images)
    alone = VisionTokenizer(section(folder), "cpu", max_batch_px=1).encode(images)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_are_bounded_by_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = VisionTokenizer(section(folder), "cpu", max_batch_px=2 * 32 * 32)
    shapes = []
    encode = tokenizer.autoencoder.encode
    monkeypatch.setattr(
        tokenizer.autoencoder, "encode", lambda pixels: shapes.append(tuple(pixels.shape)) or encode(pixels)
    )
    tokenizer.encode(random_images(*[(32, 32)] * 5, (64, 64)))
    assert shapes == [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 32), (1, 3, 64, 64)]


def test_decoding_takes_packed_bits_and_signs_and_is_the_published_formula(tokenizer: VisionTokenizer):
    (packed,) = tokenizer.encode(random_images((32, 48)))
    signs = unpack_bits(torch.from_numpy(packed))
    image = tokenizer.decode(packed, (8, 12))
    assert image.dtype == torch.uint8 and image.shape == (32, 48, 3)
    torch.testing.assert_close(tokenizer.decode(signs, (8, 12)), image, rtol=0, atol=0)
    grid = torch.empty(16, 8, 12)
    for i, (row, column) in enumerate(block_raster_cells((8, 12), 4).tolist()):
        grid[:, row, column] = signs[i]
    expected = (127.5 * tokenizer.autoencoder.decode(grid[None])[0] + 128).clamp(0, 255).floor().to(torch.uint8)
    torch.testing.assert_close(image, expected.permute(1, 2, 0), rtol=0, atol=0)


def test_half_precision_weights_are_computed_in_float32(folder: Path, tmp_path: Path):
    halves = {name: tensor.half() for name, tensor in load_file(folder / "ae.safetensors").items()}
    save_file(halves, tmp_path / "ae.safetensors")
    tokenizer = VisionTokenizer(section(tmp_path), "cpu")
    assert {parameter.dtype for parameter in tokenizer.autoencoder.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in tokenizer.autoencoder.parameters())


def test_bfloat16_decodes_about_the_same_image(folder: Path, tokenizer: VisionTokenizer):
    (packed,) = tokenizer.encode(random_images((32, 48)))
    narrow = VisionTokenizer(section(folder), "cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.autoencoder.parameters()} == {torch.bfloat16}
    found, expected = (each.decode(packed, (8, 12)).float() for each in (narrow, tokenizer))
    # bfloat16 carries 8 bits: a step or two of 255 per layer, of which there are about a dozen.
    assert (found - expected).abs().mean() < 3


def test_weights_are_written_with_their_published_sizes(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == ["ae.safetensors", "ae_config.json"]
    config = json.loads((folder / "ae_config.json").read_text())
    assert config["ddconfig"]["ch_mult"] == [1, 1, 2] and config["gan_decoder"] is False


def test_missing_weights_name_the_setting(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"vision\.weights = .*nowhere.*no such file"):
        VisionTokenizer(section(tmp_path, weights=str(tmp_path / "nowhere.safetensors")), "cpu")


def test_weights_of_other_sizes_name_the_tensor(folder: Path):
    with pytest.raises(
        CheckpointError, match=r"encoder\.conv_out\.weight has shape \[16, 64, 1, 1\], expected \[32, 64, 1, 1\]"
    ):
        VisionTokenizer(section(folder, num_bits=32), "cpu")
    with pytest.raises(CheckpointError, match=r"encoder\.down\.0\.block\.1\.norm1\.weight is missing.* and 45 more"):
        VisionTokenizer(section(folder, num_res_blocks=2), "cpu")


def test_superfluous_tensors_are_named(folder: Path, tmp_path: Path):
    save_file(load_file(folder / "ae.safetensors") | {"loss.logvar": torch.zeros(1)}, tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match=r"loss\.logvar is no tensor of this network"):
        VisionTokenizer(section(tmp_path), "cpu")


def test_damaged_weights_are_reported(folder: Path, tmp_path: Path):
    content = (folder / "ae.safetensors").read_bytes()
    (tmp_path / "ae.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        VisionTokenizer(section(tmp_path), "cpu")


def test_images_that_do_not_fit_the_blocks_are_refused(tokenizer: VisionTokenizer):
    with pytest.raises(DataError, match=r"image 1: 32 x 40 px.*multiples of 16 px"):
        tokenizer.encode(random_images((32, 32), (32, 40)))
    with pytest.raises(DataError, match=r"image 0: torch.float32 \(32, 32, 3\), expected uint8"):
        tokenizer.encode([torch.zeros(32, 32, 3)])


def test_bits_that_do_not_fill_the_grid_are_refused(tokenizer: VisionTokenizer):
    with pytest.raises(ValueError, match=r"not 16 bits per cell of grid \(4, 8\)"):
        tokenizer.decode(pack_bits(torch.ones(16, 16)), (4, 8))
