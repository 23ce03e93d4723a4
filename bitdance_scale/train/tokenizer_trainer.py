"""Trains the binary visual tokenizer, data-parallel (arXiv 2602.14041 Sec. 3.1, 4.1)."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.tokenizer_schema import TokenizerConfig, check_tokenizer
from bitdance_scale.data.crop_stream import CropStream, centre_crops
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index, default_index_dir
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.console import setup_logging
from bitdance_scale.train.shared_index import image_index
from bitdance_scale.train.tokenizer_evaluation import Reconstruction, evaluate, summary, to_pixels
from bitdance_scale.train.tokenizer_objective import TokenizerObjective
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.weights import save_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job."""

    rank: int
    num_ranks: int
    device: torch.device


def train_tokenizer(config: TokenizerConfig) -> dict[tuple[int, int], Reconstruction]:
    """Runs the whole training and writes the weights; every rank of a torchrun job calls it, or one process alone.

    Returns:
        On rank 0 the final reconstruction of held-out images by (height, width); empty elsewhere.

    Raises:
        ConfigError: the configuration cannot be trained.
        DataError: shards are missing or too much of the data is broken.
        FloatingPointError: the loss is no longer finite.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    check_tokenizer(config, num_ranks)
    with _process_group(num_ranks) as ranks:
        folder = Path(config.run.root) / config.run.name
        setup_logging(folder, ranks.rank)
        if ranks.rank == 0:
            _start_folder(folder, config)
        data = config.data
        train_index = image_index(data.shards, data.index_dir, data.max_skipped_share)
        # The held-out images are read on rank 0 only, which evaluates alone.
        held_out = _held_out_images(config) if ranks.rank == 0 else {}
        autoencoder = _build(config).to(ranks.device)
        with _stream(config, train_index, ranks) as stream:
            results = _train(config, autoencoder, stream, held_out, folder, ranks)
        if ranks.rank == 0:
            save_weights(config.run.output, autoencoder.state_dict(), published_config(**asdict(config.autoencoder)))
            logger.info("weights: %s\n%s", config.run.output, summary(results))
        return results


def learning_rate(step: int, config: TokenizerConfig) -> float:
    """Rate of step 0, 1, ..: linear warm-up to `optim.lr`, then a cosine that ends at zero after the last step."""
    warmup = config.optim.warmup_steps
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.run.steps - warmup)
    return config.optim.lr * 0.5 * (1 + math.cos(math.pi * done))


def _train(
    config: TokenizerConfig,
    autoencoder: Autoencoder,
    stream: CropStream,
    held_out: dict[tuple[int, int], np.ndarray],
    folder: Path,
    ranks: Ranks,
) -> dict[tuple[int, int], Reconstruction]:
    """The steps of the run; returns the evaluation after the last one."""
    objective: torch.nn.Module = TokenizerObjective(autoencoder, config)
    if ranks.num_ranks > 1:
        objective = DistributedDataParallel(objective)
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=0.0, betas=(config.optim.beta1, config.optim.beta2))
    flips = torch.Generator(device=ranks.device).manual_seed(config.run.seed * ranks.num_ranks + ranks.rank)
    results: dict[tuple[int, int], Reconstruction] = {}
    start_s = time.monotonic()
    for step, images in enumerate(stream):
        lr = learning_rate(step, config)
        for group in optimiser.param_groups:
            group["lr"] = lr
        losses = objective(to_pixels(images, ranks.device), flips)
        optimiser.zero_grad(set_to_none=True)
        losses["total"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), config.optim.clip_norm)
        # Gradients are averaged over ranks, so all ranks see the same norm and stop together.
        if not torch.isfinite(grad_norm):
            raise FloatingPointError(
                f"step {step + 1}: gradient norm {grad_norm.item()}; lower optim.lr or use run.dtype=float32"
            )
        optimiser.step()

        done, is_last = step + 1, step + 1 == config.run.steps
        if ranks.rank == 0 and (done % config.run.log_every_steps == 0 or is_last):
            record = {
                "step": done,
                **{name: loss.item() for name, loss in losses.items()},
                "grad_norm": grad_norm.item(),
                "lr": lr,
            }
            _log(folder, record | {"elapsed_s": round(time.monotonic() - start_s, 1)}, config.run.steps)
        if done % config.eval.every_steps == 0 or is_last:
            results = {
                size: evaluate(autoencoder, images, config.quantiser.num_groups, ranks.device)
                for size, images in held_out.items()
            }
            if ranks.rank == 0:
                _log_evaluation(folder, done, results)
    return results


def _start_folder(folder: Path, config: TokenizerConfig) -> None:
    """Writes the resolved configuration and empties the metrics: a run is not resumed, it starts again."""
    (folder / "config.toml").write_text(dump_toml(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")


def _build(config: TokenizerConfig) -> Autoencoder:
    torch.manual_seed(config.run.seed)
    return Autoencoder(**asdict(config.autoencoder))


def _stream(config: TokenizerConfig, index: Index, ranks: Ranks) -> CropStream:
    return CropStream(
        index,
        sizes_px=config.data.sizes_px,
        images_px=config.data.images_px,
        max_zoom=config.data.max_zoom,
        seed=config.run.seed,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
        num_steps=config.run.steps,
        num_threads=config.data.read_threads,
        max_skipped_share=config.data.max_skipped_share,
    )


def _held_out_images(config: TokenizerConfig) -> dict[tuple[int, int], np.ndarray]:
    """uint8 [n, H, W, 3] by (height, width)."""
    shards = expand_shards(config.eval.shards)
    shared = set(shards) & set(expand_shards(config.data.shards))
    if shared:
        raise ConfigError(f"eval.shards: {sorted(shared)[0]} is in data.shards as well; hold other shards out")
    index = build_index(shards, default_index_dir(shards))
    return {size: centre_crops(index, size, config.eval.num_images) for size in config.eval.sizes_px}


@contextmanager
def _process_group(num_ranks: int) -> Iterator[Ranks]:
    """Joins the job's ranks (NCCL with CUDA, else gloo) and leaves them at the end."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if num_ranks == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), num_ranks, device)
    finally:
        dist.destroy_process_group()


def _log(folder: Path, record: dict[str, float], num_steps: int) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    logger.info(
        "step %d/%d  total %.4f  l1 %.4f  edge %.4f  entropy %.2f - %.2f  grad norm %.2f  %.0f s",
        record["step"], num_steps, record["total"], record["l1"], record["edge"], record["entropy_token"],
        record["entropy_codebook"], record["grad_norm"], record["elapsed_s"],
    )  # fmt: skip


def _log_evaluation(folder: Path, step: int, results: dict[tuple[int, int], Reconstruction]) -> None:
    psnr = {f"psnr_db_{height}x{width}": round(result.psnr_db, 3) for (height, width), result in results.items()}
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **psnr}) + "\n")
    logger.info("step %d  held out: %s", step, "  ".join(f"{name} {value:.2f}" for name, value in psnr.items()))
