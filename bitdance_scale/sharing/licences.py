"""The licence of weights: what a folder says of its own, and what an export writes.

A licence is never guessed. It is what the user says, or what the folder says that the weights came from. Otherwise the
export says that none is stated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitdance_scale.errors import ConfigError
from bitdance_scale.text_files import read_utf8

LICENCE_NAME, CARD_NAME = "LICENSE", "README.md"
OTHER, NOT_STATED = "other", "not-stated"
"""The id of a licence that Hugging Face has no id for; the name of one that nobody has stated."""
APACHE = "apache-2.0"
_TEXTS_DIR = Path(__file__).parents[1] / "assets" / "licences"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
_MAX_FILE_BYTES = 1 << 18
# Hugging Face's ids of licences: https://huggingface.co/docs/hub/repositories-licenses
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_FRONT_MATTER = re.compile(r"\A\s*---\n(.*?)\n---(?:\n|\Z)", re.DOTALL)
_UNKNOWN_IDS = (OTHER, "unknown")
# Between the terms of Apache 2.0 and what it says of applying them; in the latter, where a name is filled in.
_END_OF_TERMS, _HOLDER = "END OF TERMS AND CONDITIONS", "Copyright [yyyy] [name of copyright owner]"
# One sentence that begins as such lines do: a second one may be a condition.
_COPYRIGHT_LINE = re.compile(r"\W*(copyright|\(c\)|©)[^.;:]*\.?(\s*all rights reserved\.?)?", re.IGNORECASE)
_MAX_COPYRIGHT_WORDS = 40


@dataclass(frozen=True)
class Licence:
    """A licence as a model card states it.

    Attributes:
        id: Hugging Face's id of it, such as apache-2.0; `other` for one that has none.
        name: what it is called, where the id is `other`.
        text: its text; empty if it is not at hand.
        origin: who says so, in words.
    """

    id: str
    name: str = ""
    text: str = ""
    origin: str = ""

    @property
    def is_stated(self) -> bool:
        """Whether anybody has said what the licence is."""
        return self.name != NOT_STATED

    def is_same(self, other: Licence) -> bool:
        """Whether another is the same licence; those without an id are compared by name and text."""
        return (self.id, self.name) == (other.id, other.name) and (self.id != OTHER or self.text == other.text)

    def as_json(self) -> dict[str, str]:
        """What a checkpoint keeps of it (`TrainState.release`)."""
        return {"id": self.id, "name": self.name, "text": self.text}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], origin: str) -> Licence:
        """The inverse of `as_json`."""
        return cls(str(content.get("id", OTHER)), str(content.get("name", "")), str(content.get("text", "")), origin)


def find_licence(folder: Path) -> Licence | None:
    """What a folder of weights says of its licence: in the first lines of its README.md, or in a file of its own.

    None if it says nothing, if the two contradict each other, or if they cannot be read. A licence that README.md gives
    a name, as those without an id have, is another one than a text that is recognised.
    """
    card = read_front_matter(folder)
    stated = card.get("license")
    stated = stated.lower() if isinstance(stated, str) and _ID.fullmatch(stated.lower()) else ""
    name = card.get("license_name")
    name = name if isinstance(name, str) else ""
    text = _file_text(folder)
    known = recognised(text)
    if stated and stated not in _UNKNOWN_IDS:
        if known and known != stated:
            return None
        return Licence(stated, text=text or licence_text(stated))
    if known:
        return Licence(known, text=text) if name.lower() in ("", NOT_STATED, known) else None
    if text:
        return Licence(OTHER, name or "as-in-license-file", text)
    return None


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The fields at the beginning of a folder's README.md; empty if there are none that can be read."""
    found = _FRONT_MATTER.match(_read_short(folder / CARD_NAME))
    if found is None:
        return {}
    try:
        fields = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def recognised(text: str) -> str:
    """The id of a licence by its text; empty for one that this program does not have, or that says more than it.

    Beside the terms there may be how to apply them, and lines of copyright. Anything else can take back what the terms
    give, as a rider on commercial use does.
    """
    terms, notes = licence_text(APACHE).split(_END_OF_TERMS)
    how_to, notice = notes.split(_HOLDER)
    rest, num_found = _wording(terms).subn("\n", text)
    for part in (_END_OF_TERMS, how_to, notice):
        rest = _wording(part).sub("\n", rest)
    if num_found != 1 or len(rest.split()) > _MAX_COPYRIGHT_WORDS:
        return ""
    lines = [line.strip() for line in rest.splitlines()]
    return APACHE if all(_COPYRIGHT_LINE.fullmatch(line) for line in lines if line) else ""


