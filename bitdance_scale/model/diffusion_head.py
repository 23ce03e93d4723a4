"""The binary diffusion head f(x_t, t, z): predicts the clean bits of one block (arXiv 2602.14041 Sec. 3.2, 3.3).

A small transformer with full attention among the P tokens of a block, modulated per token by the flow time and by the
backbone's hidden state z (adaLN). Parameter names are those of the published release.

The modulations depend on the time and the condition but not on the noisy bits. Training computes them as the blocks
need them. A sampler knows all its times, so it computes the modulations of many steps together
(`DiffusionHead.modulations`) and then only denoises.

Shape suffixes: B blocks, P tokens per block, C bits, D head width, Z condition size, N attention heads of this rank,
K channels per head, F time features, T flow times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from bitdance_scale.config.schema import NUM_MODULATIONS, NUM_TIME_FEATURES, NUM_TOKEN_MODULATIONS, HeadSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.flow import block_losses, flow_loss, interpolate
from bitdance_scale.model.fused_autograd import gated_add, gated_add_norm, modulated_norm, swiglu
from bitdance_scale.model.linears import LinearFactory

NORM_EPS = 1e-6
TIME_SCALE = 1000.0
MAX_TIME_PERIOD = 10000.0
# Of the final layer: scale and shift.
NUM_FINAL_MODULATIONS = 2


def time_features(t_B: torch.Tensor) -> torch.Tensor:
    """Sinusoidal features of the flow time: cosines, then sines, of 1000 t / 10000^(i / 128) (published release).

    Args:
        t_B: float [B], in [0, 1].

    Returns:
        float32 [B, 256].
    """
    half = NUM_TIME_FEATURES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = TIME_SCALE * t_B.float()[:, None] * torch.exp(-math.log(MAX_TIME_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiffusionHead(nn.Module):
    """Predicts clean bits from noisy ones, block by block.

    Args:
        section: sizes of the head.
        cond_size: width Z of the condition, the backbone's hidden size.
        num_bits: C.
        block_tokens: P; no parameter depends on it.
        linears: makes the linears, plain or tensor-parallel.
        output: what the last linear gives: sigmoid (logits of the bits) or bits (the bits themselves).
        has_attention: whether the tokens of a block attend to each other; without, P is 1.
        is_compiled: whether norms, modulations, residuals and SwiGLU are compiled.

    Attributes:
        block_tokens: P.
        time_shift: of the flow times, in training and in sampling.

    Raises:
        ConfigError: sizes do not divide.
    """

    def __init__(
        self,
        section: HeadSection,
        cond_size: int,
        num_bits: int,
        block_tokens: int,
        linears: LinearFactory,
        *,
        output: str = "sigmoid",
        has_attention: bool = True,
        is_compiled: bool = False,
    ) -> None:
        super().__init__()
        _check(section, linears.num_partitions)
        assert has_attention or block_tokens == 1, "the tokens of a block must see each other"
        self.block_tokens, self.time_shift = block_tokens, section.time_shift
        self._to_bits = OUTPUTS[output]
        block = HeadBlock if has_attention else TokenBlock
        self.net = HeadNetwork(section, cond_size, num_bits, linears, block, is_compiled)

    def recompute_blocks(self, checkpoint: Callable[..., torch.Tensor]) -> None:
        """Makes every block keep only its inputs; `checkpoint(block, *inputs)` calls a block that way."""
        self.net.call_block = checkpoint

    def forward(self, noisy_BPC: torch.Tensor, t_B: torch.Tensor, cond_BPZ: torch.Tensor) -> torch.Tensor:
        """The predicted clean bits.

        Args:
            noisy_BPC: float, x_t.
            t_B: float, one flow time per block, 0 noise and 1 data.
            cond_BPZ: float, hidden states that predict the tokens, plus the positions of the predicted cells; or those
                of B / K blocks, which then all have K draws, one after the other.

        Returns:
            float32 [B, P, C], in (-1, 1) where the output is a sigmoid; B may be 0.

        Raises:
            ValueError: the blocks do not hold `block_tokens` tokens.
        """
        self._check_blocks(noisy_BPC)
        return self._to_bits(self.net(noisy_BPC, t_B, cond_BPZ))

    def losses(
        self,
        cond_BPZ: torch.Tensor,
        clean_BPC: torch.Tensor,
        noise_KBPC: torch.Tensor,
        t_KB: torch.Tensor,
        reports_blocks: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The flow loss (Eq. 7).

        Args:
            cond_BPZ: as in `forward`.
            clean_BPC: the true bits, -1 and 1.
            noise_KBPC: [K B, P, C], the other ends of the flow, K draws of all blocks one after the other.
            t_KB: float32 [K B], the flow times.
            reports_blocks: whether the second result is wanted.

        Returns:
            (float32 scalar, float32 [B] or None): the sum over tokens of the mean over bits and draws, and the mean of
            every block over its tokens, bits and draws.
        """
        num_draws = len(t_KB) // len(cond_BPZ)
        clean_KBPC = clean_BPC.repeat(num_draws, 1, 1)
        noisy_KBPC = interpolate(clean_KBPC, noise_KBPC, t_KB)
        predicted_KBPC = self(noisy_KBPC, t_KB, cond_BPZ)
        loss = flow_loss(predicted_KBPC, clean_KBPC, noisy_KBPC, t_KB)[0] / num_draws
        if not reports_blocks:
            return loss, None
        return loss, block_losses(predicted_KBPC, clean_KBPC, noisy_KBPC, t_KB).view(num_draws, -1).mean(0)

    @property
    def modulations_per_channel(self) -> int:
        """How many numbers per token and channel of D `modulations` returns for one time."""
        return self.net.num_modulations * len(self.net.ada_ln_blocks) + NUM_FINAL_MODULATIONS

    def embed_times(self, t_T: torch.Tensor) -> torch.Tensor:
        """Flow times [T] as the modulations take them, [T, D] in the dtype of the parameters."""
        return self.net.embed_times(t_T)

    def embed_condition(self, cond_BPZ: torch.Tensor) -> torch.Tensor:
        """The condition as the modulations take it, [B, P, D] in the dtype of the parameters."""
        return self.net.embed_condition(cond_BPZ)

    def modulations(self, time_TD: torch.Tensor, cond_BPD: torch.Tensor) -> list[torch.Tensor]:
        """The modulations of every pair of a time and a condition.

        Args:
            time_TD: flow times, from `embed_times`.
            cond_BPD: conditions, from `embed_condition`.

        Returns:
            [T, B, P, 6 D] of each adaLN module, 3 D without attention, and [T, B, P, 2 D] of the final layer; `denoise`
            takes element t of each.
        """
        y_TBPD = functional.silu(time_TD[:, None, None] + cond_BPD)
        return [linear(y_TBPD) for linear in self.net.modulation_linears()]

    def denoise(self, noisy_BPC: torch.Tensor, modulations: Iterable[torch.Tensor]) -> torch.Tensor:
        """`forward` with given modulations: [B, P, 6 D] of each adaLN module, [B, P, 2 D] of the final layer."""
        self._check_blocks(noisy_BPC)
        return self._to_bits(self.net.denoise(noisy_BPC, modulations))

    def _check_blocks(self, noisy_BPC: torch.Tensor) -> None:
        if noisy_BPC.shape[1] != self.block_tokens:
            raise ValueError(f"blocks hold {noisy_BPC.shape[1]} tokens, the head was built for {self.block_tokens}")


