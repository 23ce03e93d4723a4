from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdance_scale.config.data_schema import DataFilter, Resolution
from bitdance_scale.config.describe import describe, setting_docs
from bitdance_scale.config.load import dump_toml, load_config
from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.setting import setting
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.errors import ConfigError


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


def test_values_are_typed_and_defaults_filled_in(config_path: Path) -> None:
    config = load_config(config_path)
    assert config.run.steps == 100
    assert config.data.shards == ("data/{00000..00003}.tar",)
    assert config.data.resolutions[1] == Resolution(side_px=64, share=7, buckets_px=((64, 64), (48, 80)))
    assert config.vision.channel_mult == (1, 1, 2)
    assert config.optim.eps == 1e-15
    assert config.sample.prompts == ('a red "circle"', "two\nlines")


def test_preset_lies_between_defaults_and_explicit_settings(config_path: Path) -> None:
    config = load_config(config_path, ["model.num_layers=2", "head.num_blocks=4"])
    assert (config.model.num_layers, config.model.hidden_size, config.model.head_dim) == (2, 128, 32)
    assert (config.head.num_blocks, config.head.num_adaln, config.head.width) == (4, 1, 128)
    large = load_config(config_path, ["model.preset=qwen3-14b"])
    assert (large.model.num_layers, large.model.ffn_size, large.head.width) == (40, 17408, 5120)
    # Not in the preset, so the schema's default.
    assert large.head.num_blocks == 6


def test_preset_sizes_are_those_of_the_published_models() -> None:
    # Backbone without embeddings, in billions, from the Qwen3 model cards ("Number of Parameters (Non-Embedding)").
    published = {"0.6b": 0.44, "1.7b": 1.4, "4b": 3.6, "8b": 6.95, "14b": 13.2, "32b": 31.2}
    for size, billions in published.items():
        model = PRESETS[f"qwen3-{size}"]["model"]
        hidden, heads, kv_heads = model["hidden_size"], model["num_heads"], model["num_kv_heads"]
        attention = 2 * hidden * model["head_dim"] * (heads + kv_heads)
        parameters = model["num_layers"] * (attention + 3 * hidden * model["ffn_size"])
        # The cards round to two or three digits.
        assert parameters / 1e9 == pytest.approx(billions, rel=0.02)
        assert model["tie_embeddings"] == (size in ("0.6b", "1.7b", "4b"))


def test_unknown_preset_names_the_nearest(config_path: Path) -> None:
    assert "did you mean 'qwen3-14b'?" in refusal(config_path, "model.preset=Qwen3_14B")


def test_overrides_are_toml_or_bare_words(config_path: Path) -> None:
    config = load_config(
        config_path,
        [
            "run.name=other",
            'run.root="a b"',
            "optim.lr=3",
            "sample.size_px=[32, 64]",
            "sample.use_cache=false",
            "data.resolutions=[{side_px=32, share=1, buckets_px=[[32, 32]]}]",
            "text.path=../some=where",
        ],
    )
    assert (config.run.name, config.run.root, config.text.path) == ("other", "a b", "../some=where")
    assert config.optim.lr == 3.0 and isinstance(config.optim.lr, float)
    assert config.sample.size_px == (32, 64) and config.sample.use_cache is False
    assert config.data.resolutions == (Resolution(side_px=32, share=1, buckets_px=((32, 32),)),)


