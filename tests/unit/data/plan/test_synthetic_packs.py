"""Synthetic packs have the mix of the configuration."""

from __future__ import annotations

from bitdance_scale.config.load import load_config
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.data.plan.synthetic_packs import typical_packs

CONFIG = CONFIGS / "pt_14b.toml"


def test_one_replica_gets_the_batch_in_its_shares():
    config = load_config(CONFIG, ["data.global_batch=80"])
    packs = typical_packs(config, num_replicas=1)
    cells = [int(height) * int(width) for pack in packs for height, width in pack.sample_grids]
    # 2 : 7 : 1 of 80 images; the buckets of a resolution have about as many cells as its square (16, 32, 64 a side).
    counts = [sum(low <= count < high for count in cells) for low, high in ((0, 400), (400, 2048), (2048, 5000))]
    assert counts == [16, 56, 8]
    assert all(pack.num_positions <= config.data.max_pack_tokens for pack in packs)
    targets = [len(pack.text_targets) for pack in packs]
    assert targets == sorted(targets, reverse=True)
    # Captions are as long as they may be.
    assert sum(targets) >= 80 * config.text.max_caption_tokens


def test_replicas_share_the_batch():
    config = load_config(CONFIG, ["data.global_batch=80"])
    whole = sum(len(pack.sample_keys) for pack in typical_packs(config, num_replicas=1))
    part = sum(len(pack.sample_keys) for pack in typical_packs(config, num_replicas=4))
    assert whole == 80 and 10 <= part <= 30
