"""DPG-Bench (Hu et al., arXiv 2403.05135): 1,065 long prompts.

Checked against TencentQQGYLab/ELLA: dpg_bench/compute_dpg_bench.py, which takes every file of the folder, reads its
name up to the first "." as an id, and passes over those that it cannot score, such as `drawing.json`, with a line; and
shallowdream204/BitDance: eval/eval_dpg.py and scripts/eval/eval_bitdance_14b_16x.sh.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark, Settings
from bitdance_scale.evaluation.benchmarks.layout import Layout
from bitdance_scale.evaluation.benchmarks.picture import Picture, grid_side
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, check_name, check_prompts
from bitdance_scale.evaluation.benchmarks.prompt_files import read_json_object, text_of

_NO_IDS = frozenset({"tag", "type", "prompt", "short_description"})
"""Keys of the lines of other benchmarks, one of which alone would be an object of texts."""


class DpgLayout(Layout):
    """`{id}.png`, a grid."""

    def pictures(self, prompt: Prompt) -> list[Picture]:
        """The grid."""
        return [Picture(PurePosixPath(f"{prompt.id}.png"), grid_side("dpg", prompt.num_images))]


@dataclass(frozen=True)
class Dpg(Benchmark):
    """DPG-Bench. The category of a prompt is the source that its id names; scores are summed up by questions."""

    num_images: int = 4
    name = "dpg"
    prompt_file = "prompts.json of DPG-Bench as the release has it, an object of ids and prompts"
    settings = Settings((1024, 1024), 50, 7.5, "published: BitDance's scripts/eval")

    def layout(self, model: str) -> DpgLayout:
        """The layout, in which no model is named."""
        grid_side(self.name, self.num_images)
        return DpgLayout()

    def read(self, path: Path | None) -> list[Prompt]:
        """The prompts of a JSON object of ids and prompts."""
        texts = read_json_object(path, self.prompt_file)
        if not _NO_IDS.isdisjoint(texts):
            raise ConfigError(f"{path}: has the key {min(_NO_IDS & texts.keys())!r}, no id; name {self.prompt_file}")
        prompts = []
        for key in texts:
            name = check_name(f"{path}: id", key)
            text = text_of(f"{path}", texts, key, self.prompt_file)
            source = re.sub(r"\d+$", "", name) or "numbered"
            prompts.append(Prompt(name, text, source, self.num_images, {"item_id": name, "text": text}))
        assert path is not None
        return check_prompts(path, prompts)
