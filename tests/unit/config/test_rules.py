from __future__ import annotations

from pathlib import Path

import pytest

from bitdance_scale.config.describe import setting_docs
from bitdance_scale.config.load import load_config
from bitdance_scale.config.ranges import CONSTRAINTS
from bitdance_scale.config.rules import RULES, check, rules_table
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.shipped import CONFIGS
from bitdance_scale.errors import ConfigError

ONE_CLASS = "data.resolutions=[{{side_px=64, share=1, buckets_px=[{}]}}]"


def sources(*names_and_shares: str | int) -> list[str]:
    """Overrides that replace the shards by sources, given as name, share, name, share, ..."""
    pairs = zip(names_and_shares[::2], names_and_shares[1::2], strict=True)
    tables = ", ".join(f"{{name='{name}', share={share}, shards=['data/{name}']}}" for name, share in pairs)
    return ["data.shards=[]", f"data.sources=[{tables}]"]


# Any finite number or either truth value, or names that their readers check.
UNCONSTRAINED = {
    "checkpoint.fall_back",
    "checkpoint.in_background",
    "checkpoint.upload",
    "checkpoint.upload_endpoint_url",
    "checkpoint.upload_profile",
    "classes.map",
    "lora.rank_stabilized",
    "lora.train_projector",
    "lora.train_queries",
    "lora.start_from",
    "model.preset",
    "model.tie_embeddings",
    "vision.gan_decoder",
    "text.path",
    "optim.decays_vectors",
    "parallel.compile",
    "parallel.sequence_parallel",
    "head.time_mean",
    "data.bits_dir",
    "evaluate.benchmarks",
    "evaluate.benchmarks[].clip",
    "evaluate.benchmarks[].detector",
    "evaluate.benchmarks[].name",
    "evaluate.benchmarks[].prompts",
    "data.filters",
    "data.filters[].max",
    "data.filters[].min",
    "data.filters[].source",
    "data.has_borders",
    "data.stream_resampled",
    "data.index_dir",
    "data.s3.anonymous",
    "data.s3.cache_dir",
    "data.s3.endpoint_url",
    "data.s3.profile",
    "data.sources",
    "data.sources[].has_borders",
    "run.start_from",
    "run.start_from_any",
    "sample.use_cache",
    "observe.tensorboard",
}


def violations(path: Path, *overrides: str, world_size: int = 1) -> list[str]:
    config = load_config(path, overrides)
    with pytest.raises(ConfigError) as error:
        check(config, world_size)
    return str(error.value).splitlines()[1:]


@pytest.mark.parametrize("world_size", [1, 2, 20])
def test_legal_configuration_passes(config_path: Path, world_size: int) -> None:
    check(load_config(config_path), world_size)


def test_sources_pass_with_a_share_of_0_and_with_shares_that_reduce(config_path: Path) -> None:
    config = load_config(config_path, sources("open", 200_000, "off", 0, "own_2", 100_000))
    check(config, 2)
    assert [source.name for source in config.data.active_sources] == ["open", "own_2"]
    assert config.data.active_sources[1].shards == ("data/own_2",)
    (only,) = load_config(config_path).data.active_sources
    assert (only.name, only.shards) == ("", ("data/{00000..00003}.tar",))


def test_a_file_may_turn_the_shards_of_the_one_it_extends_into_sources_and_back(config_path: Path) -> None:
    tables = "".join(f'[[data.sources]]\nname = "{n}"\nshards = ["{n}"]\nshare = 1\n' for n in "ab")
    child, grandchild = config_path.with_name("child.toml"), config_path.with_name("grandchild.toml")
    child.write_text(f'extends = "{config_path.name}"\n[data]\nshards = []\n{tables}')
    check(load_config(child), 1)
    # A list replaces a list: nothing of the two sources is left.
    grandchild.write_text("""extends = "child.toml"\ndata.sources = []\ndata.shards = ["c"]\n""")
    for config in (load_config(grandchild), load_config(child, ["data.sources=[]", "data.shards=['c']"])):
        check(config, 1)
        assert [source.shards for source in config.data.active_sources] == [("c",)]
    child.write_text(f'extends = "{config_path.name}"\n{tables}')
    (message,) = violations(child)
    assert "only one of the two may name the data; set data.shards = [] (in the file that extends another" in message


