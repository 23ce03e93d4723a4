"""Licences: what a folder says of its own, what the user says, and that none is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdance_scale.errors import ConfigError
from bitdance_scale.sharing.licences import (
    APACHE,
    NOT_STATED,
    OTHER,
    Licence,
    find_licence,
    licence_file,
    licence_text,
    recognised,
    stated_licence,
)

ROOT = Path(__file__).parents[3]
CARD = "---\nlicense: {}\ntags:\n- x\n---\n\n# Model\n"
NAMED_CARD = "---\nlicense: other\nlicense_name: {}\n---\n"
TEXT = licence_text(APACHE)
RIDERS = {
    "after": f'{TEXT}\n"Commons Clause" License Condition v1.0\n\nThe License does not include the right to sell.',
    "before": f"Code: Apache 2.0, as below. Weights: non-commercial use only.\n\n{TEXT}",
    "between": TEXT.replace("   APPENDIX:", "   Not for military use.\n\n   APPENDIX:"),
    "behind a copyright": f"Copyright 2026 someone. Not for commercial use.\n\n{TEXT}",
    "long": f"Copyright 2026 someone {'and also ' * 20}\n{TEXT}",
}
"""Texts that hold the terms of Apache 2.0 and take some of them back."""


def folder_with(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def stated(**options) -> Licence:
    said = {"licence_id": "", "name": "", "file": None, "inherited": None} | options
    return stated_licence(**said)


def test_the_text_is_that_of_this_project():
    assert licence_text(APACHE) == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in licence_text(APACHE) and licence_text("mit") == ""


class TestFolder:
    def test_nothing_is_said(self, tmp_path):
        assert find_licence(tmp_path) is None
        assert find_licence(folder_with(tmp_path, README__md="# no fields\n\nlicense: mit\n")) is None

    def test_of_its_card_and_its_file(self, tmp_path):
        folder = folder_with(tmp_path, README__md=CARD.format("mit"), LICENSE="MIT License\n\nPermission is ...")
        assert find_licence(folder) == Licence("mit", text="MIT License\n\nPermission is ...")

    def test_of_its_card_alone(self, tmp_path):
        assert find_licence(folder_with(tmp_path, README__md=CARD.format("apache-2.0"))).text == licence_text(APACHE)
        assert find_licence(folder_with(tmp_path, README__md=CARD.format("cc-by-4.0"))) == Licence("cc-by-4.0")

    def test_of_its_file_alone(self, tmp_path):
        wrapped = "Copyright 2026 someone\n\n" + licence_text(APACHE).replace("\n", "\r\n")
        assert find_licence(folder_with(tmp_path, LICENSE__txt=wrapped)).id == APACHE
        assert find_licence(folder_with(tmp_path, LICENSE__txt="Terms of our own")) == Licence(
            OTHER, "as-in-license-file", "Terms of our own"
        )

    def test_a_cut_text_is_not_recognised(self):
        terms, _, appendix = licence_text(APACHE).partition("APPENDIX")
        assert appendix and recognised(terms) == APACHE
        assert recognised(licence_text(APACHE)[:5000]) == recognised("") == ""

    @pytest.mark.parametrize(
        "text",
        [
            TEXT.replace("[yyyy] [name of copyright owner]", "2024 A Company"),
            TEXT.replace("[", "{").replace("]", "}").replace("http://", "https://"),
            f"Copyright 2018- The team, Inc. All rights reserved.\n(c) 2026 someone\n\n{TEXT}",
            TEXT.partition("END OF TERMS")[0],
        ],
    )
    def test_forms_of_one_text(self, text):
        assert recognised(text) == APACHE

    @pytest.mark.parametrize("where", RIDERS)
    def test_terms_with_a_rider_are_another_licence(self, tmp_path, where):
        text = RIDERS[where]
        assert recognised(text) == ""
        folder = folder_with(tmp_path, LICENSE=text)
        assert find_licence(folder) == Licence(OTHER, "as-in-license-file", text)
        folder_with(folder, README__md=NAMED_CARD.format("their-terms"))
        assert find_licence(folder) == Licence(OTHER, "their-terms", text)

    @pytest.mark.parametrize(
        ("name", "expected"), [("their-terms", None), (NOT_STATED, APACHE), ("Apache-2.0", APACHE)]
    )
    def test_a_name_is_not_overridden_by_a_text_that_is_recognised(self, tmp_path, name, expected):
        found = find_licence(folder_with(tmp_path, README__md=NAMED_CARD.format(name), LICENSE=TEXT))
        assert (found and found.id) == expected

    def test_a_contradiction_says_nothing(self, tmp_path):
        assert find_licence(folder_with(tmp_path, README__md=CARD.format("mit"), LICENSE=licence_text(APACHE))) is None

    @pytest.mark.parametrize(
        "card",
        ["---\nlicense: [mit\n---\n", "---\n- a\n---\n", "---\nlicense: {x: 1}\n---\n", CARD.format("'not an id!'")],
    )
    def test_broken_fields_say_nothing(self, tmp_path, card):
        assert find_licence(folder_with(tmp_path, README__md=card)) is None

    def test_no_text_and_no_utf8_say_nothing(self, tmp_path):
        (tmp_path / "LICENSE").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "README.md").mkdir()
        assert find_licence(tmp_path) is None


class TestStated:
    def test_nobody_says_anything(self):
        licence = stated()
        assert (licence.id, licence.name, licence.is_stated) == (OTHER, NOT_STATED, False)
        assert "--license" in licence_file(licence)

    def test_it_is_inherited(self):
        inherited = Licence("cc-by-4.0", origin="the folder X")
        assert stated(inherited=inherited) is inherited
        assert "cc-by-4.0, as the folder X states" in licence_file(inherited)

    def test_the_user_comes_first(self, tmp_path):
        file = tmp_path / "MIT.txt"
        file.write_text("MIT License\n")
        licence = stated(licence_id="mit", file=file, inherited=Licence(APACHE, text=licence_text(APACHE)))
        assert (licence.id, licence_file(licence)) == ("mit", "MIT License\n")

    def test_texts_that_are_at_hand(self):
        assert licence_file(stated(licence_id=APACHE)) == licence_text(APACHE)
        assert stated(licence_id="mit", inherited=Licence("mit", text="MIT")).text == "MIT"

    def test_a_text_that_is_recognised_needs_no_id(self):
        assert stated(file=ROOT / "LICENSE").id == APACHE

    def test_one_without_an_id(self, tmp_path):
        file = tmp_path / "ours.txt"
        file.write_text("Ours")
        assert stated(licence_id=OTHER, name="ours-1.0", file=file).name == "ours-1.0"

    @pytest.mark.parametrize("where", RIDERS)
    def test_terms_with_a_rider_are_stated_by_name(self, tmp_path, where):
        file = tmp_path / "LICENSE"
        file.write_text(RIDERS[where], encoding="utf-8")
        licence = stated(licence_id=OTHER, name="their-terms", file=file)
        assert (licence.id, licence.name, licence_file(licence)) == (OTHER, "their-terms", RIDERS[where])
        with pytest.raises(ConfigError, match="a licence needs its id"):
            stated(file=file)

    def test_a_text_is_not_taken_for_another_name(self):
        theirs = Licence(OTHER, "theirs", "Terms of theirs")
        assert stated(licence_id=OTHER, name="theirs", inherited=theirs).text == "Terms of theirs"
        with pytest.raises(ConfigError, match="--license other: .* name the text with --license-file"):
            stated(licence_id=OTHER, name="ours", inherited=theirs)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"licence_id": "mit"}, "--license mit: this program has only the text of apache-2.0.*--license-file"),
            ({"licence_id": "MIT License"}, "--license 'MIT License': must be an id.*--license-name"),
            ({"licence_id": OTHER}, "needs its id .*or, without one, --license other and --license-name"),
            ({"licence_id": "mit", "name": "MIT"}, "--license-name 'MIT': is of a licence without an id"),
            ({"file": Path("missing.txt")}, "--license-file missing.txt: cannot be read"),
            ({"licence_id": "mit", "file": ROOT / "LICENSE"}, "is the text of apache-2.0, and --license says mit"),
            ({"file": ROOT / "Makefile"}, "--license .not given.: a licence needs its id"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ConfigError, match=message):
            stated(**options)