@pytest.mark.parametrize("override", ["run.steps", "=3", "run..steps=3", "run.steps!=3"])
def test_malformed_override_is_refused(config_path: Path, override: str) -> None:
    assert "expected section.key=value" in refusal(config_path, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rat=1", "unknown setting 'optim.learning_rat'"),
        ("optim.beta_2=1", "did you mean 'optim.beta2'?"),
        ("optm.lr=1", "unknown section 'optm'; did you mean 'optim'?"),
        ("run.wandb_mode=offline", "did you mean 'observe.wandb_mode'?"),
        ("steps=3", "did you mean 'run.steps'?"),
        (
            "run.zzz=3",
            "legal names: name, root, seed, steps, stage, start_from, start_weights, start_from_any, new_queries",
        ),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(config_path: Path, override: str, expected: str) -> None:
    message = refusal(config_path, override)
    assert expected in message and "command line: " in message


def test_unknown_key_in_a_list_of_tables_names_its_file(config_path: Path) -> None:
    config_path.write_text(config_path.read_text().replace("share = 7", "share = 7\nbucket_px = []"))
    expected = "unknown setting 'data.resolutions[1].bucket_px'; did you mean 'data.resolutions[1].buckets_px'?"
    message = refusal(config_path)
    assert f"{config_path}: {expected}" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps=1.0", "run.steps = 1.0: expected an integer, such as run.steps=1; got a number"),
        ("run.steps=true", "run.steps = True: expected an integer, such as run.steps=1; got true or false"),
        ("run.seed=ten", "run.seed = 'ten': expected an integer, such as run.seed=0; got a string"),
        ("optim.lr=fast", "optim.lr = 'fast': expected a number, such as optim.lr=0.0001; got a string"),
        ("optim.lr=inf", "optim.lr = inf: expected a finite number, such as optim.lr=0.0001; got a number"),
        (
            "run.name=7",
            """run.name = 7: expected a string, which is written in quotes: run.name='"7"'; got an integer""",
        ),
        (
            "sample.use_cache=1",
            "sample.use_cache = 1: expected true or false, such as sample.use_cache=true; got an integer",
        ),
        (
            "sample.size_px=[1,2,3]",
            "sample.size_px = [1, 2, 3]: expected a pair of integers, such as sample.size_px='[512, 512]'; got",
        ),
        (
            "data.shards=x",
            """data.shards = 'x': expected a list of strings, such as data.shards='["data/demo"]'; got one string""",
        ),
        ("vision.channel_mult=[1,2.5]", "vision.channel_mult[1] = 2.5: expected an integer; got a number"),
        ("parallel.pipeline_split=1.5", "parallel.pipeline_split = 1.5: expected a string or a list of integers"),
        ("model=3", "model = 3: expected a table of settings, such as model.preset=qwen3-0.6b; got an integer"),
        ("data.resolutions=[3]", "data.resolutions[0] = 3: expected a table; got an integer"),
    ],
)
def test_wrong_type_is_refused(config_path: Path, override: str, expected: str) -> None:
    assert f"command line: {expected}" in refusal(config_path, override)


def test_the_largest_numbers_are_read(config_path: Path) -> None:
    config = load_config(config_path, [f"run.steps={2**63 - 1}", f"optim.lr=1{'0' * 308}"])
    assert (config.run.steps, config.optim.lr) == (2**63 - 1, 1e308)


def test_too_large_an_integer_is_refused(config_path: Path) -> None:
    large = f"1{'0' * 400}"
    shown = "100000000000000000...0000000000000000000: expected a finite number"
    bounds = "expected an integer from -2^63 to 2^63 - 1"
    message = refusal(config_path, f"optim.lr={large}", f"run.steps={2**63}", f"run.seed={-(2**63) - 1}")
    assert f"optim.lr = {shown}, such as optim.lr=0.0001; got an integer of 1329 bits" in message
    assert f"run.steps = {2**63}: {bounds}, such as run.steps=1; got an integer of 64 bits" in message
    assert f"run.seed = {-(2**63) - 1}: {bounds}" in message
    # More digits than Python reads.
    assert "optim.lr = '1000" in refusal(config_path, f"optim.lr=1{'0' * 5000}")
    config_path.write_text(f"{config_path.read_text()}num_steps = {2**70}\nguidance = {large}\n")
    message = refusal(config_path)
    assert f"{config_path}: sample.num_steps = {2**70}: {bounds}" in message
    assert f"{config_path}: sample.guidance = {shown}" in message
    config_path.write_text(f"{config_path.read_text()}seed = 1{'0' * 5000}\n")
    assert f"{config_path}: Exceeds the limit" in refusal(config_path)


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[run]\nsteps = "many"\nnam = "x"\n[optim]\nlr = "1"\n')
    message = refusal(path)
    for expected in ("run.steps = 'many'", "did you mean 'run.name'?", "optim.lr = '1'"):
        assert expected in message
    missing = next(line for line in message.splitlines() if "required settings are missing" in line)
    for name in ("run.name", "model.num_layers", "head.width", "vision.weights", "data.resolutions"):
        assert name in missing


def test_extends_merges_tables_and_replaces_lists(config_path: Path) -> None:
    child = config_path.parent / "sub" / "child.toml"
    child.parent.mkdir()
    child.write_text('extends = "../legal.toml"\n[run]\nsteps = 7\n[vision]\nchannel_mult = [1, 2, 2]\n')
    config = load_config(child, ["run.seed=3"])
    assert (config.run.name, config.run.steps, config.run.seed) == ("toy", 7, 3)
    assert config.vision.channel_mult == (1, 2, 2) and config.vision.num_bits == 16


def test_problems_name_the_layer_they_come_from(config_path: Path) -> None:
    child = config_path.parent / "child.toml"
    child.write_text('extends = "legal.toml"\n[run]\nstep = 7\n')
    config_path.write_text(config_path.read_text().replace("num_bits = 16", "num_bits = '16'"))
    message = refusal(child)
    assert f"{child}: unknown setting 'run.step'" in message
    assert f"{config_path}: vision.num_bits = '16'" in message


