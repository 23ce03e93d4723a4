"""Which linears of a network can have an adapter, and which rows of ours are which rows of theirs.

An adapter belongs to a published linear, such as `model.layers.3.self_attn.q_proj`, so that it can be given to other
programs. One of our linears may stack several of them (`published_names.py`).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.low_rank import ADAPTER
from bitdance_scale.model.published_names import NamedTensor, Part, our_tensors

HEAD_PREFIX = "head."
"""What the names of the head's linears begin with, whose published ones are those of a file of their own."""
PROJECTOR = "projector."
QUERY_DELTAS = "query_deltas."
"""What the global names of the parameters of the projector, and of the changes of query tokens, begin with."""
_WEIGHT = ".weight"
# Names of linears; what else has a matrix are tables.
_OURS = re.compile(r"decoder\.layers\.\d+\.(self_attention|mlp)\.linear_\w+\.weight|head\..+\.weight")


@dataclass(frozen=True)
class AdaptableLinear:
    """A published linear.

    Attributes:
        name: what it is called: its published name without `.weight`, of the head after `HEAD_PREFIX`.
        published: name of its published tensor.
        part: the part of the published folder that has it.
        ours: global name of our tensor that has its rows.
        out_size, in_size: its features.
    """

    name: str
    published: str
    part: Part
    ours: str
    out_size: int
    in_size: int

    @property
    def key(self) -> str:
        """What tells it from others in the same linear of ours: the last part of its name."""
        return self.name.rpartition(".")[2]


def is_added(name: str) -> bool:
    """Whether a parameter, by its global name, is beside the network rather than of it."""
    return ADAPTER in name or name.startswith(QUERY_DELTAS)


def is_trained(name: str, section: LoraSection) -> bool:
    """Whether a parameter, by its global name, is trained in a run with adapters."""
    return is_added(name) or (section.train_projector and name.startswith(PROJECTOR))


def linears_of(tensor: NamedTensor) -> list[AdaptableLinear]:
    """The published linears in one of our tensors, in the order in which they appear there; none in other tensors."""
    if len(tensor.shape) != 2 or not _OURS.fullmatch(tensor.name):
        return []
    sizes: dict[str, int] = {}
    for rows in tensor.rows:
        sizes[rows.published] = sizes.get(rows.published, 0) + rows.num_rows
    prefix = HEAD_PREFIX if tensor.part is Part.HEAD else ""
    return [
        AdaptableLinear(prefix + name.removesuffix(_WEIGHT), name, tensor.part, tensor.name, num_rows, tensor.shape[1])
        for name, num_rows in sizes.items()
    ]


def is_match(name: str, pattern: str) -> bool:
    """Whether a pattern is a name, or the end of it after a dot."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def targets(network: NetworkConfig, vocab_size: int, patterns: Sequence[str]) -> Iterator[AdaptableLinear]:
    """The linears of a network that have an adapter, in the order in which a sample passes through it.

    Args:
        network: its sizes.
        vocab_size: rows of the embedding.
        patterns: `lora.targets`.

    Raises:
        ConfigError: a pattern matches no linear; it has the nearest names.
    """
    linears = [linear for tensor in our_tensors(network, vocab_size) for linear in linears_of(tensor)]
    unmatched = [pattern for pattern in patterns if not any(is_match(linear.name, pattern) for linear in linears)]
    if unmatched:
        raise ConfigError(
            f"lora.targets: {', '.join(map(repr, unmatched))}: no linear of the network has such a name; the nearest "
            f"are {', '.join(_nearest(unmatched[0], linears))}. Correct it, or leave it out"
        )
    for linear in linears:
        if any(is_match(linear.name, pattern) for pattern in patterns):
            yield linear


def _nearest(pattern: str, linears: Sequence[AdaptableLinear]) -> list[str]:
    """Names that are most like a pattern: whole ones if it has dots, else last parts."""
    names = dict.fromkeys(linear.name if "." in pattern else linear.key for linear in linears)
    return difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:7]
