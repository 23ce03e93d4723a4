"""BitDance's diffusion head: predicts the clean bits of one block of vision tokens (arXiv 2602.14041 Sec. 3.2).

Written for the diffusers library; licensed under Apache-2.0, as the project bitdance_scale that it comes from.

Shape suffixes: B blocks, P tokens of a block, C bits, D width, Z width of the condition, T flow times.
"""

import math
from collections.abc import Iterable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional

NUM_TIME_FEATURES = 256
NORM_EPS = 1e-6
# Of a block: scale, shift and gate of its two halves. Of the final layer: scale and shift.
NUM_MODULATIONS, NUM_FINAL_MODULATIONS = 6, 2


class BitDanceDiffusionHead(ModelMixin, ConfigMixin):
    """A small transformer with full attention within a block, modulated by the flow time and the condition.

    The modulations do not depend on the noisy bits. A solver, which knows its times, computes those of many steps at
    once (`modulations`) and then only denoises (`denoise`).

    Args:
        ch_target: C.
        ch_cond: Z.
        ch_latent: D.
        depth_latent: transformer blocks.
        depth_adanln: modules of modulations, which as many consecutive blocks share.
        grad_checkpointing: changes nothing here.
        time_shift: shift of the flow times of sampling.
        time_schedule, P_mean, P_std, diff_batch_mul: of training; change nothing here.
        parallel_num: P.
        use_swiglu: true, the only MLP that there is.
        head_dim: channels of an attention head.
        mlp_ratio: hidden channels of the SwiGLU per channel.

    Raises:
        ValueError: the other MLP, or sizes that do not divide.
    """

    @register_to_config
    def __init__(
        self,
        ch_target: int,
        ch_cond: int,
        ch_latent: int,
        depth_latent: int,
        depth_adanln: int,
        grad_checkpointing: bool = False,
        time_shift: float = 1.0,
        time_schedule: str = "logit_normal",
        P_mean: float = 0.0,
        P_std: float = 1.0,
        parallel_num: int = 4,
        diff_batch_mul: int = 1,
        use_swiglu: bool = False,
        head_dim: int = 128,
        mlp_ratio: float = 1.5,
    ) -> None:
        super().__init__()
        if not use_swiglu:
            raise ValueError("use_swiglu = false: only BitDance's SwiGLU is supported")
        if ch_latent % head_dim or depth_latent % depth_adanln:
            raise ValueError(
                f"ch_latent = {ch_latent} must be a multiple of head_dim = {head_dim}, and depth_latent = "
                f"{depth_latent} of depth_adanln = {depth_adanln}"
            )
        self.net = HeadNetwork(
            ch_target, ch_cond, ch_latent, depth_latent, depth_adanln, head_dim, int(ch_latent * mlp_ratio)
        )

    def forward(self, noisy_BPC: torch.Tensor, t_B: torch.Tensor, cond_BPZ: torch.Tensor) -> torch.Tensor:
        """The predicted clean bits in (-1, 1), float32 [B, P, C], of one flow time per block."""
        y_BPD = functional.silu(self.embed_times(t_B)[:, None] + self.embed_condition(cond_BPZ))
        return self.denoise(noisy_BPC, [linear(y_BPD) for linear in self.net.modulation_linears()])

    def embed_times(self, t_T: torch.Tensor) -> torch.Tensor:
        """Flow times [T] -> [T, D]."""
        embedded: torch.Tensor = self.net.time_embed(time_features(t_T).to(self.net.input_proj.weight.dtype))
        return embedded

    def embed_condition(self, cond_BPZ: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, P, Z] that predict the tokens, plus their positions -> [B, P, D]."""
        embedded: torch.Tensor = self.net.cond_embed(cond_BPZ.to(self.net.input_proj.weight.dtype))
        return embedded

    def modulations(self, time_TD: torch.Tensor, cond_BPD: torch.Tensor) -> list[torch.Tensor]:
        """Of every pair of a time and a condition: [T, B, P, 6 D] of each module, [T, B, P, 2 D] of the last layer."""
        y_TBPD = functional.silu(time_TD[:, None, None] + cond_BPD)
        return [linear(y_TBPD) for linear in self.net.modulation_linears()]

    @property
    def modulations_per_channel(self) -> int:
        """How many numbers per token and channel of D `modulations` returns for one time."""
        return NUM_MODULATIONS * len(self.net.ada_ln_blocks) + NUM_FINAL_MODULATIONS

    def denoise(self, noisy_BPC: torch.Tensor, modulations: Iterable[torch.Tensor]) -> torch.Tensor:
        """The predicted clean bits, float32 [B, P, C], under modulations without their axis T."""
        # Sigmoid in float32: bfloat16 cannot resolve predictions near -1 and 1.
        return 2 * torch.sigmoid(self.net.denoise(noisy_BPC, modulations).float()) - 1


def time_features(t_T: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of 1000 t / 10000^(i / 128), float32 [T, 256]."""
    half = NUM_TIME_FEATURES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_T.device) / half
    angles = 1000.0 * t_T.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class HeadNetwork(nn.Module):
    """The head up to its logits."""

    def __init__(
        self, num_bits: int, cond_size: int, width: int, num_blocks: int, num_adaln: int, head_dim: int, hidden: int
    ) -> None:
        super().__init__()
        self.blocks_per_adaln = num_blocks // num_adaln
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(cond_size, width)
        self.input_proj = nn.Linear(num_bits, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width, head_dim, hidden) for _ in range(num_blocks))
        self.ada_ln_blocks = nn.ModuleList(nn.Linear(width, NUM_MODULATIONS * width) for _ in range(num_adaln))
        self.final_layer = FinalLayer(width, num_bits)

    def modulation_linears(self) -> list[nn.Module]:
        """The linears of the modulations, in the order in which `denoise` uses their outputs."""
        return [*self.ada_ln_blocks, self.final_layer.ada_ln_modulation]

    def denoise(self, noisy_BPC: torch.Tensor, modulations: Iterable[torch.Tensor]) -> torch.Tensor:
        """Logits [B, P, C]."""
        outputs = iter(modulations)
        x_BPD = self.input_proj(noisy_BPC.to(self.input_proj.weight.dtype))
        for index, block in enumerate(self.res_blocks):
            if index % self.blocks_per_adaln == 0:
                shared = next(outputs).chunk(NUM_MODULATIONS, dim=-1)
            x_BPD = block(x_BPD, shared)
        logits: torch.Tensor = self.final_layer(x_BPD, next(outputs))
        return logits