def test_extends_goes_on_until_a_file_that_extends_none(config_path: Path) -> None:
    middle, child = config_path.parent / "middle.toml", config_path.parent / "child.toml"
    middle.write_text('extends = "legal.toml"\n[run]\nsteps = 7\nseed = 1\n')
    child.write_text('extends = "middle.toml"\n[run]\nseed = 2\n')
    config = load_config(child)
    assert (config.run.name, config.run.steps, config.run.seed) == ("toy", 7, 2)
    child.write_text('extends = "absent.toml"\n')
    assert "there is no file" in refusal(child)
    child.write_text("extends = 3\n")
    assert "expected one TOML file" in refusal(child)
    middle.write_text('extends = "child.toml"\n')
    child.write_text('extends = "middle.toml"\n')
    assert "that file extends this one" in refusal(child)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.toml")
    path = tmp_path / "bad.toml"
    path.write_text("[run\n")
    assert "not valid TOML" in refusal(path)
    path.write_text("[run]\nsteps = 1\nsteps = 2\n")
    assert "not valid TOML" in refusal(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_dump_loads_back_to_an_equal_tree(config_path: Path, preset: str) -> None:
    filters = 'data.filters=[{column="aspect", max=2}, {column="punsafe", min=0.5}, {column="width_px", min=8, max=16}]'
    changes = [f"model.preset={preset}", "data.text_drop=0", 'run.root="caf\u00e9 \\u007f"', filters]
    config = load_config(config_path, changes)
    dumped = config_path.parent / "dumped.toml"
    dumped.write_text(dump_toml(config), encoding="utf-8")
    again = load_config(dumped)
    assert again == config


def test_an_open_end_may_be_written_and_another_infinity_may_not(config_path: Path) -> None:
    """As earlier versions wrote it; today's files leave it out."""
    (written,) = load_config(config_path, ['data.filters=[{column="aspect", min=-inf, max=2.0}]']).data.filters
    assert written == DataFilter(column="aspect", max=2.0) and written.min == -math.inf
    message = refusal(config_path, 'data.filters=[{column="aspect", max=-inf}]', "optim.lr=nan")
    assert "data.filters[0].max = -inf: expected a finite number; got a number" in message
    assert "optim.lr = nan: expected a finite number" in message


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(name=st.text(st.characters(exclude_categories=["Cs"])), lr=FINITE, high=FINITE | st.just(math.inf))
def test_dump_round_trips_any_string_and_number(
    tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, high: float
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Inner:
        name: str = setting(doc="")
        lr: float = setting(doc="")
        high: float = setting(math.inf, doc="")

    @dataclass(frozen=True, kw_only=True)
    class Outer:
        inner: Inner
        rows: tuple[Inner, ...] = setting(doc="")

    # Local classes cannot be resolved from annotations given as strings.
    Inner.__annotations__ = {"name": str, "lr": float, "high": float}
    Outer.__annotations__ = {"inner": Inner, "rows": tuple[Inner, ...]}
    inner = Inner(name=name, lr=lr, high=high)
    path = tmp_path_factory.mktemp("dump") / "dump.toml"
    # Without newline translation, as tomllib reads text whose line ends are data.
    path.write_bytes(dump_toml(Outer(inner=inner, rows=(inner, inner))).encode())
    assert load_config(path, schema=Outer) == Outer(inner=inner, rows=(inner, inner))


def test_dump_depends_on_every_section(config_path: Path) -> None:
    config = load_config(config_path)
    dumps = {dump_toml(config)}
    for section in dataclasses.fields(RunConfig):
        changed = dataclasses.replace(getattr(config, section.name))
        first = dataclasses.fields(changed)[0].name
        changed = dataclasses.replace(changed, **{first: "another value"})
        dumps.add(dump_toml(dataclasses.replace(config, **{section.name: changed})))
    assert len(dumps) == 1 + len(dataclasses.fields(RunConfig))


def test_describe_names_every_setting_with_type_default_and_doc() -> None:
    text = describe(RunConfig)
    assert "run.steps  (integer, required)" in text
    assert "optim.eps  (number, default 1e-15)" in text
    assert "data.resolutions[].buckets_px  (list of pairs of integers, required)" in text
    assert "vision.channel_mult  (list of integers, default [1, 1, 2, 2, 4])" in text
    assert all(doc.doc for doc in setting_docs(RunConfig))


@pytest.mark.parametrize("schema", [RunConfig, TokenizerConfig])
def test_every_example_is_an_override_of_the_right_type(schema: type) -> None:
    path = {RunConfig: "demo", TokenizerConfig: "demo_tokenizer"}[schema]
    examples = [setting.example for setting in setting_docs(schema) if setting.example]
    assert len(examples) > 30
    for example in examples:
        # As a shell reads it.
        (override,) = shlex.split(example)
        load_config(path, [override], schema)
