"""What adapters change in the published tensors of a network: the sum of all of them, computed in float32.

linear         W + sum of weight * scale * (B A)      in `row_blocks`, adapters in their order
projector      P + sum of weight * (trained - P)      of adapters that have one; one of weight 1 is taken as it is
query tokens   row + sum of weight * delta            of the embedding, whose last rows they are
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.model.adapter_source import WeightedAdapter, adaptable_linears, check_fits
from bitdance_scale.model.low_rank import changed_rows, row_blocks
from bitdance_scale.model.published_names import PUBLISHED_EMBEDDING, PUBLISHED_QUERIES, Part, published_tensors


class AdapterChanges:
    """The change of a network.

    Args:
        adapters: what is added up; none of them changes nothing.
        network: the network.
        vocab_size: rows of its embedding.
        where: what the network is called in messages.

    Raises:
        CheckpointError: adapters do not fit the network.
    """

    def __init__(
        self, adapters: Sequence[WeightedAdapter], network: NetworkConfig, vocab_size: int, where: str
    ) -> None:
        for adapter in adapters:
            check_fits(adapter.source, network, vocab_size, where)
        self.adapters = tuple(adapters)
        self._linears = {
            (linear.part, linear.published): name
            for name, linear in adaptable_linears(network, vocab_size).items()
            if any(name in adapter.source.matrices for adapter in adapters)
        }
        self._shapes = {(tensor.part, tensor.name): tensor.shape for tensor in published_tensors(network, vocab_size)}
        self._num_queries = network.vision.block_tokens - 1
        table = PUBLISHED_EMBEDDING if network.model.parts.has_text else PUBLISHED_QUERIES
        self._table = (Part.BACKBONE, table)
        # Of a table of all tokens they are the last; a table of queries has no others.
        num_rows = vocab_size if network.model.parts.has_text else self._num_queries
        self._first_query = num_rows - self._num_queries

    def names(self, part: Part) -> list[str]:
        """The published tensors of a part that are changed."""
        return [name for each, name in self._shapes if each is part and self.touches(each, name)]

    def described(self) -> list[dict[str, Any]]:
        """Where the adapters are from and how much of each acts, for a report."""
        return [{"source": adapter.source.where, "weight": adapter.weight} for adapter in self.adapters]

    def touches(self, part: Part, name: str) -> bool:
        """Whether a published tensor is changed."""
        if (part, name) == self._table:
            return any(adapter.source.num_queries for adapter in self.adapters)
        if part is Part.PROJECTOR:
            return any(adapter.source.projector for adapter in self.adapters)
        return (part, name) in self._linears

    def blocks(self, part: Part, name: str, read_rows: Callable[[int, int], torch.Tensor]) -> Iterator[torch.Tensor]:
        """A tensor that is changed, some rows at a time.

        Args:
            part: where it is.
            name: its published name.
            read_rows: its rows start..stop before the change, [N, ..], in one dtype.

        Yields:
            [N, ..] in that dtype; rounded once.

        Raises:
            CheckpointError: values of an adapter are not finite, or cannot be read.
        """
        num_rows, *others = self._row_shape(part, name)
        for start, stop in row_blocks(num_rows, others[0] if others else 1):
            rows = read_rows(start, stop)
            if (part, name) == self._table:
                yield self._with_queries(rows, start)
            elif part is Part.PROJECTOR:
                yield self._projector_rows(name, start, rows)
            else:
                yield changed_rows(rows, self._products(self._linears[part, name], start, stop))

    def _row_shape(self, part: Part, name: str) -> tuple[int, ...]:
        """Rows and columns; the table of queries has a dimension of 1 before them."""
        shape = self._shapes[part, name]
        return shape[1:] if name == PUBLISHED_QUERIES else shape

    def _products(self, linear: str, start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        products = []
        for adapter in self.adapters:
            found = adapter.source.matrices.get(linear)
            if found is not None:
                a, b = adapter.source.read_a(linear), adapter.source.read_b(linear, start, stop)
                products.append((a, b, adapter.weight * found.scale))
        return products

    def _projector_rows(self, name: str, start: int, rows: torch.Tensor) -> torch.Tensor:
        trained = [
            (adapter.weight, adapter.source.read_projector(name)[start : start + len(rows)].float())
            for adapter in self.adapters
            if adapter.source.projector
        ]
        if len(trained) == 1 and trained[0][0] == 1:
            return trained[0][1].to(rows.dtype)
        base = rows.float()
        changed = base.clone()
        for weight, values in trained:
            changed += weight * (values - base)
        return changed.to(rows.dtype)

    def _with_queries(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        first = max(self._first_query - start, 0)
        if first >= len(rows):
            return rows
        begin = start + first - self._first_query
        whole = rows[first:].float()
        for adapter in self.adapters:
            if adapter.source.num_queries:
                whole = whole + adapter.weight * adapter.source.read_queries()[begin : begin + len(whole)].float()
        return torch.cat([rows[:first], whole.to(rows.dtype)])
