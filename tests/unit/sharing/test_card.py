"""Model cards: read back as Hugging Face reads them, whatever names and prompts hold."""

from __future__ import annotations

import dataclasses

import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from bitdance_scale.sharing.card import (
    SAMPLES_NAME,
    WARNING,
    CardFacts,
    Table,
    card_text,
    code,
    front_matter,
    one_line,
    plain,
    write_card,
)
from bitdance_scale.sharing.licences import OTHER, Licence, stated_licence

FACTS = CardFacts(
    title="A model",
    summary="It draws.",
    library="bitdance_scale",
    pipeline_tag="text-to-image",
    tags=("bitdance",),
    licence=Licence("apache-2.0", text="Apache", origin="whoever made it"),
    usage="```\nbitdance sample FOLDER\n```",
)


def fields_of(text: str) -> dict:
    _, fields, body = text.split("---\n", 2)
    assert body.startswith("\n# ")
    return yaml.safe_load(fields)


def changed(**changes) -> CardFacts:
    return dataclasses.replace(FACTS, **changes)


def test_what_is_not_known_is_left_out():
    assert front_matter(FACTS) == {
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
        "library_name": "bitdance_scale",
        "tags": ["bitdance"],
        "model_name": "A model",
    }
    assert (
        front_matter(changed(base_relation="finetune", pipeline_tag=""))
        .keys()
        .isdisjoint({"base_model", "base_model_relation", "datasets", "pipeline_tag"})
    )


def test_a_card_is_what_hugging_face_reads():
    facts = changed(
        base_models=("a/b",), base_relation="adapter", datasets=("c/d",), licence=stated_licence("", "", None, None)
    )
    card = ModelCard(card_text(facts))
    assert card.data.to_dict() == fields_of(card_text(facts))
    assert (card.data.base_model, card.data.base_model_relation, card.data.datasets) == ("a/b", "adapter", ["c/d"])
    assert (card.data.license, card.data.license_name, card.data.license_link) == (OTHER, "not-stated", "LICENSE")
    assert "**No licence is stated.**" in card.text and WARNING in card.text


@given(st.text(min_size=1))
def test_any_name_and_prompt_is_read_back(text):
    facts = changed(
        title=text,
        authors=(text,),
        prompts=(text,),
        samples=None,
        origin=(text,),
        tables=(Table("T", ("a", "b"), ((text, text),)),),
        licence=Licence(OTHER, text, "Terms", text),
    )
    written = card_text(facts)
    fields = fields_of(written)
    assert fields == front_matter(facts)
    assert ModelCard(written).data.to_dict() == fields
    assert len([line for line in written.split("\n") if line.startswith("# ")]) == 1
    assert len([line for line in written.split("\n") if line.startswith("| ")]) == 3


def test_hard_names():
    for name in ("yes", "1e3", "a: b", "- x", "'", "#1", "{x}", "null", "*a", "ü 雨"):
        assert fields_of(card_text(changed(title=name)))["model_name"] == name


def test_code_spans_hold_any_text():
    assert code("a `b` c") == "``a `b` c``"
    assert code("`") == "`` ` ``"
    assert code("two\nlines") == "`two lines`"
    assert plain("<b> [x](y) | z") == r"\<b\> \[x\](y) \| z"
    assert one_line(" a\n\n\x00b\u2028c ") == "a b c"


def test_credentials_are_hidden():
    shards = "https://user:word@host/a.tar https://host/b?X-Amz-Signature=abc"
    written = card_text(changed(tables=(Table("Data", ("a", "b"), (("source", shards),)),), prompts=(shards,)))
    assert "word" not in written and "abc" not in written and "host/a.tar" in written
    assert fields_of(card_text(changed(title="user:word@host")))["model_name"] == "***@host"


def test_the_folder_gets_card_licence_and_pictures(tmp_path):
    samples = tmp_path / "step_000001.png"
    samples.write_bytes(b"png")
    folder = tmp_path / "out"
    folder.mkdir()
    write_card(folder, changed(samples=samples, prompts=("a `red` circle",)))
    assert (folder / SAMPLES_NAME).read_bytes() == b"png"
    assert (folder / "LICENSE").read_text() == "Apache"
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert "![Pictures that the run drew](samples.png)" in written and "``a `red` circle``" in written