def test_streams_pass_with_commands_addresses_and_sources(config_path: Path) -> None:
    shards = "data.shards=['pipe:zcat {a,b}.tar.gz', 'https://host/{00..10}.tar', 'data/c.tar']"
    check(load_config(config_path, ["data.mode=stream", shards]), 2)
    check(load_config(config_path, [*sources("open", 3, "own", 1), "data.mode=stream"]), 2)


@pytest.mark.parametrize("preset", ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"])
def test_presets_can_be_trained_at_tensor_4(config_path: Path, preset: str) -> None:
    check(load_config(config_path, [f"model.preset={preset}", "parallel.tensor=4"]), 8)


# (overrides, ranks, what the single message must say: where and value, rule, fix)
CASES: dict[str, tuple[list[str], int, list[str]]] = {
    "kv heads": (["model.num_kv_heads=3"], 1, ["model.num_kv_heads = 3", "model.num_heads = 4", "one of 1, 2, 4"]),
    "rotary pairs": (["model.head_dim=31"], 1, ["model.head_dim = 31", "even", "30 or 32"]),
    "flex heads": (
        ["model.attention=flex", "model.head_dim=8"],
        1,
        ["model.attention = 'flex'", "model.head_dim >= 16, it is 8", "'auto' or 'dense'"],
    ),
    "attention": (["model.attention=flash"], 1, ["model.attention = 'flash'", "one of auto, flex, dense"]),
    "2-D positions": (["model.hidden_size=126"], 1, ["model.hidden_size = 126", "multiple of 4", "124 or 128"]),
    "head width": (["head.width=100"], 1, ["head.width = 100", "head.head_dim = 32", "96 or 128"]),
    "adaLN": (["head.num_adaln=4", "head.num_blocks=6"], 1, ["head.num_adaln = 4", "num_blocks = 6", "1, 2, 3, 6"]),
    "token head": (
        ["head.kind=token", "model.hidden_size=128", "vision.num_bits=32"],
        1,
        ["head.kind = 'token'", "128 x 2^32 parameters", "about 10^11.7", "'diffusion' or 'bitwise'"],
    ),
    "bit-wise draws": (
        ["head.kind=bitwise", "head.diff_batch_mul=4"],
        1,
        ["head.diff_batch_mul = 4", "'bitwise' draws no times", "set it to 1"],
    ),
    "latents of text": (
        ["vision.latents=continuous", "vision.flip_max=0"],
        1,
        ["vision.latents = 'continuous'", "'text_to_image' predicts values between -1 and 1", "class_conditional"],
    ),
    "latents and a bit-wise head": (
        ["vision.latents=continuous", "head.kind=bitwise"],
        1,
        ["head.kind = 'bitwise'", "'continuous' has no bits to classify", "head.kind=diffusion"],
    ),
    "latents and flips": (
        ["vision.latents=continuous"],
        1,
        ["vision.flip_max = 0.1", "'continuous' has no bits to flip", "set it to 0"],
    ),
    "latents and noise": (
        ["vision.latents=continuous", "vision.gan_decoder=true"],
        1,
        ["vision.gan_decoder = true", "'continuous' has no decoder that takes noise", "set it to false"],
    ),
    "bytes": (["vision.num_bits=12"], 1, ["vision.num_bits = 12", "multiple of 8", "8 or 16"]),
    "norm groups": (
        ["vision.channels=24", "vision.norm_groups=32"],
        1,
        ["vision.channels = 24", "multiple of vision.norm_groups = 32", "use vision.channels = 32"],
    ),
    "floor": (["optim.lr_min=1.0"], 1, ["optim.lr_min = 1", "at most optim.lr", "lower it"]),
    "two falls": (
        ["optim.schedule=cosine", "optim.decay_steps=2", "optim.warmup_steps=0"],
        1,
        ["optim.decay_steps = 2", "'cosine' falls from", "optim.decay_steps=0"],
    ),
    "nothing falls": (
        ["optim.schedule=linear", "optim.warmup_steps=10000000"],
        1,
        ["optim.warmup_steps = 10000000", "less than run.steps", "'linear'"],
    ),
    "no averages": (
        ["sample.weights=averaged"],
        1,
        ["sample.weights = 'averaged'", "optim.average_decay = 0", "sample.weights=trained"],
    ),
    "averages of nothing": (
        ["run.start_weights=averaged"],
        1,
        ["run.start_weights = 'averaged'", "run.start_from = ''", "run.start_weights=trained"],
    ),
    "rate": (["optim.schedule=step"], 1, ["optim.schedule = 'step'", "one of constant, linear, cosine"]),
    "no bucket": (["checkpoint.upload='s3:///runs'"], 1, ["checkpoint.upload = 's3:///runs'", "s3://BUCKET/PREFIX"]),
    "no S3": (["checkpoint.upload=runs"], 1, ["checkpoint.upload = 'runs'", "must be s3://BUCKET/PREFIX"]),
    "borders of sources": (
        [*sources("open", 1), "data.has_borders=true"],
        1,
        ["data.has_borders = true beside data.sources", "set has_borders in those of the sources"],
    ),
    "mode": (["data.mode=streamed"], 1, ["data.mode = 'streamed'", "one of indexed, stream"]),
    "crops that end before they hold": (
        ["data.augment.crop=1", "data.augment.crop_until_epoch=750", "data.augment.crop_ends_epoch=700"],
        1,
        ["crop_until_epoch = 750 and crop_ends_epoch = 700", "data.augment.crop_ends_epoch=750 or more"],
    ),
    "no crops that end": (
        ["data.augment.crop_until_epoch=700", "data.augment.crop_ends_epoch=750"],
        1,
        ["data.augment.crop = 0", "set data.augment.crop=1, or both epochs to 0"],
    ),
    "crops of a stream that end": (
        ["data.mode=stream", "data.augment.crop=1", "data.augment.crop_ends_epoch=0.5"],
        1,
        ["crop_ends_epoch = 0.5 with data.mode = 'stream'", "no epochs", "set data.mode = 'indexed'"],
    ),
    "flips": (["data.augment.flip=1.5"], 1, ["data.augment.flip = 1.5", "in [0, 1]", "largest legal value is 1"]),
    "crops": (["data.augment.crop=-0.5"], 1, ["data.augment.crop = -0.5", "in [0, 1]", "smallest legal value is 0"]),
    "bits of a stream": (
        ["data.mode=stream", "data.bits_dir=bits"],
        1,
        ["data.bits_dir = 'bits'", "set data.mode = 'indexed', or data.bits_dir = ''"],
    ),
    "borders of a stream": (
        ["data.mode=stream", "data.has_borders=true"],
        1,
        ["has_borders = true with data.mode = 'stream'", "set data.mode = 'indexed'"],
    ),
    "command to index": (
        ["data.shards=['pipe:cat a.tar']"],
        1,
        ["shards 'pipe:cat a.tar': cannot be indexed", "set data.mode = 'stream'"],
    ),
    "stream of S3": (
        ["data.mode=stream", "data.shards=['s3://bucket/a.tar']"],
        1,
        ["shards 's3://bucket/a.tar' with data.mode = 'stream'", "set data.mode = 'indexed'"],
    ),
    "caption named twice": (
        ["data.captions=[{source='txt'}, {source='txt', share=2}]"],
        1,
        ["data.captions[1].source = 'txt'", "is listed before"],
    ),
    "caption without a field": (
        ["data.captions=[{source='json:'}]"],
        1,
        ["data.captions[0].source = 'json:'", "write json:re_caption"],
    ),
    "empty range of a filter": (
        ["data.filters=[{column='punsafe', min=1, max=0}]"],
        1,
        ["data.filters[0] (punsafe)", "min = 1 and max = 0", "set min <= max"],
    ),
    "filter that keeps all": (
        ["data.filters=[{column='punsafe', missing='keep'}]"],
        1,
        ["data.filters[0] (punsafe)", "keeps everything"],
    ),
    "filter of another source": (
        [*sources("open", 1), "data.filters=[{column='punsafe', max=0.5, source='opem'}]"],
        1,
        ["data.filters[0] (punsafe)", "source = 'opem'", "name one of open"],
    ),
    "replicas": (["parallel.tensor=2"], 3, ["parallel.tensor = 2", "divide the 3 ranks", "2 or 4 ranks"]),
    "stages": (
        ["parallel.pipeline=5"],
        5,
        ["parallel.pipeline = 5", "model.num_layers = 4", "parallel.pipeline = 4 or less"],
    ),
    "ZeRO-3 with pipeline": (
        ["parallel.zero_stage=3", "parallel.pipeline=2"],
        2,
        ["parallel.zero_stage = 3", "every micro-batch", "parallel.zero_stage = 1 or parallel.pipeline = 1"],
    ),
    "rounded sums of another engine": (
        ["run.dtype='bfloat16'", "parallel.optimizer=megatron", "parallel.reduce_dtype='bfloat16'"],
        1,
        ["parallel.reduce_dtype = bfloat16", "'megatron'", "set parallel.reduce_dtype = float32 or"],
    ),
    "float32 gradients rounded": (
        ["run.dtype='float32'", "parallel.reduce_dtype='bfloat16'"],
        1,
        ['parallel.reduce_dtype = "bfloat16"', 'run.dtype = "float32"', 'set parallel.reduce_dtype = "float32"'],
    ),
    "ZeRO-2 of another engine": (
        ["parallel.optimizer=megatron", "parallel.zero_stage=2"],
        1,
        ["parallel.zero_stage = 2", "'megatron'", "parallel.zero_stage = 1 or parallel.optimizer = deepspeed"],
    ),
    "virtual stages over layers": (
        ["parallel.pipeline=3", "parallel.virtual_stages=2"],
        3,
        ["parallel.virtual_stages = 2", "at most model.num_layers = 4", "parallel.pipeline = 2 or less"],
    ),
    "split of other stages": (
        ["parallel.pipeline=2", "parallel.pipeline_split=[1, 2, 1]"],
        2,
        ["parallel.pipeline_split = [1, 2, 1]", "has 3 entries and must have 2", '"auto"'],
    ),
    "split of other layers": (
        ["parallel.pipeline=2", "parallel.pipeline_split=[1, 2]"],
        2,
        ["parallel.pipeline_split = [1, 2]", "adds up to 3", "model.num_layers = 4"],
    ),
    "interleaved on one rank": (
        ["parallel.virtual_stages=2"],
        1,
        ["parallel.virtual_stages = 2", "must be 1 with parallel.pipeline = 1", "parallel.pipeline = 2 or more"],
    ),
    "interleaved with too few images": (
        ["parallel.virtual_stages=2", "parallel.pipeline=3", "model.num_layers=6"],
        24,
        ["data.global_batch = 20", "at least 24 = 8 replicas", "or parallel.virtual_stages = 1"],
    ),
    "sequence parallel alone": (
        ["parallel.sequence_parallel=true"],
        1,
        ["parallel.sequence_parallel = true", "false with parallel.tensor = 1", "parallel.tensor = 2 or more"],
    ),
    "sequence parallel over packs": (
        ["parallel.sequence_parallel=true", "parallel.tensor=2", "data.pack_multiple=9", "data.max_pack_tokens=9000"],
        2,
        ["data.pack_multiple = 9", "multiple of parallel.tensor = 2", "8 or 10"],
    ),
    "tensor over heads": (
        ["parallel.tensor=3"],
        3,
        ["parallel.tensor = 3", "model.num_heads = 4", "head.width / head.head_dim = 4", "use one of 1, 2"],
    ),
    "block side over bucket": (
        ["vision.block_side=3", "sample.size_px=[48, 48]", ONE_CLASS.format("[60, 72], [64, 64]")],
        1,
        ["data.resolutions[0].buckets_px[1] = [64, 64]", "multiples of 12 px", "vision.block_side = 3", "is [60, 60]"],
    ),
    "bucket": (
        [ONE_CLASS.format("[64, 64], [56, 90]")],
        1,
        ["data.resolutions[0].buckets_px[1] = [56, 90]", "multiples of 16 px", "nearest legal size is [48, 96]"],
    ),
    "sampled size": (["sample.size_px=[64, 60]"], 1, ["sample.size_px = [64, 60]", "multiples of 16", "[64, 64]"]),
    "resolution tokens": (["sample.size_px=[64, 1040]"], 1, ["sample.size_px = [64, 1040]", "at most 1024 px"]),
    "bucket twice": ([ONE_CLASS.format("[64, 64], [64, 64]")], 1, ["buckets_px[1] = [64, 64]", "listed before"]),
    "bucket of another resolution": ([ONE_CLASS.format("[128, 128]")], 1, ["[128, 128]", "4 times", "0.5 to 2"]),
    "shares": (["data.global_batch=25"], 1, ["data.global_batch = 25", "multiple of 10", "2:7:1", "use 20 or 30"]),
    "replicas without images": (["data.global_batch=10"], 20, ["global_batch = 10", "20 replicas", "fewer ranks"]),
    "replicas without held-out images": (
        ["evaluate.shards=['held_out']", "evaluate.images=10"],
        20,
        ["evaluate.images = 10: must be at least 20 for 20 replicas", "use evaluate.images >= 20 or fewer ranks"],
    ),
    "interleaved with too few held-out images": (
        ["evaluate.shards=['held_out']", "evaluate.images=10", "parallel.pipeline=2", "parallel.virtual_stages=2"],
        20,
        ["evaluate.images = 10: must be at least 20 for 10 replicas", "x parallel.pipeline = 2", "images >= 20"],
    ),
    "pack cap": (
        ["data.max_pack_tokens=1024"],
        1,
        # 1024 cells of 128 px at 4x; <|vision_start|>, two resolutions, <|vision_end|> and 15 queries; 32 and 32.
        ["data.max_pack_tokens = 1024", "at least 1107 = 1024 cells", "data.resolutions[2].buckets_px[0]", "use 1152"],
    ),
    "padding": (["data.pack_multiple=96"], 1, ["max_pack_tokens = 2048", "data.pack_multiple = 96", "2112"]),
    "run name": (["run.name=a/b"], 1, ["run.name = 'a/b'", "folder name"]),
    "run name of two lines": (['run.name="a\\nb"'], 1, ["run.name = 'a\\nb'", "without separators, line breaks"]),
    "run name above": (["run.name=.."], 1, ["run.name = '..'", "folder name"]),
    "no run name": (["run.name="], 1, ["run.name = ''", "folder name"]),
    "profiled ranks": (
        ["observe.profile_steps=[3]", "observe.profile_ranks=[0, 2]"],
        2,
        ["observe.profile_ranks = [0, 2]: 2 is no rank of 2", "use 0 to 1"],
    ),
    "profiled step": (["observe.profile_steps=[0]"], 1, ["observe.profile_steps[0] = 0", "at least 1"]),
    "steps": (["run.steps=0"], 1, ["run.steps = 0", "at least 1", "smallest legal value is 1"]),
    "probability": (["data.text_drop=1.5"], 1, ["data.text_drop = 1.5", "in [0, 1]", "largest legal value is 1"]),
    "decay": (["optim.beta2=1"], 1, ["optim.beta2 = 1.0", "in [0, 1)"]),
    "skipped share": (["optim.max_skipped_share=0"], 1, ["optim.max_skipped_share = 0.0", "in (0, 1]"]),
    "spike window": (["optim.spike_window=7"], 1, ["optim.spike_window = 7", "at least 8"]),
    "spike action": (["optim.spike_action=stop"], 1, ["optim.spike_action = 'stop'", "one of log, skip"]),
    "epsilon": (["optim.eps=1e-40"], 1, ["optim.eps = 1e-40", "at least"]),
    "dtype": (["run.dtype=bfloat"], 1, ["run.dtype = 'bfloat'", "one of float32, bfloat16", "mean 'bfloat16'?"]),
    "schedule": (["head.time_schedule=logit-normal"], 1, ["time_schedule = 'logit-normal'", "mean 'logit_normal'?"]),
    "sampler": (["sample.sampler=heun"], 1, ["sample.sampler = 'heun'", "one of euler_maruyama, euler"]),
    "wandb": (["observe.wandb_mode=on"], 1, ["observe.wandb_mode = 'on'", "auto, online, offline, disabled"]),
    "tokenizer kind": (["text.kind=hf"], 1, ["text.kind = 'hf'", "huggingface, sentencepiece"]),
    "engine": (["parallel.optimizer=megatrn"], 1, ["parallel.optimizer = 'megatrn'", "mean 'megatron'?"]),
    "ZeRO stage": (["parallel.zero_stage=0"], 1, ["parallel.zero_stage = 0", "one of 1, 2, 3"]),
    "empty prompt": (['sample.prompts=["x", " "]'], 1, ["sample.prompts[1] = ' '", "must not be empty"]),
    "no shards": (["data.shards=[]"], 1, ["data.shards = [] and data.sources = []", "no data", "name tars"]),
    "shards and sources": (
        [sources("a", 1, "b", 1)[1]],
        1,
        ["data.shards = ['data/{00000..00003}.tar'] and data.sources = a, b", "data.shards = []", "data.sources = []"],
    ),
    "source twice": (sources("a", 1, "b", 2, "a", 0), 1, ["data.sources[2].name = 'a'", "sources[0] has", "rename"]),
    "source name": (sources("a b", 1), 1, ["data.sources[0].name = 'a b'", "letters, digits and underscores"]),
    "source share": (sources("a", 1, "b", -1), 1, ["data.sources[1].share = -1", "at least 0", "legal value is 0"]),
    "no source share": (sources("a", 0, "b", 0), 1, ["data.sources[].share = 0:0", "at least one", "give a share"]),
    "fine shares": (sources("a", 20_000, "b", 2), 1, ["share = 20000:2", "add up to 10001", "at most 10000", "round"]),
    "source without shards": (
        ["data.shards=[]", "data.sources=[{name='a', share=1, shards=[]}]"],
        1,
        ["data.sources[0].shards = ()", "must not be empty"],
    ),
    "bucket number": ([ONE_CLASS.format("[64, 0]")], 1, ["data.resolutions[0].buckets_px[0][1] = 0", "at least 1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refusal_names_setting_value_rule_and_fix(config_path: Path, case: str) -> None:
    overrides, world_size, expected = CASES[case]
    messages = violations(config_path, *overrides, world_size=world_size)
    matching = [message for message in messages if all(part in message for part in expected)]
    assert len(matching) == 1, messages


def test_continuous_latents_may_have_any_number_of_channels(config_path: Path) -> None:
    sizes = ["vision.num_bits=4", "vision.channels=24"]
    assert [message.split(" = ")[0] for message in violations(config_path, *sizes)] == [
        "- vision.num_bits",
        "- vision.channels",
    ]
    (message,) = violations(config_path, *sizes, "vision.latents=continuous", "vision.flip_max=0")
    assert "vision.latents" in message


def test_class_named_twice_is_refused(config_path: Path) -> None:
    twice = "{side_px=64, share=1, buckets_px=[[64, 64]]}"
    (message,) = violations(config_path, f"data.resolutions=[{twice}, {twice}]")
    assert "data.resolutions[1].side_px = 64: another resolution has this side" in message


def test_all_violations_are_listed_and_rules_over_illegal_settings_are_skipped(config_path: Path) -> None:
    overrides = ["data.pack_multiple=0", "data.global_batch=25", "parallel.tensor=0", "vision.num_bits=3"]
    messages = violations(config_path, *overrides, world_size=4)
    assert [message.split(" = ")[0] for message in messages] == [
        "- data.pack_multiple",
        "- parallel.tensor",
        "- vision.num_bits",
        "- data.global_batch",
    ]


def test_every_setting_is_constrained_or_known_to_be_free() -> None:
    settings = {doc.path for doc in setting_docs(RunConfig)}
    constrained = {path.removesuffix("[]") for path in CONSTRAINTS}
    assert constrained <= settings
    assert settings - constrained == UNCONSTRAINED


def test_rules_read_settings_that_exist_and_state_claim_and_reason() -> None:
    settings = {doc.path for doc in setting_docs(RunConfig)}
    for rule in RULES:
        assert rule.claim.endswith(".") and rule.reason.endswith("."), rule
        for name in rule.settings:
            assert any(path == name or path.startswith((f"{name}.", f"{name}[")) for path in settings), name


def test_table_has_a_row_for_every_rule_and_setting() -> None:
    table = rules_table()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(RULES) + len(CONSTRAINTS)


@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"], ["parallel.pipeline=2"], ["parallel.zero_stage=3"]])
def test_demo_can_be_trained(layout: list[str]) -> None:
    demo = CONFIGS / "demo.toml"
    check(load_config(demo, layout), 2)


def test_rules_over_ranks_wait_until_ranks_are_known(config_path: Path) -> None:
    config = load_config(config_path, ["parallel.tensor=2"])
    check(config, None)
    with pytest.raises(ConfigError, match="must divide the 3 ranks"):
        check(config, 3)
    assert sum(rule.needs_ranks for rule in RULES) == 5
    with pytest.raises(ConfigError, match=r"parallel.tensor = 3: must divide"):
        check(load_config(config_path, ["parallel.tensor=3"]), None)


def test_held_out_images_are_counted_where_there_are_any(config_path: Path) -> None:
    layout = ["parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.zero_stage=3"]
    check(load_config("ct_14b", layout), 512)
    held_out = ["evaluate.shards=['held_out']"]
    with pytest.raises(ConfigError, match="evaluate.images = 256: must be at least 512 for 512 replicas"):
        check(load_config("ct_14b", [*layout, *held_out]), 512)
    check(load_config(config_path, [*held_out, "evaluate.images=20"]), 20)
