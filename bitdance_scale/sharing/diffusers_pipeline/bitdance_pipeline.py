"""BitDance as a diffusers pipeline: images of prompts, block by block (arXiv 2602.14041).

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True, torch_dtype=torch.bfloat16).to("cuda")
    image = pipeline("a red cube on a blue ball", height=512, width=512).images[0]

Written for the diffusers library; licensed under Apache-2.0, as the project bitdance_scale that it comes from.

Shape suffixes: B sequences, I images (B / 2 under guidance), L positions of the longest prefix, S positions, P vision
tokens of a block, T key slots, N query heads, G key/value heads, K channels of a head, C bits, D hidden size, M draws.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

MAX_CELLS = 256
LAST_STEP, MIN_REMAINING_TIME = 0.05, 0.05
MAX_MODULATION_BYTES = 256 << 20
CAPACITY_MULTIPLE = 256
ATTENTION_NAME = "bitdance_grouped"
SAMPLERS = ("euler_maruyama", "euler")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generators = torch.Generator | Sequence[torch.Generator] | None


class BitDanceDiffusionPipeline(DiffusionPipeline):
    """Draws images of prompts.

    Args:
        tokenizer: Qwen's, with resolution and query tokens.
        text_encoder: the language model, which also reads vision tokens.
        autoencoder: bits to pixels.
        diffusion_head: predicts the bits of a block.
        projector: from bits to hidden states of the language model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: Qwen3ForCausalLM,
        autoencoder: torch.nn.Module,
        diffusion_head: torch.nn.Module,
        projector: torch.nn.Module,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            autoencoder=autoencoder,
            diffusion_head=diffusion_head,
            projector=projector,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str = "euler_maruyama",
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_block: Callable[[int, int], None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws all images of the prompts as one batch, prompt by prompt.

        Args:
            prompt: one or several.
            height: in pixels; a multiple of the side of a block, up to 256 cells.
            width: in pixels; likewise.
            num_inference_steps: solver steps per block.
            guidance_scale: 1 is no guidance; any other scale doubles the sequences.
            sampler: euler_maruyama or euler.
            num_images_per_prompt: images of each prompt.
            generator: one draws for the whole batch. A list has one per image, and an image is then the same in any
                batch, up to rounding.
            output_type: pil, np (float32 [n, H, W, 3] in 0 .. 1), pt (float32 [n, 3, H, W] in 0 .. 1, on the CPU) or
                latent (the bits, float32 [n, C, h, w] of -1 and 1).
            return_dict: whether the images come in an `ImagePipelineOutput` or in a tuple.
            callback_on_block: called after each block of the batch with its number, from 1, and how many there are.

        Raises:
            ValueError: an argument is not possible; nothing has been computed then.
        """
        solver = Solver(num_inference_steps, float(guidance_scale), sampler, self.diffusion_head.config.time_shift)
        grid = self._grid(height, width)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        if not prompts or output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type = {output_type!r} must be one of {OUTPUT_TYPES}, with at least one prompt")
        if not (generator is None or isinstance(generator, torch.Generator)) and (
            len(generator) != len(prompts) or len(set(map(id, generator))) != len(prompts)
        ):
            raise ValueError(
                f"generator: give one, or a list with one of its own for each of the {len(prompts)} images"
            )
        bits_INC = self._draw(prompts, grid, solver, generator, callback_on_block)
        images = self._images(bits_INC, grid, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def block_side(self) -> int:
        """Cells of a side of a block; a block has its square of vision tokens."""
        return math.isqrt(self.diffusion_head.config.parallel_num)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        cell_px = self.autoencoder.downsample
        block_px = cell_px * self.block_side
        for name, side in (("height", height), ("width", width)):
            if side < block_px or side % block_px or side > MAX_CELLS * cell_px:
                raise ValueError(
                    f"{name} = {side}: must be a multiple of {block_px} px, up to {MAX_CELLS * cell_px} px"
                )
        return height // cell_px, width // cell_px

    def _draw(
        self,
        prompts: Sequence[str],
        grid: tuple[int, int],
        solver: "Solver",
        generator: Generators,
        callback: Callable[[int, int], None] | None,
    ) -> torch.Tensor:
        """Bits of one image per prompt, float32 [I, h * w, C], block by block."""
        backbone, head = self.text_encoder.model, self.diffusion_head
        device, dtype = backbone.device, backbone.dtype
        size, num_images = head.config.parallel_num, len(prompts)
        layout = lay_out(prompt_rows(self.tokenizer, prompts, grid, size, solver.is_guided), grid, size, device)
        reader = Reader(backbone, layout)
        table = axis_table(backbone.config.hidden_size).to(device, dtype)
        steps = HeadSteps(head, solver, device)
        hidden_BPD = reader.read(backbone.embed_tokens(layout.prefix_ids))[:, -size:]
        blocks: list[torch.Tensor] = []
        cells = layout.cells.split(size)
        with self.progress_bar(total=len(cells)) as bar:
            for number, cells_P2 in enumerate(cells, start=1):
                places_PD = torch.cat([table[cells_P2[:, 1]], table[cells_P2[:, 0]]], dim=-1)
                noise = draw_noise(generator, num_images, (solver.num_draws, size, head.config.ch_target), device)
                blocks.append(steps.draw(hidden_BPD + places_PD, noise))
                if number < len(cells):
                    rows_IPD = self.projector(blocks[-1]).to(dtype) + places_PD
                    hidden_BPD = reader.read(rows_IPD.repeat(len(hidden_BPD) // num_images, 1, 1))
                bar.update()
                if callback is not None:
                    callback(number, len(cells))
        return torch.cat(blocks, dim=1)

    def _images(self, bits_INC: torch.Tensor, grid: tuple[int, int], output_type: str) -> Any:
        side, (height, width) = self.block_side, grid
        # (h w p1 p2) c -> c (h p1) (w p2)
        cells = bits_INC.reshape(len(bits_INC), height // side, width // side, side, side, -1)
        latents = cells.permute(0, 5, 1, 3, 2, 4).reshape(len(bits_INC), -1, height, width)
        if output_type == "latent":
            return latents
        # One by one, so that an image does not depend on its batch.
        pixels = [self.autoencoder.decode(image[None].to(self.autoencoder.dtype))[0].float() for image in latents]
        levels = [
            (127.5 * image + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy() for image in pixels
        ]
        if output_type == "pil":
            return [Image.fromarray(image) for image in levels]
        fractions = np.stack(levels).astype(np.float32) / 255
        return fractions if output_type == "np" else torch.from_numpy(fractions).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Solver:
    """How the flow is solved: uniform stochastic steps from 0 to 0.95 and an Euler step of 0.05, or Euler steps alone.

    Attributes:
        num_steps: solver steps; `euler_maruyama` evaluates the head once more.
        guidance: scale s of the guided prediction u + s (c - u); 1 is no guidance.
        sampler: euler_maruyama or euler.
        time_shift: s moves the ends of the steps to t / (t + s (1 - t)).
    """

    num_steps: int
    guidance: float
    sampler: str
    time_shift: float

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS or self.num_steps < 1 or not math.isfinite(self.guidance):
            raise ValueError(
                f"sampler = {self.sampler!r} must be one of {SAMPLERS}, num_inference_steps = {self.num_steps} at "
                f"least 1 and guidance_scale = {self.guidance} a finite number"
            )

    @property
    def is_guided(self) -> bool:
        """Whether unconditional sequences are decoded too."""
        return self.guidance != 1.0

    @property
    def num_draws(self) -> int:
        """M: the start tensor and one per stochastic step."""
        return 1 if self.sampler == "euler" else self.num_steps + 1

    @property
    def times(self) -> tuple[float, ...]:
        """The flow time of every evaluation of the head."""
        times = tuple(self.end(step) for step in range(self.num_steps))
        return times if self.sampler == "euler" else (*times, 1 - LAST_STEP)

    def weights(self, step: int) -> tuple[float, float, float]:
        """(a, b, c): the step takes the state x to a x + b f + c e; f are the predicted bits and e is N(0, 1)."""
        t = self.times[step]
        remaining = max(1 - t, MIN_REMAINING_TIME)
        if self.sampler == "euler":
            rate = self.num_steps if self.time_shift == 1 else 1 / (self.end(step + 1) - t)
            return 1 - 1 / (rate * remaining), 1 / (rate * remaining), 0.0
        if step == self.num_steps:
            return 1 - LAST_STEP / remaining, LAST_STEP / remaining, 0.0
        dt = (1 - LAST_STEP) / self.num_steps if self.time_shift == 1 else self.end(step + 1) - t
        pull = (1 + t) * dt / remaining
        return 1 - dt - pull, pull, (2 * (1 - t) * dt) ** 0.5

    def end(self, step: int) -> float:
        """The flow time at which a step begins."""
        t = step / self.num_steps if self.sampler == "euler" else step * ((1 - LAST_STEP) / self.num_steps)
        return t if self.time_shift == 1 else t / (t + self.time_shift * (1 - t))


class HeadSteps:
    """The head prepared for the times of a solver; modulations of several steps are computed together."""

    def __init__(self, head: Any, solver: Solver, device: torch.device) -> None:
        self.head, self.solver = head, solver
        self.time_TD = head.embed_times(torch.tensor(solver.times, dtype=torch.float32, device=device))

    def draw(self, cond_BPZ: torch.Tensor, noise_MIPC: torch.Tensor) -> torch.Tensor:
        """Bits of one block of each image, float32 [I, P, C] of -1 and 1."""
        cond_BPD = self.head.embed_condition(cond_BPZ)
        size = self._steps_per_group(cond_BPD)
        group: list[torch.Tensor] = []
        x_IPC = noise_MIPC[0]
        for step in range(len(self.solver.times)):
            if step % size == 0:
                group.clear()
                group.extend(self.head.modulations(self.time_TD[step : step + size], cond_BPD))
            both = torch.cat([x_IPC, x_IPC]) if self.solver.is_guided else x_IPC
            clean = self.head.denoise(both, [part[step % size] for part in group])
            if self.solver.is_guided:
                conditional, unconditional = clean.chunk(2)
                clean = torch.lerp(unconditional, conditional, self.solver.guidance)
            keep, pull, kick = self.solver.weights(step)
            x_IPC = torch.add(keep * x_IPC, clean, alpha=pull)
            if kick:
                x_IPC = torch.add(x_IPC, noise_MIPC[step + 1], alpha=kick)
        return (x_IPC > 0).float() * 2 - 1

    def _steps_per_group(self, cond_BPD: torch.Tensor) -> int:
        num_times = len(self.time_TD)
        step_bytes = cond_BPD.numel() * cond_BPD.element_size() * self.head.modulations_per_channel
        return math.ceil(num_times / math.ceil(num_times / max(1, MAX_MODULATION_BYTES // step_bytes)))


def draw_noise(
    generator: Generators, num_images: int, shape: tuple[int, int, int], device: torch.device
) -> torch.Tensor:
    """The noise of the next block, N(0, 1), float32 [M, I, P, C], of shape (M, P, C)."""

    def drawn(numbers: torch.Generator | None, size: tuple[int, ...]) -> torch.Tensor:
        noise = torch.empty(size, dtype=torch.float32, device=device if numbers is None else numbers.device)
        # A single call would give the numbers in another order.
        for row in noise:
            row.normal_(generator=numbers)
        return noise.to(device)

    if generator is None or isinstance(generator, torch.Generator):
        return drawn(generator, (shape[0], num_images, *shape[1:]))
    return torch.stack([drawn(numbers, shape) for numbers in generator], dim=1)


def prompt_rows(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    grid: tuple[int, int],
    block_tokens: int,
    is_guided: bool,
) -> list[list[int]]:
    """Token ids up to where the vision tokens begin, of the prompts and, under guidance, of as many without one.

    Markup is inserted as ids, and text is encoded without special tokens, so that no prompt can spell one.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["added_tokens"] = []
    document["truncation"] = document["padding"] = None
    plain = Tokenizer.from_str(json.dumps(document))
    id_of = tokenizer.get_vocab()

    def ids(text: str) -> list[int]:
        encoded: list[int] = plain.encode(text, add_special_tokens=False).ids
        return encoded

    start, end = id_of["<|im_start|>"], id_of["<|im_end|>"]
    reply = [start, *ids("assistant\n")]
    image = [id_of["<|vision_start|>"], *(id_of[f"<|res_{cells}|>"] for cells in grid)]
    image += [id_of[f"<|query_{number}|>"] for number in range(1, block_tokens)]
    rows = [[start, *ids(f"user\n{prompt}"), end, *ids("\n"), *reply, *image] for prompt in prompts]
    return rows + ([[*reply, *image]] * len(prompts) if is_guided else [])


@dataclass(frozen=True)
class Layout:
    """Sequences of a batch, padded on the left.

    Attributes:
        prefix_ids: int64 [B, L].
        position_ids: int64 [B, S], rotary positions; 0 on padding.
        is_real: bool [B, S], what is no padding.
        block_ids: int64 [S], attention groups: a position sees the groups up to its own.
        cells: int64 [h * w, 2], (row, column) of the vision tokens, block by block.
        num_read: positions that are read in all; the last block predicts nothing.
    """

    prefix_ids: torch.Tensor
    position_ids: torch.Tensor
    is_real: torch.Tensor
    block_ids: torch.Tensor
    cells: torch.Tensor
    num_read: int


def lay_out(rows: Sequence[Sequence[int]], grid: tuple[int, int], block_tokens: int, device: torch.device) -> Layout:
    """Lays out prefixes, each followed by an image of `grid` (height, width) cells."""
    length, (height, width), side = max(map(len, rows)), grid, math.isqrt(block_tokens)
    num_vision = height * width
    prefix = np.zeros((len(rows), length), dtype=np.int64)
    positions = np.zeros((len(rows), length + num_vision), dtype=np.int64)
    is_real = np.ones(positions.shape, dtype=bool)
    for index, row in enumerate(rows):
        padding = length - len(row)
        prefix[index, padding:] = row
        is_real[index, :padding] = False
        positions[index, padding:] = np.arange(len(row) + num_vision)
    # The last resolution token with the queries is one group, and so is every block.
    num_single = length - block_tokens
    groups = np.concatenate([np.arange(num_single), num_single + np.arange(block_tokens + num_vision) // block_tokens])
    cells = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    blocks = cells.reshape(height // side, side, width // side, side, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)

    def placed(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    num_read = max(length + num_vision - block_tokens, length)
    return Layout(placed(prefix), placed(positions), placed(is_real), placed(groups), placed(blocks), num_read)


def axis_table(hidden_size: int) -> torch.Tensor:
    """The 2-D positions of one axis, float32 [256, D / 2]: sines, then cosines, of coordinate / 10000^(i / (D / 4))."""
    quarter = hidden_size // 4
    exponents = torch.arange(quarter, dtype=torch.float64) / quarter
    angles = torch.arange(MAX_CELLS).double()[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


class Reader:
    """Reads rows of a batch, some positions at a time, and remembers their keys and values."""

    def __init__(self, backbone: Any, layout: Layout) -> None:
        backbone.set_attn_implementation(ATTENTION_NAME)
        self.backbone: Any = backbone
        self.layout, self.num_read = layout, 0
        config, num_sequences = backbone.config, len(layout.prefix_ids)
        capacity = -(-layout.num_read // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        shape = (2, num_sequences, config.num_key_value_heads, capacity, config.head_dim)
        self.memory = Memory(config.num_hidden_layers, shape, backbone.dtype, backbone.device)
        self.row_B11T = torch.full(
            (num_sequences, 1, 1, capacity), -torch.inf, dtype=backbone.dtype, device=backbone.device
        )

    def read(self, rows_BSD: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, D] of the next rows: the prefixes, then block by block."""
        start, stop = self.num_read, self.num_read + rows_BSD.shape[1]
        self.num_read = stop
        if start:
            # All positions of a block see what was read and the block itself.
            self.row_B11T[..., start:stop] = 0
            mask = self.row_B11T[..., :stop]
        else:
            mask = self._prefix_mask(stop)
            self.row_B11T[:, 0, 0, :stop].masked_fill_(self.layout.is_real[:, :stop], 0)
        self.memory.start, self.memory.stop = start, stop
        # By position: transformers renamed the argument that takes the memory.
        output = self.backbone(
            None, {"full_attention": mask}, self.layout.position_ids[:, start:stop], self.memory, rows_BSD
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _prefix_mask(self, length: int) -> torch.Tensor:
        """Who the prefixes see, added to the scores, [B, 1, L, L]; padding sees padding, so that no row is empty."""
        is_real, groups = self.layout.is_real[:, :length], self.layout.block_ids[:length]
        is_seen = (is_real[:, :, None] == is_real[:, None]) & (groups[None, :] <= groups[:, None])
        mask = torch.zeros(is_seen.shape, dtype=self.row_B11T.dtype, device=self.row_B11T.device)
        return mask.masked_fill_(~is_seen, -torch.inf)[:, None]


class Memory(Cache):
    """Keys and values in memory of fixed size, as transformers takes it; slots start .. stop - 1 are written next."""

    def __init__(self, num_layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        # Zeros: a slot that was never written is masked, but 0 times NaN would be NaN.
        self.layers_2BGTK = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.start = self.stop = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values [B, G, S, K] of a layer; returns those seen, [B, G, T, K]."""
        keys_BGTK, values_BGTK = self.layers_2BGTK[layer_idx]
        keys_BGTK[:, :, self.start : self.stop] = key_states
        values_BGTK[:, :, self.start : self.stop] = value_states
        return keys_BGTK[:, :, : self.stop], values_BGTK[:, :, : self.stop]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given, so transformers needs no count."""
        return 0


def attend_grouped(
    module: torch.nn.Module,
    query_BNSK: torch.Tensor,
    key_BGTK: torch.Tensor,
    value_BGTK: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention without repeating a key: the query heads that share a key/value head are stacked along the queries."""
    num_sequences, num_heads, _num_queries, size = query_BNSK.shape
    num_groups = key_BGTK.shape[1]
    if attention_mask.shape[2] > 1:
        attention_mask = attention_mask.repeat(1, 1, num_heads // num_groups, 1)
    stacked = query_BNSK.reshape(num_sequences, num_groups, -1, size)
    mixed = functional.scaled_dot_product_attention(
        stacked, key_BGTK, value_BGTK, attn_mask=attention_mask, scale=scaling
    )
    return mixed.reshape(query_BNSK.shape).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, attend_grouped)
