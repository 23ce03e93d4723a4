"""Captions: where they are looked for, and which of them is drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from bitdance_scale.config.data_schema import CaptionChoice
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.plan.plan import Plan
from tests.unit.data.small_data import encode_image, write_tar


def test_caption_sources(tmp_path: Path) -> None:
    record = {"width": 16, "height": 16, "caption": "open", "re_caption": "again"}
    synthetic = {"syn_text": [" one ", "", "two"], "other": 5.5, "label": 207}
    members = {
        "jpg": encode_image(16, 16),
        "json": json.dumps(record).encode(),
        "syn.json": json.dumps(synthetic).encode(),
    }
    shard = str(write_tar(tmp_path / "0.tar", {"0": members, "1": {**members, "txt": b"text"}}))
    sources = ("json:re_caption", "caption", "syn.json:syn_text", "syn.json:other", "alt.txt", "syn.json:label")
    index = build_index([shard], tmp_path / "index", captions=sources)
    assert [index.caption(1, source) for source in sources] == ["again", "text", "one", "", "", "207"]
    assert index.texts("syn.json:syn_text", np.array([0])) == [["one", "two"]] and index.caption(0) == "again"
    assert [CaptionStatus(index.status(s)[0]).name for s in sources] == [
        "USABLE",
        "USABLE",
        "USABLE",
        "INVALID",
        "MISSING",
        "USABLE",
    ]
    assert index.errors() == {}
    fewer = build_index([shard], tmp_path / "index", captions=sources[1:2])
    # Sources that are there already stay, because another run may need them.
    assert fewer.captions == sources and fewer.hash == index.hash


def shard_of_captions(folder: Path) -> str:
    """Samples 0..59: every third has no field, every fifth no text, and a field has two alternatives."""
    jpg = encode_image(40, 40)
    samples = {}
    for number in range(60):
        record = {"width": 40, "height": 40} | ({} if number % 3 == 0 else {"re": [f"r{number}", f"s{number}"]})
        text = {} if number % 5 == 0 else {"txt": f"t{number}".encode()}
        samples[f"{number:03d}"] = {"jpg": jpg, "json": json.dumps(record).encode(), **text}
    return str(write_tar(folder / "0.tar", samples))


def test_captions_are_drawn_by_share_among_those_there_are(tmp_path: Path, make_config, tokenizer) -> None:
    shard = shard_of_captions(tmp_path)
    captions = (CaptionChoice(source="json:re", share=3), CaptionChoice(source="caption", share=1))
    config = make_config([shard], captions=captions, text_drop=0.0, global_batch=60)
    index = build_index([shard], tmp_path / "index", captions=["json:re", "caption"])
    plan, seen, by_kind = Plan(3, index, config.data), Counter(), Counter()
    for step in range(100):
        batch = plan.batch(step)
        for sample, caption in zip(batch.samples.tolist(), batch.caption.tolist(), strict=True):
            has = (sample % 3 != 0, sample % 5 != 0)
            assert caption == -1 if not any(has) else has[caption]
            seen[all(has)] += 1
            by_kind[all(has), caption] += 1
    # A deviation of four standard errors.
    assert abs(by_kind[True, 0] / seen[True] - 0.75) < 4 * np.sqrt(0.75 * 0.25 / seen[True])
    texts: Counter[str] = Counter()
    with Loader(config, tokenizer, index, 0, 1) as loader:
        for _ in range(20):
            for loaded in loader.next_step().packs:
                texts.update(prompts(loaded.pack, tokenizer))
    assert set(texts) == {f"{kind}{n}" for n in range(60) for kind in "rst" if (n % 5 if kind == "t" else n % 3)} | {""}
    alternatives = [sum(count for text, count in texts.items() if text.startswith(kind)) for kind in "rs"]
    assert abs(alternatives[0] / sum(alternatives) - 0.5) < 4 * 0.5 / np.sqrt(sum(alternatives))


def prompts(pack, tokenizer) -> list[str]:
    """Captions of the samples of a pack; empty for samples without one."""
    found = []
    for document in range(int(pack.document_ids.max()) + 1):
        text = tokenizer.decode([i for i in pack.token_ids[pack.document_ids == document].tolist() if i < 256])
        found.append(text.removeprefix("user\n").split("\nassistant")[0] if text.startswith("user") else "")
    return found
