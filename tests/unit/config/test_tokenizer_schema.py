"""The configuration of tokenizer training: the shipped file is legal, and each mistake is named with its fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdance_scale.config.describe import setting_docs
from bitdance_scale.config.kinds import check_any
from bitdance_scale.config.load import dump_toml, load_config
from bitdance_scale.config.ranges import CONSTRAINTS, Choice, NonEmpty, Range, demand
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.config.tokenizer_rules import TOKENIZER_CONSTRAINTS, check_tokenizer
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.errors import ConfigError

ROOT = Path(__file__).parents[3]
DEMO = CONFIGS / "demo_tokenizer.toml"
SIZES = [
    "autoencoder.num_bits=16", "autoencoder.channels=32", "autoencoder.channel_mult=[1, 1, 2]",
    "autoencoder.norm_groups=32", "data.sizes_px=[[32, 32]]", "optim.average_decay=0.0", "evaluate.weights=trained",
]  # fmt: skip


def test_the_demo_is_legal_on_one_and_two_ranks_and_round_trips(tmp_path: Path):
    config = load_config(DEMO, schema=TokenizerConfig)
    check_tokenizer(config, 1)
    check_tokenizer(config, 2)
    (tmp_path / "copy.toml").write_text(dump_toml(config))
    assert load_config(tmp_path / "copy.toml", schema=TokenizerConfig) == config


def test_the_demo_run_uses_the_sizes_of_the_demo_tokenizer():
    network = load_config(DEMO, schema=TokenizerConfig).autoencoder
    vision = load_config(CONFIGS / "demo.toml", schema=RunConfig).vision
    names = ("num_bits", "channels", "channel_mult", "num_res_blocks", "norm_groups", "downsample")
    assert [getattr(network, name) for name in names] == [getattr(vision, name) for name in names]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('run.name="a\\nb"', r"run.name = 'a\\nb': must be a plain folder name"),
        ("observe.profile_steps=[0]", r"observe.profile_steps\[0\] = 0: must be at least 1"),
        ("observe.profile_ranks=[-1]", r"observe.profile_ranks\[0\] = -1: must be at least 0"),
        (
            "observe.wandb_mode=disable",
            r"observe.wandb_mode = 'disable': must be one of auto, .*; did you mean 'disabled'\?",
        ),
        ("run.root=", r"run.root = '': must not be empty"),
        ("run.output=", r"run.output = '': must not be empty"),
        ("data.shards=[]", r"data.shards = \(\): must not be empty"),
        ("evaluate.shards=['']", r"evaluate.shards\[0\] = '': must not be empty"),
        ("run.seed=2147483648", r"run.seed = 2147483648: must be in \[0, 2.14748e\+09\)"),
        ("run.name=../x", r"run.name = '../x': must be a plain folder name"),
        ("run.name=", r"run.name = '': must be a plain folder name"),
        ("autoencoder.num_bits=12", r"autoencoder.num_bits = 12: bits fill whole bytes; use a multiple of 8"),
        ("autoencoder.channels=48", r"autoencoder.channels = 48: .*multiple of 32"),
        ("autoencoder.channel_mult=[]", r"autoencoder.channel_mult = \[\]"),
        ("autoencoder.num_res_blocks=0", r"autoencoder.num_res_blocks = 0"),
        ("quantiser.num_groups=3", r"quantiser.num_groups = 3: .*use 2"),
        ("quantiser.temperature=0.0", r"quantiser.temperature = 0.0: must be greater than 0"),
        ("quantiser.flip_max=1.0", r"quantiser.flip_max = 1.0: must be in \[0, 1\)"),
        ("quantiser.entropy_weight=-0.1", r"quantiser.entropy_weight = -0.1: must be at least 0"),
        ("optim.max_skipped_share=0.0", r"optim.max_skipped_share = 0.0: must be in \(0, 1\]"),
        ("optim.skipped_window=0", r"optim.skipped_window = 0: must be at least 1"),
        ("optim.spike_deviations=-1.0", r"optim.spike_deviations = -1.0: must be at least 0"),
        ("optim.spike_window=7", r"optim.spike_window = 7: must be at least 8"),
        ("optim.spike_action=stop", r"optim.spike_action = 'stop': must be one of log, skip"),
        ("run.output_weights=both", r"run.output_weights = 'both': must be one of auto, trained, averaged"),
        ("run.output_weights=averaged", r"run.output_weights = 'averaged': optim.average_decay = 0, .*=trained"),
        ("evaluate.weights=averaged", r"evaluate.weights = 'averaged': optim.average_decay = 0, .*such as 0.9999"),
        ("optim.average_decay=1.0", r"optim.average_decay = 1.0: must be in \[0, 1\)"),
        ("optim.schedule=step", r"optim.schedule = 'step': must be one of constant, linear, cosine"),
        ("optim.lr_min=1.0", r"optim.lr_min = 1: must be at most optim.lr"),
        ("optim.lr_min=-1.0", r"optim.lr_min = -1.0: must be at least 0"),
        ("optim.decay_steps=5", r"optim.decay_steps = 5: optim.schedule = 'cosine' falls from"),
        ("run.dtype=float16", r"run.dtype = 'float16': must be one of float32, bfloat16; did you mean 'bfloat16'"),
        ("run.steps=0", r"run.steps = 0: must be at least 1"),
        ("data.sizes_px=[[34, 32]]", r"data.sizes_px: 34 x 32 px: sides must be multiples of the downsampling, 4 px"),
        ("data.sizes_px=[[4, 4]]", r"more than one cell"),
        (
            "data.images_px=65537",
            r"data.images_px = 65537: must be a multiple of 32 \* 32 px, so that a step has whole",
        ),
        ("data.images_px=1024", r"a step of 32 x 32 px has 1 images, fewer than the 2 ranks; use 2048 or more"),
        ("evaluate.sizes_px=[]", r"evaluate.sizes_px is empty"),
        ("quantiser.num_groups=-1", r"quantiser.num_groups = -1: groups share the 16 bits equally.*use 2"),
        ("quantiser.entropy_ramp=-1.0", r"quantiser.entropy_ramp = -1.0: must be at least 0"),
        ("quantiser.entropy_ramp_steps=0", r"quantiser.entropy_ramp_steps = 0: must be at least 1"),
        ("reconstruction.l1_weight=-1.0", r"reconstruction.l1_weight = -1.0: must be at least 0"),
        ("reconstruction.l2_weight=-1.0", r"reconstruction.l2_weight = -1.0: must be at least 0"),
        ("reconstruction.edge_weight=-1.0", r"reconstruction.edge_weight = -1.0: must be at least 0"),
        ("reconstruction.lpips_weight=-1.0", r"reconstruction.lpips_weight = -1.0: must be at least 0"),
        (
            "reconstruction.lpips_weight=1.0",
            r"lpips_weight = 1.0 without reconstruction.lpips_weights: .*vgg16-397923af",
        ),
        ("adversarial.weight=-1.0", r"adversarial.weight = -1.0: must be at least 0"),
        ("adversarial.start_step=-1", r"adversarial.start_step = -1: must be at least 0"),
        ("adversarial.channels=0", r"adversarial.channels = 0: must be at least 1"),
        ("adversarial.num_layers=0", r"adversarial.num_layers = 0: must be at least 1"),
        ("adversarial.lecam_weight=-1.0", r"adversarial.lecam_weight = -1.0: must be at least 0"),
        ("adversarial.lecam_decay=1.0", r"adversarial.lecam_decay = 1.0: must be in \[0, 1\)"),
        ("adversarial.rate_factor=0.0", r"adversarial.rate_factor = 0.0: must be greater than 0"),
        ("run.trains=encoder", r"run.trains = 'encoder': must be one of all, decoder"),
        ("run.trains=decoder", r'run.trains = "decoder" without run.start_from: encoder and bits would stay random'),
        ("parallel.recompute=all", r"parallel.recompute = 'all': must be one of none, blocks"),
        ("autoencoder.gan_decoder=true", r"gan_decoder = true with adversarial.weight = 0: without a discriminator"),
    ],
)
def test_mistakes_are_named(override: str, message: str):
    config = load_config(DEMO, [*SIZES, override], TokenizerConfig)
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(config, 2)


# Either truth value, names that their readers check, or what has rules of its own.
UNCONSTRAINED = {
    "run.start_from",
    "autoencoder.num_bits",
    "autoencoder.channels",
    "autoencoder.channel_mult",
    "autoencoder.num_res_blocks",
    "autoencoder.norm_groups",
    "autoencoder.gan_decoder",
    "quantiser.num_groups",
    "reconstruction.lpips_weights",
    "parallel.shard_optimizer",
    "parallel.channels_last",
    "data.index_dir",
    "data.sizes_px",
    "data.images_px",
    "evaluate.sizes_px",
    "checkpoint.in_background",
    "checkpoint.fall_back",
    "checkpoint.upload",
    "checkpoint.upload_endpoint_url",
    "checkpoint.upload_profile",
    "observe.tensorboard",
}
# A value that each kind of constraint refuses, as TOML.
ILLEGAL = {Choice: '"neither"', NonEmpty: '""', Range: "-1"}
SHARED = [path for path in CONSTRAINTS if path.startswith(("checkpoint.", "observe."))]


@pytest.mark.parametrize("path", SHARED)
def test_shared_sections_have_the_constraints_of_text_to_image(path: str):
    value = ILLEGAL[type(CONSTRAINTS[path])]
    override = f"{path.removesuffix('[]')}={f'[{value}]' if path.endswith('[]') else value}"
    for config in (load_config(CONFIGS / "demo.toml", [override]), load_config(DEMO, [override], TokenizerConfig)):
        with pytest.raises(ConfigError) as caught:
            check_any(config, 1)
        (line,) = str(caught.value).splitlines()[1:]
        assert line.startswith(f"- {path.replace('[]', '[0]')} = ") and demand(CONSTRAINTS[path]) in line


def test_every_setting_is_constrained_or_checked_elsewhere():
    settings = {doc.path for doc in setting_docs(TokenizerConfig)}
    assert {path for path in settings if not {path, f"{path}[]"} & TOKENIZER_CONSTRAINTS.keys()} == UNCONSTRAINED


def test_profiled_ranks_are_of_the_job():
    config = load_config(DEMO, ["observe.profile_steps=[3]", "observe.profile_ranks=[0, 2]"], TokenizerConfig)
    # The number of ranks is not known.
    check_any(config, None)
    with pytest.raises(ConfigError, match=r"observe.profile_ranks = \[0, 2\]: 2 is no rank of 2; use 0 to 1"):
        check_any(config, 2)


def test_crops_too_small_for_a_loss_are_named():
    small = ["data.sizes_px=[[16, 32], [8, 32]]", "data.images_px=65536"]
    with pytest.raises(ConfigError) as caught:
        check_tokenizer(load_config(DEMO, [*SIZES, *small, "adversarial.weight=0.1"], TokenizerConfig), 1)
    found = [line for line in str(caught.value).splitlines() if "discriminator" in line]
    assert [line.split(":")[1] for line in found] == [" 16 x 32 px", " 8 x 32 px"]
    assert "3 layers need sides of 24 px or more" in found[0] and "adversarial.weight = 0" in found[0]
    check_tokenizer(
        load_config(DEMO, [*SIZES, *small, "adversarial.weight=0.1", "adversarial.num_layers=1"], TokenizerConfig), 1
    )
    lpips = ["reconstruction.lpips_weight=1.0", "reconstruction.lpips_weights=vgg.pth"]
    with pytest.raises(ConfigError) as caught:
        check_tokenizer(load_config(DEMO, [*SIZES, *small, *lpips], TokenizerConfig), 1)
    (line,) = str(caught.value).splitlines()[1:]
    assert "8 x 32 px: LPIPS needs sides of 16 px or more" in line


def test_groups_are_of_eight_bits_unless_said_otherwise():
    for num_bits, num_groups in ((8, 1), (32, 4), (128, 16), (256, 32)):
        settings = [f"autoencoder.num_bits={num_bits}"]
        assert load_config(DEMO, settings, TokenizerConfig).num_groups == num_groups
        assert load_config(DEMO, [*settings, "quantiser.num_groups=8"], TokenizerConfig).num_groups == 8


def test_all_mistakes_are_listed_at_once():
    config = load_config(DEMO, ["run.steps=0", "optim.lr=0.0"], TokenizerConfig)
    with pytest.raises(ConfigError, match=r"(?s)run.steps = 0.*optim.lr = 0.0"):
        check_tokenizer(config, 1)
