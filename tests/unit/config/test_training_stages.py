"""The stage configurations against Table 4 of the paper, and the rules of their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import ConfigError

ROOT = Path(__file__).parents[3]
STAGE_NAMES = ("pt", "ct", "sft", "distill")
# arXiv 2602.14041 Table 4, column by column.
TABLE_4 = {
    "learning rate": (1e-4, 1e-4, 2e-5, 2e-5),
    "weight decay": (0.0, 0.0, 0.0, 0.0),
    "gradient norm clip": (1.0, 1.0, 1.0, 1.0),
    "optimizer": ((0.9, 0.95, 1e-15),) * 4,
    "loss weight (text : vision)": ((0.01, 1.0),) * 4,
    "warm-up steps": (2000, 1000, 500, 500),
    "training steps": (100_000, 40_000, 40_000, 20_000),
    "batch size": (2560, 2480, 2320, 1536),
    "resolution (256:512:1024)": ((2, 7, 1), (0, 1, 1), (0, 1, 1), (0, 0, 1)),
    "text drop": (0.1, 0.1, 0.1, 0.1),
    "block side p": (4, 4, 4, 8),
}
# Table 4 also counts the images seen, in millions.
IMAGES_SEEN_M = (256, 99.2, 92.8, 30.7)


def rows(config) -> dict[str, object]:
    """A configuration in the words of the table."""
    shares = {resolution.side_px: resolution.share for resolution in config.data.resolutions}
    optim = config.optim
    return {
        "learning rate": optim.lr,
        "weight decay": optim.weight_decay,
        "gradient norm clip": optim.clip_norm,
        "optimizer": (optim.beta1, optim.beta2, optim.eps),
        "loss weight (text : vision)": (config.loss.text_weight, config.loss.vision_weight),
        "warm-up steps": optim.warmup_steps,
        "training steps": config.run.steps,
        "batch size": config.data.global_batch,
        "resolution (256:512:1024)": tuple(shares.pop(side, 0) for side in (256, 512, 1024)),
        "text drop": config.data.text_drop,
        "block side p": config.vision.block_side,
    } | ({"other resolutions": shares} if shares else {})


@pytest.mark.parametrize("number", range(4), ids=STAGE_NAMES)
def test_the_14b_stages_are_those_of_table_4(number):
    config = load_config(CONFIGS / f"{STAGE_NAMES[number]}_14b.toml")
    assert rows(config) == {row: values[number] for row, values in TABLE_4.items()}
    assert round(config.run.steps * config.data.global_batch / 1e6, 1) == IMAGES_SEEN_M[number]
    assert config.model.preset == "qwen3-14b" and config.vision.num_bits == 32


@pytest.mark.parametrize("size", ["14b", "0p6b", "demo"])
def test_every_stage_starts_from_the_one_before(size):
    ranks = {"14b": 64, "0p6b": 8, "demo": 2}[size]
    before = ""
    for stage in STAGE_NAMES:
        name = "demo" if (stage, size) == ("pt", "demo") else f"{stage}_{size}"
        config = load_config(CONFIGS / f"{name}.toml")
        check(config, ranks)
        assert (config.run.stage, config.run.name) == (stage, name)
        assert config.run.start_from == (f"runs/{before}" if before else "")
        before = config.run.name


def test_the_example_of_several_sources_is_legal_and_mixes_as_it_says(tmp_path):
    """docs/stages.md: 3 : 1 of 2,320 images, 1,740 and 580."""
    section = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8").split("## Several sources in a stage")[1]
    example = tmp_path / "example.toml"
    example.write_text(section.split("```toml\n")[1].split("```")[0])
    config = load_config(example)
    check(config, 64)
    shares = {source.name: source.share for source in config.data.active_sources}
    images = {name: config.data.global_batch * share // sum(shares.values()) for name, share in shares.items()}
    assert images == {"open": 1740, "generated": 580}
    # Of both resolutions alike: each has a whole number of the shares' sum.
    assert config.data.global_batch // 2 % sum(shares.values()) == 0


def test_entry_points_are_there():
    for stage in STAGES.values():
        assert (ROOT / stage.entry_point).is_file()
        assert stage.follows in ("", *STAGES)


def test_a_later_stage_without_a_start_is_refused():
    config = load_config(CONFIGS / "ct_demo.toml", ["run.start_from="])
    with pytest.raises(ConfigError, match="continued training goes on from weights; name the run of stage 'pt'"):
        check(config, 2)
