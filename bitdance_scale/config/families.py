"""The network families: what a network is made of, in names of parts.

A family is chosen with `model.family`. Whoever builds, feeds or counts a network reads here which part it has, so that
no other file compares the name of a family. The parts themselves are in `sequence/`, `model/` and `parallel/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A network family.

    Attributes:
        condition: what comes before the image: text (a chat prompt, whose tokens are targets too) or class (tokens of
            its class).
        projector: from bits to the backbone: gelu (two linears with a GELU between) or swiglu (a gated one).
        adds_cells_at_input: whether vision tokens get the 2-D sine-cosine table of their cells.
        has_input_norm: whether an RMSNorm over the whole sequence comes before the first layer.
        has_query_key_norms: whether queries and keys are normalised.
        rotary: rotary positions: sequence (one axis, halves of a head turn together) or cells (row and column of the
            vision token, neighbouring channels turn together; nothing else turns).
        head_cells: what tells the head which cell it predicts: sincos (the 2-D table) or learned (a table).
        head_output: what the head's last linear gives: sigmoid (logits of the bits) or bits (the bits themselves).
        attends_single_tokens: whether the head has attention where a block is one token, which then only mixes
            channels.
    """

    condition: str
    projector: str
    adds_cells_at_input: bool
    has_input_norm: bool
    has_query_key_norms: bool
    rotary: str
    head_cells: str
    head_output: str
    attends_single_tokens: bool

    @property
    def has_text(self) -> bool:
        """Whether it predicts text tokens too."""
        return self.condition == "text"

    def head_attends(self, block_tokens: int) -> bool:
        """Whether its head has attention, with blocks of so many tokens."""
        return self.attends_single_tokens or block_tokens > 1


FAMILIES: Mapping[str, Family] = {
    # arXiv 2602.14041 Sec. 4.3, published 14B release.
    "text_to_image": Family(
        condition="text",
        projector="gelu",
        adds_cells_at_input=True,
        has_input_norm=False,
        has_query_key_norms=True,
        rotary="sequence",
        head_cells="sincos",
        head_output="sigmoid",
        attends_single_tokens=True,
    ),
    # Sec. 4.2, published class-conditional release.
    "class_conditional": Family(
        condition="class",
        projector="swiglu",
        adds_cells_at_input=False,
        has_input_norm=True,
        has_query_key_norms=False,
        rotary="cells",
        head_cells="learned",
        head_output="bits",
        attends_single_tokens=False,
    ),
}
"""Value of `model.family` -> what it means."""
