"""Block-causal attention: who sees whom, as one predicate, and attention under it (arXiv 2602.14041 Sec. 3.3).

Shape suffixes: S query positions, T key positions, B batch, N query heads, G key/value heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional


def visible(document_ids: torch.Tensor, block_ids: torch.Tensor, num_queries: int | None = None) -> torch.Tensor:
    """The mask of a pack: position i sees j when both are of one sample and j's block is not after i's.

    `Pack.block_ids` never decrease along a sample, so this is causal attention over blocks and full attention within
    one. Padding sees padding only, so every row has a visible position.

    Args:
        document_ids: int [T], sample of each position, -1 for padding.
        block_ids: int [T], attention group within the sample.
        num_queries: only the last `num_queries` positions ask, as in decoding with a cache; default all.

    Returns:
        bool [S, T], True where a query (row) sees a key (column).
    """
    first = 0 if num_queries is None else len(document_ids) - num_queries
    same_document = document_ids[first:, None] == document_ids[None, :]
    return same_document & (block_ids[None, :] <= block_ids[first:, None])


def attend(
    query_SBNK: torch.Tensor, key_TBGK: torch.Tensor, value_TBGK: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Scaled dot-product attention with grouped queries: N / G neighbouring query heads share a key/value head.

    Args:
        query_SBNK: float, the queries.
        key_TBGK: float, the keys; G divides N.
        value_TBGK: float, the values.
        mask: bool, broadcastable to [B, N, S, T], True where a key is seen; a [S, T] mask serves all.

    Returns:
        [S, B, N, K] in the dtype of the query.
    """
    # Heads are repeated here because `enable_gqa` leaves CUDA only kernels without masks, and the one that stores
    # the whole score matrix.
    group_size = query_SBNK.shape[2] // key_TBGK.shape[2]
    key_TBNK = key_TBGK.repeat_interleave(group_size, dim=2)
    value_TBNK = value_TBGK.repeat_interleave(group_size, dim=2)
    mixed_BNSK = functional.scaled_dot_product_attention(
        rearrange(query_SBNK, "s b n k -> b n s k"),
        rearrange(key_TBNK, "t b n k -> b n t k"),
        rearrange(value_TBNK, "t b n k -> b n t k"),
        attn_mask=mask,
    )
    return rearrange(mixed_BNSK, "b n s k -> s b n k")


@dataclass(frozen=True)
class DocumentMask:
    """The mask of a pack, sample by sample: what lies between samples is never seen and never computed.

    A pack of n samples of equal length costs 1 / n of a dense mask over the pack, in time and in memory.

    Attributes:
        spans: (start, stop) of each sample's positions, and of the padding.
        masks: bool [stop - start, stop - start] of each span, True where a position (row) sees another (column).
    """

    spans: tuple[tuple[int, int], ...]
    masks: tuple[torch.Tensor, ...]

    def attend(self, query_SBNK: torch.Tensor, key_SBGK: torch.Tensor, value_SBGK: torch.Tensor) -> torch.Tensor:
        """`attend` within every span; [S, B, N, K]."""
        parts = [
            attend(query_SBNK[start:stop], key_SBGK[start:stop], value_SBGK[start:stop], mask)
            for (start, stop), mask in zip(self.spans, self.masks, strict=True)
        ]
        return torch.cat(parts)


def document_mask(document_ids: np.ndarray, block_ids: np.ndarray, device: torch.device) -> DocumentMask:
    """The `visible` predicate of a pack, kept within its samples.

    Args:
        document_ids: int [S], sample of each position, -1 for padding; the positions of a sample are neighbours.
        block_ids: int [S], attention group within the sample.
        device: where the masks are made.
    """
    borders = [0, *(np.flatnonzero(np.diff(document_ids)) + 1).tolist(), len(document_ids)]
    spans = tuple(zip(borders[:-1], borders[1:], strict=True))
    documents, blocks = (torch.from_numpy(ids).to(device) for ids in (document_ids, block_ids))
    masks = tuple(visible(documents[start:stop], blocks[start:stop]) for start, stop in spans)
    return DocumentMask(spans, masks)