class HeadNetwork(nn.Module):
    """The head up to its logits; the `net.` of the published names."""

    def __init__(
        self,
        section: HeadSection,
        cond_size: int,
        num_bits: int,
        linears: LinearFactory,
        block: type[HeadBlock] | type[TokenBlock],
        is_compiled: bool,
    ) -> None:
        super().__init__()
        width = section.width
        self.num_modulations = block.num_modulations
        self.call_block: Callable[..., torch.Tensor] = _call
        self.blocks_per_adaln = section.num_blocks // section.num_adaln
        self.time_embed = TimeEmbedding(width, linears)
        self.cond_embed = linears.column(cond_size, width, gather_output=True)
        self.input_proj = linears.replicated(num_bits, width)
        self.res_blocks = nn.ModuleList(block(section, linears, is_compiled) for _ in range(section.num_blocks))
        self.ada_ln_blocks = nn.ModuleList(
            linears.column(width, self.num_modulations * width, gather_output=True) for _ in range(section.num_adaln)
        )
        self.final_layer = FinalLayer(width, num_bits, linears, is_compiled)

    def forward(self, noisy_BPC: torch.Tensor, t_B: torch.Tensor, cond_BPZ: torch.Tensor) -> torch.Tensor:
        """Logits [B, P, C] in the dtype of the parameters; arguments as in `DiffusionHead.forward`."""
        embedded_BPD = self.embed_condition(cond_BPZ)
        if len(cond_BPZ) != len(t_B):
            embedded_BPD = embedded_BPD.repeat(len(t_B) // len(cond_BPZ), 1, 1)
        y_BPD = functional.silu(self.embed_times(t_B)[:, None] + embedded_BPD)
        # Computed when the blocks need them, so that none is held earlier.
        return self.denoise(noisy_BPC, (linear(y_BPD) for linear in self.modulation_linears()))

    def embed_times(self, t_T: torch.Tensor) -> torch.Tensor:
        """Flow times [T] -> [T, D]."""
        return self.time_embed(time_features(t_T).to(self.input_proj.bias.dtype))

    def embed_condition(self, cond_BPZ: torch.Tensor) -> torch.Tensor:
        """[B, P, Z] -> [B, P, D]."""
        return self.cond_embed(cond_BPZ.to(self.input_proj.bias.dtype))

    def modulation_linears(self) -> list[nn.Module]:
        """The linears of the modulations, in the order in which `denoise` uses their outputs."""
        return [*self.ada_ln_blocks, self.final_layer.ada_ln_modulation]

    def denoise(self, noisy_BPC: torch.Tensor, modulations: Iterable[torch.Tensor]) -> torch.Tensor:
        """Logits [B, P, C] under modulations [B, P, 6 D] of each adaLN module and [B, P, 2 D] of the final layer."""
        outputs = iter(modulations)
        x_BPD = self.input_proj(noisy_BPC.to(self.input_proj.bias.dtype))
        for index, block in enumerate(self.res_blocks):
            # Consecutive blocks share one adaLN module and its output.
            if index % self.blocks_per_adaln == 0:
                block_modulations = next(outputs).chunk(self.num_modulations, dim=-1)
            x_BPD = self.call_block(block, x_BPD, block_modulations)
        return self.final_layer(x_BPD, next(outputs))


class TimeEmbedding(nn.Module):
    """Two linears with SiLU between them, on the features of the flow time."""

    def __init__(self, width: int, linears: LinearFactory) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            linears.replicated(NUM_TIME_FEATURES, width), nn.SiLU(), linears.replicated(width, width)
        )

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        """[B, F] -> [B, D]."""
        return self.mlp(features_BF)


