"""Generation on CUDA: recorded graphs against plain calls, and the CPU's images from the CPU's generators."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from bitdance_scale.generate.block_decode import decode_blocks, lay_out
from bitdance_scale.generate.caption_decode import TokenChoice, decode_captions, lay_out_contexts
from bitdance_scale.generate.caption_pipeline import CaptionPipeline
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.published_model import load_describer, load_published
from bitdance_scale.generate.qwen3_blocks import Qwen3Blocks
from bitdance_scale.generate.qwen3_captions import Qwen3Captions
from bitdance_scale.generate.qwen3_memory import CapturedCall
from bitdance_scale.generate.sampler import FlowSolver, GeneratorNoise
from tests.released import write_published

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SOLVER = FlowSolver(6, guidance=2.0)
PROMPTS = ("a red circle", "two blue squares and a red circle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write_published(tmp_path_factory.mktemp("published"))


def test_a_captured_call_follows_its_inputs():
    memory = torch.zeros(4, device="cuda")

    def function(value: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        memory.index_copy_(0, slots, value)
        return memory.cumsum(0)

    def on_gpu(*values: float) -> torch.Tensor:
        return torch.tensor(values, device="cuda")

    call = CapturedCall(function, on_gpu(1.0), torch.tensor([0], device="cuda"))
    first = call(on_gpu(2.0), torch.tensor([1], device="cuda"))
    second = call(on_gpu(3.0), torch.tensor([3], device="cuda"))
    assert first.tolist() == [1, 3, 3, 3]
    assert second.tolist() == [1, 3, 3, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_draw_the_bits_of_plain_calls(folder, dtype):
    device = torch.device("cuda")
    model = load_published(folder, dtype, device)
    graphs, plain = (
        Qwen3Blocks(model.backbone, model.projector, model.head, SOLVER, use_graphs) for use_graphs in (True, False)
    )
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS):
        rows = [model.text.prompt_ids(prompt) for prompt in prompts] + [model.text.unconditional_ids()] * 2
        layout = lay_out(rows, (8, 12), model.text.image_tokens, device)
        found, expected = (
            decode_blocks(
                blocks,
                layout,
                GeneratorNoise([torch.Generator().manual_seed(n) for n in (1, 2)], 2, (7, 16, 16), device),
            )
            for blocks in (graphs, plain)
        )
        # The first block sees no difference but the graph. Later ones attend over masked slots as well, which rounds
        # differently. In bfloat16 (8 bits) a bit near a tie may then flip, and the rest of the image with it.
        assert torch.equal(found[:, :16], expected[:, :16])
        if dtype is torch.float32:
            assert (found == expected).float().mean() > 0.99


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_gpu_draws_and_describes_as_the_first(folder):
    """In threads of their own, as the app draws: a thread begins with the first device as its current one."""
    found: dict[str, tuple[object, str]] = {}

    def work(device: str) -> None:
        pipeline = BitDancePipeline.from_pretrained(folder, torch.float32, device)
        generators = [torch.Generator().manual_seed(n) for n in (1, 2)]
        settings = {"height": 32, "width": 48, "num_inference_steps": 6, "output_type": "bits"}
        drawn = [pipeline(list(PROMPTS), generator=generators, **settings).images for _ in range(2)]
        picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        captions = CaptionPipeline.from_pretrained(folder, torch.float32, device)
        found[device] = drawn, captions([picture], max_tokens=20)[0].text
        assert torch.cuda.current_device() == 0

    for device in ("cuda:0", "cuda:1"):
        thread = threading.Thread(target=work, args=[device])
        thread.start()
        thread.join()
    (drawn, caption), (second_drawn, second_caption) = found["cuda:0"], found["cuda:1"]
    assert all((first == second).all() for first, second in zip(drawn, second_drawn, strict=True))
    assert caption == second_caption


def test_a_generator_of_the_cpu_gives_the_image_of_the_cpu(folder):
    images = [
        BitDancePipeline.from_pretrained(folder, torch.float32, device)(
            list(PROMPTS),
            height=32,
            width=48,
            num_inference_steps=6,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(n) for n in (1, 2)],
            output_type="np",
        ).images
        for device in ("cpu", "cuda")
    ]
    # The same bits except near ties; the autoencoder may multiply in TF32, 10 bits, and pixels are of order 1.
    assert abs(images[0] - images[1]).mean() < 0.02


def test_the_default_on_cuda_is_bfloat16(folder):
    pipeline = BitDancePipeline.from_pretrained(folder)
    assert pipeline.model.backbone.dtype is torch.bfloat16 and pipeline.device.type == "cuda"
    first, second = (
        pipeline("a", 32, 48, 4, generator=torch.Generator("cuda").manual_seed(1), output_type="bits").images
        for _ in range(2)
    )
    assert (first == second).all()


@pytest.mark.parametrize("choice", [TokenChoice(), TokenChoice(0.9, 1.5)])
def test_graphs_write_the_captions_of_plain_calls(folder, choice):
    device = torch.device("cuda")
    model = load_describer(folder, torch.float32, device)
    samples = [model.text.describing_prompt(0, grid) for grid in ((8, 12), (4, 8))]
    layout = lay_out_contexts(samples, model.text.image_tokens, device)
    bits = torch.randn(8 * 12 + 4 * 8, 16, generator=torch.Generator().manual_seed(0)).sign().to(device)
    is_choice = torch.from_numpy(model.text.caption_entries()).to(device)
    found = []
    for use_graphs in (True, True, False):
        captions = Qwen3Captions(model.backbone, model.output, model.projector, use_graphs)
        generators = [torch.Generator().manual_seed(n) for n in (1, 2)]
        end = int(model.text.turn_end_ids[0])
        found.append(decode_captions(captions, layout, bits, choice, generators, is_choice, end, max_tokens=20))
    assert found[0] == found[1] == found[2]
