"""A tokenizer measured by several ranks: the numbers of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitdance_scale.demo.shards import write_shards
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.weights import save_weights
from tests.distributed.spawn import run_ranks

SIZES = {"num_bits": 16, "channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1}
NUM_FEATURES = 12


class Pooled(torch.nn.Module):
    """In place of Inception, which would take long: colours of the quarters of an image."""

    def forward(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


def _measure(rank: int, weights: Path, shards: Path):
    from bitdance_scale.config.parallel_schema import ParallelSection
    from bitdance_scale.data.held_out import HeldOutSize
    from bitdance_scale.train import tokenizer_measurement
    from bitdance_scale.train.process import StopRequest
    from bitdance_scale.train.run import joined_ranks
    from bitdance_scale.train.shared_index import image_index

    tokenizer_measurement.NUM_FEATURES = NUM_FEATURES
    sizes = [HeldOutSize((16, 16), 2, 7), HeldOutSize(None, 2, 7)]
    measuring = tokenizer_measurement.Measuring(weights, [str(shards)], sizes, num_shown=2)
    torch.set_num_threads(1)
    tokenizer_measurement.BATCH_PX = 2 * 16 * 16
    with joined_ranks(ParallelSection()) as topology:
        index = image_index(measuring.shards, "", max_skipped_share=1.0)
        measurer = tokenizer_measurement.Measurer(measuring, topology)
        measurer.inception = Pooled()
        return [measurer.measure(index, size, StopRequest()) for size in sizes]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measurement")
    torch.manual_seed(0)
    save_weights(folder / "weights", Autoencoder(**SIZES).state_dict(), published_config(**SIZES))
    write_shards(folder / "shards", num_images=7, per_shard=4, seed=0)
    return folder / "weights", folder / "shards"


def test_ranks_share_out_the_images(files):
    alone = run_ranks(1, _measure, *files)[0]
    first, second, third = run_ranks(3, _measure, *files)
    assert second == third == [None, None]
    for one, several in zip(alone, first, strict=True):
        assert len(one.samples) == 7 and np.array_equal(one.samples, several.samples)
        assert one.values.keys() == {"psnr_db", "psnr_flipped_db", "ssim"}
        for name, values in one.values.items():
            assert np.array_equal(values, several.values[name])
        assert np.array_equal(one.code_counts, several.code_counts)
        assert several.rfid == pytest.approx(one.rfid, rel=1e-9) and one.rfid > 0
        for shown, others in ((one.first, several.first), (one.worst, several.worst)):
            assert [item.sample for item in shown] == [item.sample for item in others]
            assert all(np.array_equal(a.decoded, b.decoded) for a, b in zip(shown, others, strict=True))
        worst = np.argsort(one.values["psnr_db"], kind="stable")[:2]
        assert [item.sample for item in one.worst] == one.samples[worst].tolist()
        assert [item.sample for item in one.first] == [0, 1]
