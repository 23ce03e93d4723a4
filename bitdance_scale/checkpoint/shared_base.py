"""What an import remembers of the folder that its weights came from, for those whom they are shared with later.

It is kept in the checkpoints of every run that starts from the import (`TrainState.release`, under `base`), because the
folder itself may be gone by then: its name, Hugging Face's id of it, and its licence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdance_scale.sharing.licences import Licence, find_licence

BASE = "base"
"""The key in `TrainState.release`."""
# The cache of Hugging Face keeps a model in models--ORGANISATION--NAME/snapshots/REVISION.
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True)
class SharedBase:
    """Where weights came from.

    Attributes:
        name: of the folder.
        hub_id: Hugging Face's id of the model; empty: not known.
        kind: BitDance or Qwen3.
        licence: of the folder; None: it states none, or parts of the model came from elsewhere and state another.
    """

    name: str
    hub_id: str
    kind: str
    licence: Licence | None


def describe_base(folder: Path, other_parts: Path | None) -> dict[str, Any]:
    """What a checkpoint keeps of a folder that is imported.

    A licence is kept only if all parts are under it: of a plain Qwen3, the autoencoder's folder must state the same.

    Args:
        folder: the folder.
        other_parts: another folder that a part of the model comes from; None: there is none.
    """
    licence = find_licence(folder)
    if licence is not None and other_parts is not None:
        other = find_licence(other_parts)
        licence = licence if other is not None and licence.is_same(other) else None
    parts = [folder.name, *(parent.name for parent in folder.resolve().parents)]
    cached = next((match for part in parts if (match := _CACHED.fullmatch(part))), None)
    hub_id = f"{cached[1]}/{cached[2]}" if cached is not None else ""
    name = cached[2] if cached is not None else folder.resolve().name
    return {"name": name, "hub_id": hub_id, "licence": licence.as_json() if licence is not None else None}


def read_base(release: Mapping[str, Any]) -> SharedBase | None:
    """What a checkpoint says of the folder that its weights came from; None for weights that started at random.

    Imports of earlier versions say no more than what kind it was.
    """
    if not release:
        return None
    kind, content = str(release.get("kind", "BitDance")), release.get(BASE) or {}
    name = str(content.get("name", "")) or f"a {kind} folder"
    stated = content.get("licence")
    licence = Licence.from_json(stated, f"the folder {name}, which the weights came from,") if stated else None
    return SharedBase(name, str(content.get("hub_id", "")), kind, licence)