class TimeEmbedding(nn.Module):
    """Two linears with SiLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[T, 256] -> [T, D]."""
        embedded: torch.Tensor = self.mlp(features)
        return embedded


class HeadBlock(nn.Module):
    """Modulated attention within the block, then a modulated SwiGLU, each with a gated residual."""

    def __init__(self, width: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = HeadAttention(width, head_dim)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.w1 = nn.Linear(width, 2 * hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x_BPD: torch.Tensor, modulations: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Same shape; modulations: scale1, shift1, gate1, scale2, shift2, gate2, each [B, P, D]."""
        scale1, shift1, gate1, scale2, shift2, gate2 = modulations
        x_BPD = x_BPD + gate1 * self.attn(self.norm1(x_BPD) * (1 + scale1) + shift1)
        gate, up = self.w1(self.norm2(x_BPD) * (1 + scale2) + shift2).chunk(2, dim=-1)
        return x_BPD + gate2 * self.w2(functional.silu(gate) * up)


class HeadAttention(nn.Module):
    """Full attention among the tokens of a block, without positions of its own: the condition contains them."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wqkv = nn.Linear(width, 3 * width)
        self.wo = nn.Linear(width, width)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        """[B, P, D] -> [B, P, D]."""
        heads = self.wqkv(x_BPD).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads)
        projected: torch.Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return projected


class FinalLayer(nn.Module):
    """A modulated norm and the linear to the bits."""

    def __init__(self, width: int, num_bits: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.ada_ln_modulation = nn.Linear(width, NUM_FINAL_MODULATIONS * width)
        self.linear = nn.Linear(width, num_bits)

    def forward(self, x_BPD: torch.Tensor, modulation_BPE: torch.Tensor) -> torch.Tensor:
        """Logits [B, P, C]; `modulation_BPE` is the output [B, P, 2 D] of `ada_ln_modulation`."""
        scale, shift = modulation_BPE.chunk(NUM_FINAL_MODULATIONS, dim=-1)
        logits: torch.Tensor = self.linear(self.norm(x_BPD) * (1 + scale) + shift)
        return logits