class ModulatedNorm(nn.LayerNorm):
    """The norm at the start of a half of a block, modulated, with the gated addition that ends the half before it."""

    def __init__(self, width: int, is_compiled: bool, *, has_affine: bool = True) -> None:
        super().__init__(width, eps=NORM_EPS, elementwise_affine=has_affine)
        self._is_compiled = is_compiled

    def forward(  # type: ignore[override]
        self,
        x_BPD: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        gate: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x plus gate * added, if they are given; of that the norm, times 1 + scale, plus shift); all [B, P, D]."""
        affine, modulation = (self.weight, self.bias), (scale, shift)
        if gate is None or added is None:
            return modulated_norm(x_BPD, affine, modulation, self.eps, self._is_compiled)
        return gated_add_norm(x_BPD, gate, added, affine, modulation, self.eps, self._is_compiled)


class HeadBlock(nn.Module):
    """Modulated attention within the block, then a modulated SwiGLU, each with a gated residual."""

    num_modulations = NUM_MODULATIONS

    def __init__(self, section: HeadSection, linears: LinearFactory, is_compiled: bool) -> None:
        super().__init__()
        self._is_compiled = is_compiled
        width, hidden = section.width, section.mlp_size
        self.norm1 = ModulatedNorm(width, is_compiled)
        self.attn = HeadAttention(width, width // section.head_dim // linears.num_partitions, linears)
        self.norm2 = ModulatedNorm(width, is_compiled)
        self.w1 = linears.column(width, 2 * hidden, num_chunks=2)
        self.w2 = linears.row(hidden, width)

    def forward(self, x_BPD: torch.Tensor, modulations: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Same shape; modulations: scale1, shift1, gate1, scale2, shift2, gate2, each [B, P, D]."""
        scale1, shift1, gate1, scale2, shift2, gate2 = modulations
        x_BPD, modulated_BPD = self.norm1(x_BPD, scale1, shift1)
        x_BPD, modulated_BPD = self.norm2(x_BPD, scale2, shift2, gate1, self.attn(modulated_BPD))
        return gated_add(x_BPD, gate2, self.w2(swiglu(self.w1(modulated_BPD), self._is_compiled)), self._is_compiled)


