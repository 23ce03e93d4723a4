"""Files of prompts in: those that are published, and what is wrong with others."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bitdance_scale.demo.scenes import make_scene
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.catalogue import BENCHMARKS, find_benchmark, read_prompts
from bitdance_scale.evaluation.benchmarks.demo_scenes import PROMPT_SEED, DemoScenes
from bitdance_scale.evaluation.benchmarks.imagenet import ImageNet
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, image_seed, prompts_digest
from tests.benchmark_data import benchmark_data
from tests.unit.evaluation.benchmarks.small_benchmarks import (
    DPG,
    GENEVAL,
    NAMES,
    TIIF,
    published,
    small,
    write_lines,
)

DATA = (
    ("geneval", "geneval_evaluation_metadata.jsonl", 553),
    ("geneval", "geneval_evaluation_metadata_long.jsonl", 553),
    ("dpg", "dpg_prompts.json", 1065),
    ("oneig-en", "OneIG-Bench.csv", 1120),
    ("oneig-zh", "OneIG-Bench-ZH.csv", 1320),
    ("tiif", "tiif_testmini_prompts", 2 * 277),
)


@pytest.mark.parametrize(("name", "file", "number"), DATA)
def test_the_published_files_are_read(name: str, file: str, number: int) -> None:
    prompts = read_prompts(find_benchmark(name), benchmark_data(file))
    assert len(prompts) == len({prompt.id for prompt in prompts}) == number
    assert {prompt.num_images for prompt in prompts} == {1 if name == "tiif" else 4}


def test_the_published_prompts_are_in_their_categories() -> None:
    short, long = (
        read_prompts(find_benchmark("geneval"), benchmark_data(f"geneval_evaluation_metadata{form}.jsonl"))
        for form in ("", "_long")
    )
    numbers = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert Counter(prompt.category for prompt in short) == numbers
    assert short[0].text == "a photo of a bench" and short[0].id == "00000" and short[-1].id == "00552"
    assert [prompt.record["include"] for prompt in short] == [prompt.record["include"] for prompt in long]
    assert prompts_digest(short) != prompts_digest(long)
    chinese = read_prompts(find_benchmark("oneig-zh"), benchmark_data("OneIG-Bench-ZH.csv"))
    assert Counter(prompt.id.split("/")[0] for prompt in chinese)["multilingualism"] == 200


@pytest.mark.parametrize("name", NAMES)
def test_small_files_are_read(tmp_path: Path, name: str) -> None:
    prompts = read_prompts(small(name), published(tmp_path, name))
    assert all(prompt.text and prompt.category for prompt in prompts)
    ids = [prompt.id for prompt in prompts]
    assert (
        ids
        == {
            "geneval": ["00000", "00001"],
            "dpg": list(DPG),
            "oneig-en": ["anime/000", "human/000", "human/001"],
            "oneig-zh": ["anime/000", "multilingualism/000"],
            "tiif": [
                *(f"action+2d/{length}_description/{line}" for line in (0, 1) for length in ("short", "long")),
                *(f"text/{length}_description/0" for length in ("short", "long")),
            ],
            "imagenet": ["00000", "00001"],
            "demo-scenes": [f"{number:05d}" for number in range(6)],
            "demo-classes": [f"{number:05d}" for number in range(24)],
        }[name]
    )


def test_texts_and_records_are_as_published(tmp_path: Path) -> None:
    english, tiif, dpg = (read_prompts(small(name), published(tmp_path, name)) for name in ("oneig-en", "tiif", "dpg"))
    assert english[0].text == '4boys, "nuns"\nand a hat' and english[0].record["type"] == "T"
    assert tiif[1].text == "A long\u2028cat." and tiif[1].record == TIIF["action+2d"][0]
    assert dpg[1].category == "partiprompts" and dpg[1].text == DPG["partiprompts12"]
    scenes = small("demo-scenes").read(None)
    assert scenes[0].text in {make_scene(PROMPT_SEED, index).caption for index in range(60)}
    assert [scene.text for scene in DemoScenes(per_category=2).read(None)][:6] == [scene.text for scene in scenes]


def test_classes_have_the_names_of_their_map(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("goldfish\nshark\n", encoding="utf-8")
    prompts = small("imagenet").read(tmp_path / "classes.txt")
    assert [(prompt.text, prompt.category) for prompt in prompts] == [("0", "goldfish"), ("1", "shark")]
    assert ImageNet().of_model(2, ("goldfish", "shark")).read(None) == replace_images(prompts, 50)
    numbered = small("imagenet").read(None)
    assert [prompt.category for prompt in numbered] == ["0", "1"]
    # Names are for people: the images are of the same classes.
    assert prompts_digest(numbered) == prompts_digest(prompts)
    with pytest.raises(ConfigError, match=r"classes.txt: names 2 classes, and the model has 1000; name a class map"):
        ImageNet().read(tmp_path / "classes.txt")


def replace_images(prompts: list[Prompt], number: int) -> list[Prompt]:
    return [replace(prompt, num_images=number) for prompt in prompts]


def test_short_prompts_with_the_guidance_of_the_long_ones_are_doubted() -> None:
    geneval = find_benchmark("geneval")
    short, long = (
        read_prompts(geneval, benchmark_data(f"geneval_evaluation_metadata{form}.jsonl")) for form in ("", "_long")
    )
    assert "553 of 553 prompts have GenEval's short form ('a photo of a bench')" in geneval.doubt(short, 13.0)
    assert geneval.doubt(short, 7.5) == geneval.doubt(long, 13.0) == ""
    # Some whose beginning was kept are still the long form.
    assert geneval.doubt([*short[:100], *long], 13.0) == ""


def test_line_ends_a_byte_order_mark_and_the_order_do_not_matter(tmp_path: Path) -> None:
    plain, other = tmp_path / "plain.json", tmp_path / "other.json"
    plain.write_text(json.dumps(DPG), encoding="utf-8")
    windows = json.dumps(dict(reversed(DPG.items())), indent=2, ensure_ascii=False).replace("\n", "\r\n")
    other.write_bytes(windows.encode("utf-8-sig"))
    first, second = (find_benchmark("dpg").read(path) for path in (plain, other))
    assert first != second and sorted(first, key=lambda p: p.id) == sorted(second, key=lambda p: p.id)
    assert prompts_digest(first) == prompts_digest(second)
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(DPG | {"0": "Nine cabbages."}), encoding="utf-8")
    assert prompts_digest(find_benchmark("dpg").read(changed)) != prompts_digest(first)
    lines = tmp_path / "windows.jsonl"
    lines.write_bytes("\r\n".join(map(json.dumps, GENEVAL)).encode("utf-8-sig") + b"\r\n\r\n")
    assert find_benchmark("geneval").read(lines) == find_benchmark("geneval").read(published(tmp_path, "geneval"))


def bad_line(**changes: object) -> list[object]:
    return [GENEVAL[0], GENEVAL[1] | changes]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "geneval",
            bad_line(tag="colour"),
            r":2: tag = 'colour', expected one of single_object, .*; name evaluation_meta",
        ),
        ("geneval", bad_line(prompt=3), ":2: prompt = 3, expected a text 'prompt'"),
        ("geneval", bad_line(prompt=" "), "prompt 00001 is empty"),
        ("geneval", bad_line(include="bench"), ":2: has no list 'include'"),
        ("geneval", [GENEVAL[0], "a"], ":2: is str, expected an object"),
        ("geneval", "\n" + json.dumps(GENEVAL[0]), ":1: is empty, and pictures have the numbers of their lines"),
        ("geneval", json.dumps(GENEVAL[0])[:-9], ":1: is no such JSON"),
        ("geneval", "", ":1: is empty"),
        ("dpg", "{}", "holds no prompt"),
        ("dpg", '{"a": "x", "a": "y"}', "'a' comes twice"),
        ("dpg", '{"a": "x \\ud83d"}', "prompt a holds half of a surrogate pair"),
        ("dpg", '{"a": "x", "A": "y"}', "prompt A comes twice, and one picture would replace the other's"),
        ("dpg", '{"../a": "x"}', r"id = '../a': becomes the name of a file, so it must be letters"),
        ("dpg", '{"a.b": "x"}', "id = 'a.b': becomes the name of a file"),
        ("dpg", '{"a": ["x"]}', "a = \\['x'\\], expected a text 'a'"),
        (
            "dpg",
            '{"type": "text", "short_description": "x"}',
            "has the key 'short_description', no id; name prompts.json",
        ),
        ("oneig-en", "category,id,prompt_en\nPets,000,A cat.\n", "id '000' of 'Pets': expected a category of Anime_"),
        ("oneig-en", "category,id,prompt_en\nPortrait,000,A cat, a dog.\n", ":2: has 4 cells, the header 3"),
        (
            "oneig-en",
            "category,id,prompt_en\nPortrait,1,A\nPortrait,10,B\n",
            "id 'human/10' begins with the id 'human/1'",
        ),
        ("oneig-en", "category,id,prompt_en\nPortrait,00,A\nPortrait,00,B\n", "prompt human/00 comes twice"),
        ("oneig-en", "id,text\n", "has no column 'category', but 'id', 'text'"),
        ("oneig-en", "", "has no column 'category', but nothing"),
        ("tiif", [{"type": "text", "yn_question_list": []}], ":1: holds questions about pictures, no prompts"),
        (
            "tiif",
            [{"type": "a/b", "short_description": "x", "long_description": "y"}],
            "type = 'a/b': becomes the name",
        ),
        (
            "tiif",
            [{"type": "text", "short_description": "x"}],
            ":1: has 'type', 'short_description', expected a text 'long",
        ),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / "prompts"
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        assert isinstance(content, list)
        write_lines(path, content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_prompts(find_benchmark(name), path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("owner", ["geneval", "dpg", "oneig-en", "oneig-zh", "tiif"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_benchmark_is_called_by_its_name(tmp_path: Path, name: str, owner: str) -> None:
    path = published(tmp_path, owner)
    if name == owner:
        return
    if name == "demo-scenes":
        with pytest.raises(ConfigError, match="holds the prompts of .*, not of demo-scenes; name no file, or draw"):
            read_prompts(small(name), path)
        return
    with pytest.raises(ConfigError, match=f"holds the prompts of {owner}, not of {name}; name .*, or draw {owner}"):
        read_prompts(small(name), path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes('{"a": "é"}'.encode("latin-1"))
    for path, message in (
        (tmp_path / "none", "cannot be read .No such file or directory.; name prompts.json"),
        (tmp_path, "is a folder; name prompts.json"),
        (tmp_path / "latin", "is not UTF-8 text"),
        (None, "no file of prompts is named; name prompts.json of DPG-Bench"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_prompts(find_benchmark("dpg"), path)
    with pytest.raises(ConfigError, match=r"holds no \*.jsonl; name the folder testmini_prompts"):
        read_prompts(find_benchmark("tiif"), tmp_path)


def test_an_unknown_benchmark_is_refused_with_all_names() -> None:
    assert [benchmark.name for benchmark in BENCHMARKS] == list(NAMES)
    with pytest.raises(ConfigError, match=f"'dpgbench': must be one of {', '.join(NAMES)}"):
        find_benchmark("dpgbench")


def test_the_seed_of_an_image_is_of_seed_prompt_and_number_alone() -> None:
    ids = ["00000", "00001", *DPG, "anime/000"]
    seeds = {image_seed(seed, name, k) for seed in (0, 1) for name in ids for k in range(4)}
    assert len(seeds) == 2 * len(ids) * 4 and all(0 <= seed < 2**63 for seed in seeds)
    # A drawing that was begun goes on with the same images in later versions.
    assert image_seed(0, "00000", 0) == 2789119453255569598
