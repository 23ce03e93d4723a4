"""Walks the steps of a run as one rank of a job of any size on a fake CUDA device, and prints what it did as JSON.

    python -m tests.fake_cuda.walk CONFIG --world 64 --rank 3 [section.key=value ...]

Started by `device.start`, which preloads the device. Nothing has values or memory: only shapes, dtypes, devices and the
order of things are real. Numbers that the program reads are 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections import Counter
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.fake_cuda.device import cuda_device, tensors_on_the_device
from tests.fake_cuda.recording import Recorder


def _on_the_wrong_device(loss: torch.Tensor) -> torch.Tensor:
    return loss + torch.ones(2).sum(dim=0, keepdim=True)


def _of_the_wrong_dtype(loss: torch.Tensor) -> torch.Tensor:
    matrix = torch.ones(4, 4, device=loss.device)
    return loss + (matrix @ matrix.bfloat16()).sum()


def _that_waits(loss: torch.Tensor) -> torch.Tensor:
    return loss * loss.item()


def _with_a_collective_of_one_rank(loss: torch.Tensor) -> torch.Tensor:
    if dist.get_rank() == 1:
        dist.all_reduce(torch.ones(3, device=loss.device))
    return loss


PLANTS = {
    "device": _on_the_wrong_device,
    "dtype": _of_the_wrong_dtype,
    "wait": _that_waits,
    "collective": _with_a_collective_of_one_rank,
}
"""Faults that can be planted into the loss of every micro-batch."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--vocab", type=int, default=151940)
    parser.add_argument("--plant", choices=sorted(PLANTS), help="a fault, to show that it is found")
    options = parser.parse_intermixed_args()
    # Standard output is for the result alone: engines print while they are built.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    is_pinned: Counter[int] = Counter()
    recorder = Recorder(is_pinned)
    with cuda_device(recorder.wait, is_pinned):
        result = _walk(options, recorder)
    json.dump(result, out)
    out.flush()
    # Threads of engines must not keep the process.
    os._exit(0)


def _walk(options: argparse.Namespace, recorder: Recorder) -> dict[str, object]:
    from bitdance_scale.config.load import load_config
    from bitdance_scale.config.rules import check
    from bitdance_scale.model import attention, initial
    from bitdance_scale.model.inputs import make_inputs
    from bitdance_scale.parallel import fake_ranks, memory_estimate
    from bitdance_scale.parallel import step as steps
    from bitdance_scale.parallel import topology as topologies
    from bitdance_scale.parallel.build import build_stages, engine_of
    from bitdance_scale.parallel.step import accumulate_gradients, count_targets
    from bitdance_scale.sequence.noise import pack_noise

    config = load_config(options.config, options.overrides)
    check(config, options.world)

    def host_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
        return dist.new_group(list(ranks), backend="fake")

    def flex_mask(document_ids: Any, block_ids: Any, device: torch.device, tile: int = 128, **_: Any) -> Any:
        # Compiling has nothing to do with what is asked here.
        return made(document_ids, block_ids, device, tile, is_compiled=False)

    def combine(*values: Any) -> torch.Tensor:
        return PLANTS[options.plant](combined(*values))

    made, combined = attention.flex_mask, steps.combine_losses
    with contextlib.ExitStack() as replaced:
        replaced.enter_context(mock.patch.object(topologies, "_host_group", host_group))
        replaced.enter_context(mock.patch.object(initial, "named_generator", lambda *_: None))
        replaced.enter_context(mock.patch.object(attention, "flex_mask", flex_mask))
        if options.plant:
            replaced.enter_context(mock.patch.object(steps, "combine_losses", combine))
        topology = fake_ranks.join_fake_job(options.world, options.rank, config.parallel)
        in_flight = memory_estimate.num_in_flight(config.parallel, topology.pipeline_rank)
        packs, _ = memory_estimate._chosen(config, topology.data_size, in_flight)
        with fake_ranks.no_memory() as log, recorder:

            def on_literal(tensor: torch.Tensor, values: object) -> None:
                log.remember(tensor, values)
                # From memory that is not pinned.
                recorder.wait("numbers are copied to the device")

            replaced.enter_context(tensors_on_the_device(on_literal))
            with recorder.phase("build"):
                stages = build_stages(config, options.vocab, topology)
                engine = engine_of(stages, config, topology)
            with recorder.phase("inputs"):
                batch = [
                    make_inputs(pack, pack_noise(pack, config.vision.num_bits, 0, 0), config, topology.device)
                    for pack in packs
                ]
            for number in range(2):
                with recorder.phase("micro-batches" if number else "first micro-batches"):
                    counts = count_targets(batch, topology)
                    accumulate_gradients(engine, batch, counts, config.loss, topology)
                with recorder.phase("optimiser" if number else "first optimiser"):
                    engine.step(config.optim.lr)
    return {
        "num_micro_batches": len(batch),
        "num_positions": packs[0].num_positions,
        "device": str(topology.device),
        "record": recorder.record.as_json(),
    }


if __name__ == "__main__":
    main()