class TokenBlock(nn.Module):
    """A modulated SwiGLU with a gated residual: all there is to mix where a block is one token."""

    num_modulations = NUM_TOKEN_MODULATIONS

    def __init__(self, section: HeadSection, linears: LinearFactory, is_compiled: bool) -> None:
        super().__init__()
        self._is_compiled = is_compiled
        width, hidden = section.width, section.mlp_size
        self.norm = ModulatedNorm(width, is_compiled)
        self.w1 = linears.column(width, 2 * hidden, num_chunks=2)
        self.w2 = linears.row(hidden, width)

    def forward(self, x_BPD: torch.Tensor, modulations: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Same shape; modulations: scale, shift, gate, each [B, P, D]."""
        scale, shift, gate = modulations
        x_BPD, modulated_BPD = self.norm(x_BPD, scale, shift)
        return gated_add(x_BPD, gate, self.w2(swiglu(self.w1(modulated_BPD), self._is_compiled)), self._is_compiled)


class HeadAttention(nn.Module):
    """Full attention among the tokens of a block, without position embeddings: z contains the positions."""

    def __init__(self, width: int, num_local_heads: int, linears: LinearFactory) -> None:
        super().__init__()
        self.num_local_heads = num_local_heads
        self.wqkv = linears.column(width, 3 * width, num_chunks=3)
        self.wo = linears.row(width, width)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        """[B, P, D] -> [B, P, D]."""
        query_BNPK, key_BNPK, value_BNPK = rearrange(
            self.wqkv(x_BPD), "b p (three n k) -> three b n p k", three=3, n=self.num_local_heads
        )
        mixed_BNPK = functional.scaled_dot_product_attention(query_BNPK, key_BNPK, value_BNPK)
        return self.wo(rearrange(mixed_BNPK, "b n p k -> b p (n k)"))


class FinalLayer(nn.Module):
    """LayerNorm without affine, modulation from its own linear, and the linear to the bits."""

    def __init__(self, width: int, num_bits: int, linears: LinearFactory, is_compiled: bool) -> None:
        super().__init__()
        self.norm = ModulatedNorm(width, is_compiled, has_affine=False)
        self.ada_ln_modulation = linears.column(width, NUM_FINAL_MODULATIONS * width, gather_output=True)
        self.linear = linears.replicated(width, num_bits)

    def forward(self, x_BPD: torch.Tensor, modulation_BPE: torch.Tensor) -> torch.Tensor:
        """Logits [B, P, C] of the bits; `modulation_BPE` is the output [B, P, 2 D] of `ada_ln_modulation`."""
        scale, shift = modulation_BPE.chunk(NUM_FINAL_MODULATIONS, dim=-1)
        return self.linear(self.norm(x_BPD, scale, shift)[1])


def _bits_of_logits(logits_BPC: torch.Tensor) -> torch.Tensor:
    # Sigmoid in float32: bfloat16 cannot resolve predictions near -1 and 1.
    return 2 * torch.sigmoid(logits_BPC.float()) - 1


def _bits_themselves(bits_BPC: torch.Tensor) -> torch.Tensor:
    return bits_BPC.float()


OUTPUTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"sigmoid": _bits_of_logits, "bits": _bits_themselves}
"""By the names of `config/families.py`: what the last linear gives -> bits, float32."""


def _call(block: nn.Module, *inputs: object) -> torch.Tensor:
    return block(*inputs)


def _check(section: HeadSection, num_partitions: int) -> None:
    """Raises ConfigError if a head cannot be built; `config/rules.py` refuses such settings when a run starts."""
    if section.width % section.head_dim:
        raise ConfigError(f"head.width = {section.width}: must be a multiple of head.head_dim = {section.head_dim}")
    if section.num_blocks % section.num_adaln:
        raise ConfigError(
            f"head.num_blocks = {section.num_blocks}: must be a multiple of head.num_adaln = {section.num_adaln}"
        )
    split = {
        "attention heads (head.width / head.head_dim)": section.width // section.head_dim,
        "SwiGLU channels (head.width * head.mlp_ratio)": section.mlp_size,
    }
    for name, size in split.items():
        if size % num_partitions:
            raise ConfigError(
                f"parallel.tensor = {num_partitions}: must divide the head's {size} {name}; choose a divisor of {size}"
            )