def licence_text(licence_id: str) -> str:
    """The text of a licence that this program has; empty for another."""
    path = _TEXTS_DIR / f"{licence_id}.txt"
    return path.read_text(encoding="utf-8") if licence_id == APACHE else ""


def stated_licence(licence_id: str, name: str, file: Path | None, inherited: Licence | None) -> Licence:
    """The licence of an export.

    Args:
        licence_id: what the user says, by Hugging Face's id; empty: nothing.
        name: its name, for one without an id.
        file: its text.
        inherited: what the folder says that the weights came from.

    Raises:
        ConfigError: an id of another form, a file that cannot be read, or a licence whose text is not at hand.
    """
    if licence_id and not _ID.fullmatch(licence_id):
        raise ConfigError(
            f"--license {licence_id!r}: must be an id of Hugging Face's, such as apache-2.0, mit or cc-by-4.0; for "
            "another licence give --license other, --license-name and --license-file"
        )
    if name and licence_id != OTHER:
        raise ConfigError(f"--license-name {name!r}: is of a licence without an id; give --license other with it")
    text = _given_text(file)
    if not licence_id and not text:
        return inherited or Licence(OTHER, NOT_STATED)
    licence_id = licence_id or recognised(text)
    if not licence_id or (licence_id == OTHER and not name):
        raise ConfigError(
            f"--license {licence_id or '(not given)'}: a licence needs its id (--license apache-2.0) or, without one, "
            "--license other and --license-name"
        )
    if text and (known := recognised(text)) and known != licence_id:
        raise ConfigError(f"--license-file {file}: is the text of {known}, and --license says {licence_id}; give one")
    same = inherited.text if inherited is not None and (inherited.id, inherited.name) == (licence_id, name) else ""
    text = text or same or licence_text(licence_id)
    if not text:
        raise ConfigError(
            f"--license {licence_id}: this program has only the text of {APACHE}; name the text with --license-file"
        )
    return Licence(licence_id, name, text, "whoever made this export")


def licence_file(licence: Licence) -> str:
    """The content of the file LICENSE of an export."""
    if licence.text:
        return licence.text
    if licence.is_stated:
        return (
            f"Licence: {licence.id}, as {licence.origin} states. Its text was not with them: put it here before you "
            "share these files.\n"
        )
    return (
        "No licence has been stated for these weights, so nobody may assume one. Whoever shares them has to say which "
        "it is, with respect to the model that they came from and to the data that they were trained on:\n\n"
        "    bitdance export CHECKPOINT OUT --license ID [--license-file FILE]\n"
    )


def _given_text(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        text = read_utf8(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--license-file {file}: cannot be read ({error}); name a text file") from error
    if not text.strip():
        raise ConfigError(f"--license-file {file}: is empty; name the text of the licence")
    return text


def _file_text(folder: Path) -> str:
    """The text of a folder's licence file; empty if there is none that can be read."""
    return next((text for name in LICENCE_FILES if (text := _read_short(folder / name)).strip()), "")


def _read_short(path: Path) -> str:
    """A text that someone else has put into a folder; empty if it is none, or longer than such a text can be."""
    try:
        return read_utf8(path) if path.is_file() and path.stat().st_size <= _MAX_FILE_BYTES else ""
    except (OSError, ValueError):
        return ""


def _wording(part: str) -> re.Pattern[str]:
    """Finds a part of a licence, however it is broken into lines; some copies have braces for brackets, or https."""
    words = r"\s+".join(map(re.escape, part.split()))
    words = words.replace(r"\[", r"[\[{]").replace(r"\]", r"[\]}]").replace("http:", "https?:")
    return re.compile(words, re.IGNORECASE)
