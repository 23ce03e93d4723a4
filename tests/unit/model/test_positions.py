"""The 2-D table against a plain loop; rotary angles against complex rotation."""

from __future__ import annotations

import math

import pytest
import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.model.positions import axis_table, look_up_cells, rotary_frequencies, sincos_2d


def test_sincos_against_a_loop():
    hidden_size = 24
    cells = [(0, 0), (3, 1), (255, 7), (12, 255)]
    table = sincos_2d(torch.tensor(cells, dtype=torch.int32), hidden_size)
    assert table.dtype is torch.float32
    for number, (row, column) in enumerate(cells):
        expected = []
        for coordinate in (column, row):
            angles = [coordinate / 10000 ** (i / (hidden_size / 4)) for i in range(hidden_size // 4)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        # The table is float32 with angles in float64: only the final rounding, 6e-8, remains.
        assert table[number].tolist() == pytest.approx(expected, abs=1e-7)


def test_sincos_refuses_a_width_it_cannot_quarter():
    with pytest.raises(ConfigError, match="model.hidden_size = 30: must be a multiple of 4"):
        sincos_2d(torch.zeros(1, 2, dtype=torch.int32), 30)


def apply_rotary(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Channel i against channel i + K / 2, as Qwen3 rotates."""
    first, second = x.chunk(2, dim=-1)
    return x * frequencies.cos() + torch.cat([-second, first], dim=-1) * frequencies.sin()


def test_rotary_against_complex_rotation():
    head_dim, base = 8, 1e6
    positions = torch.tensor([0, 1, 5, 4300])
    x = torch.randn(4, 2, 3, head_dim, generator=torch.Generator().manual_seed(0))
    frequencies = rotary_frequencies(positions, head_dim, base)
    assert frequencies.shape == (4, 1, 1, head_dim)
    found = apply_rotary(x, frequencies)
    for row, position in enumerate(positions.tolist()):
        for i in range(head_dim // 2):
            rotation = torch.polar(torch.tensor(1.0), torch.tensor(position / base ** (2 * i / head_dim)))
            expected = torch.complex(x[row, ..., i], x[row, ..., i + head_dim // 2]) * rotation
            # float32 angles are exact at i = 0 and off by 4300 / 31.6 * 1e-7 = 1e-5 at i = 1.
            torch.testing.assert_close(found[row, ..., i], expected.real, rtol=0, atol=5e-5)
            torch.testing.assert_close(found[row, ..., i + head_dim // 2], expected.imag, rtol=0, atol=5e-5)


def test_rotary_products_depend_on_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def product(query_position: int, key_position: int) -> float:
        rotated = [
            apply_rotary(x, rotary_frequencies(torch.tensor([position]), 16, 1e4))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (rotated[0] * rotated[1]).sum().item()

    # float32 angles up to 107 carry an error of 1e-5.
    assert product(107, 100) == pytest.approx(product(7, 0), abs=1e-3)
    assert abs(product(7, 0) - product(8, 0)) > 1e-2


def test_a_table_of_one_axis_gives_all_cells():
    cells = torch.tensor([[[0, 0], [3, 200]], [[255, 1], [17, 255]]], dtype=torch.int32)
    for hidden_size in (32, 96):
        table = axis_table(hidden_size)
        assert table.shape == (256, hidden_size // 2)
        assert torch.equal(look_up_cells(table, cells), sincos_2d(cells, hidden_size))
