"""The class-conditional network in plain PyTorch, from the paper's formulas and the published names alone.

Nothing here is imported from the package: it is what the package is compared with (arXiv 2602.14041 Sec. 4.2).

Shape suffixes: N images, T class tokens, S positions, V vision tokens, P tokens per block, M blocks, C bits, D width.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as f


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


class SwiGLU(nn.Module):
    """w2(silu(first half of w1 x) * second half)."""

    def __init__(self, size_in: int, hidden: int, size_out: int, bias: bool) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(size_in, 2 * hidden, bias=bias), nn.Linear(hidden, size_out, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.w1(x).chunk(2, dim=-1)
        return self.w2(f.silu(gate) * up)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, turns: torch.Tensor | None = None):
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.wqkv(x).chunk(3, dim=-1))
        if turns is not None:
            q, k = turn(q, turns), turn(k, turns)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def turn(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns the neighbouring channels (2 j, 2 j + 1), as complex numbers, by the turns [S, K / 2]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


class Layer(nn.Module):
    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, num_heads, False), SwiGLU(width, hidden, width, False)
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), mask, turns)
        return x + self.feed_forward(self.ffn_norm(x))


class TokenBlock(SwiGLU):
    """Head block of p = 1."""

    def __init__(self, width: int, hidden: int, head_dim: int) -> None:
        super().__init__(width, hidden, width, True)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scale, shift, gate = y.chunk(3, dim=-1)
        return x + gate * super().forward(self.norm(x) * (1 + scale) + shift)


class AttentionBlock(SwiGLU):
    """Head block of p > 1."""

    def __init__(self, width: int, hidden: int, head_dim: int) -> None:
        super().__init__(width, hidden, width, True)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, width // head_dim, True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = y.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * super().forward(self.norm2(x) * (1 + scale2) + shift2)


class HeadNet(nn.Module):
    def __init__(self, width: int, num_blocks: int, num_adaln: int, head_dim: int, cond: int, bits: int, p: int):
        super().__init__()
        block, num_mods, hidden = (TokenBlock, 3, int(1.5 * width)) if p == 1 else (AttentionBlock, 6, int(1.5 * width))
        self.time_embed = nn.Module()
        self.time_embed.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.cond_embed, self.input_proj = nn.Linear(cond, width), nn.Linear(bits, width)
        self.res_blocks = nn.ModuleList(block(width, hidden, head_dim) for _ in range(num_blocks))
        self.ada_ln_blocks = nn.ModuleList(nn.Linear(width, num_mods * width) for _ in range(num_adaln))
        self.final_layer = nn.Module()
        self.final_layer.ada_ln_modulation = nn.Linear(width, 2 * width)
        self.final_layer.linear = nn.Linear(width, bits)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Predicted clean bits; noisy [M, P, C], t [M], z [M, P, D]."""
        angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        time = self.time_embed.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        y = f.silu(time[:, None] + self.cond_embed(z))
        x = self.input_proj(noisy)
        per_module = len(self.res_blocks) // len(self.ada_ln_blocks)
        for index, block in enumerate(self.res_blocks):
            x = block(x, self.ada_ln_blocks[index // per_module](y))
        scale, shift = self.final_layer.ada_ln_modulation(y).chunk(2, dim=-1)
        return self.final_layer.linear(f.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class ClassNetwork(nn.Module):
    """The whole network; parameter names are the published ones."""

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        num_heads: int,
        ffn: int,
        head_width: int,
        head_blocks: int,
        num_adaln: int,
        p: int,
        head_head_dim: int = 64,
        num_classes: int = 1000,
        num_class_tokens: int = 64,
        bits: int = 32,
        grid: int = 16,
    ) -> None:
        super().__init__()
        self.p, self.grid, self.num_class_tokens, self.head_dim = p, grid, num_class_tokens, width // num_heads
        self.cls_embedding = nn.Embedding(num_classes + 1, num_class_tokens * width)
        self.query_token = nn.Parameter(torch.zeros(p * p - 1, width))
        self.proj_in = SwiGLU(bits, int(1.5 * width), width, True)
        self.emb_norm = RMSNorm(width)
        self.layers = nn.ModuleList(Layer(width, num_heads, ffn) for _ in range(num_layers))
        self.norm = RMSNorm(width)
        self.pos_for_diff = nn.Embedding(grid * grid, width)
        self.head = nn.Module()
        self.head.net = HeadNet(head_width, head_blocks, num_adaln, head_head_dim, width, bits, p)

    def cells(self) -> list[tuple[int, int]]:
        """(row, column) of every token in the order of generation: blocks in raster order, cells in them likewise."""
        p, blocks = self.p, range(self.grid // self.p)
        return [(p * i + r, p * j + c) for i in blocks for j in blocks for r in range(p) for c in range(p)]

    def conditions(self, labels: torch.Tensor, bits_NVC: torch.Tensor) -> torch.Tensor:
        """Z [N, V, D] of every token, from the (flipped) bits of the image; labels [N]."""
        size, num_vision = self.p**2, self.grid**2
        class_NTD = self.cls_embedding(labels).unflatten(-1, (self.num_class_tokens, -1))
        query = self.query_token.expand(len(labels), -1, -1)
        x = self.emb_norm(torch.cat([class_NTD, query, self.proj_in(bits_NVC[:, :-size])], dim=1))
        length, first = x.shape[1], self.num_class_tokens - 1
        group = [i if i < first else first + (i - first) // size for i in range(length)]
        mask = torch.tensor([[group[j] <= group[i] for j in range(length)] for i in range(length)])
        quarter = self.head_dim // 4
        frequencies = 1 / 10000 ** (2 * torch.arange(quarter) / (2 * quarter))
        angles = torch.zeros(length, 2 * quarter)
        for place, (row, column) in enumerate(self.cells()[:-size]):
            angles[first + size + place] = torch.cat([(column + 1.5) * frequencies, (row + 1.5) * frequencies])
        turns = torch.polar(torch.ones_like(angles), angles)
        for layer in self.layers:
            x = layer(x, mask, turns)
        return self.norm(x)[:, -num_vision:] + self.pos_for_diff.weight

    def loss(self, labels, read_NVC, clean_NVC, noise_NVC, t_NM) -> torch.Tensor:
        """The flow loss, a mean over tokens and bits, with one draw of time and noise per block."""
        size = self.p**2
        z, clean, noise = (
            part.unflatten(1, (-1, size)).flatten(0, 1)
            for part in (self.conditions(labels, read_NVC), clean_NVC, noise_NVC)
        )
        t = t_NM.flatten()
        noisy = t[:, None, None] * clean + (1 - t[:, None, None]) * noise
        error = (self.head.net(noisy, t, z) - clean) / (1 - t).clamp(min=0.05)[:, None, None]
        return error.square().mean()
