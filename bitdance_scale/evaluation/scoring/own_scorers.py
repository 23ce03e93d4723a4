"""How the benchmarks' own scorers are run on a folder that lies in their layout, for what cannot be scored here.

Sources: djghosh13/geneval, README.md; TencentQQGYLab/ELLA, dpg_bench/dist_eval.sh; A113N-W3I/TIIF-Bench, README.md,
"Evaluation with VLM"; OneIG-Bench/OneIG-Benchmark, README.md, "Parameters Configuration for Evaluation";
openai/guided-diffusion, evaluations/README.md.
"""

from __future__ import annotations

import math
from pathlib import Path

from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.imagenet import SAMPLES_NAME

_DPG_IMAGES = 4
"""The most images of a prompt that DPG-Bench's script cuts out of a picture."""


def own_scorer(benchmark: Benchmark, folder: Path, model: str, size_px: tuple[int, int]) -> str:
    """The command of a benchmark's own scorer for a folder; empty where there is none.

    Args:
        benchmark: with as many images of a prompt as the folder has.
        folder: of the drawing.
        model: its name in the folder's paths.
        size_px: (height, width) of an image.
    """
    path, num_images = folder.absolute(), benchmark.num_images
    dpg_images = min(num_images, _DPG_IMAGES)
    not_scored = f", and scores {_DPG_IMAGES} of the {num_images} images of a prompt" if num_images > dpg_images else ""
    commands = {
        "geneval": (
            "https://github.com/djghosh13/geneval, which needs mmdetection and a GPU",
            (
                f"cd evaluation && python evaluate_images.py {path} --outfile results.jsonl --model-path "
                "DETECTOR_FOLDER && python summary_scores.py results.jsonl"
            ),
        ),
        "dpg": (
            "https://github.com/TencentQQGYLab/ELLA, which needs mPLUG-large from ModelScope and GPUs (PROCESSES=, 8)"
            + not_scored,
            f"PIC_NUM={dpg_images} bash dpg_bench/dist_eval.sh {path} {size_px[0]}",
        ),
        "tiif": (
            "https://github.com/A113N-W3I/TIIF-Bench",
            (
                f"python eval/eval_with_vlm.py --jsonl_dir data/testmini_eval_prompts --image_dir {path} --eval_model "
                f"{model} --output_dir eval_results --api_key KEY --base_url URL --model gpt-4o && "
                "python eval/summary_results.py --input_dir eval_results"
            ),
        ),
        "oneig-en": _oneig("EN", path, model, num_images),
        "oneig-zh": _oneig("ZH", path, model, num_images),
        "imagenet": (
            "https://github.com/openai/guided-diffusion, which needs TensorFlow",
            f"cd evaluations && python evaluator.py VIRTUAL_imagenet256_labeled.npz {path / SAMPLES_NAME}",
        ),
    }
    if benchmark.name not in commands:
        return ""
    home, command = commands[benchmark.name]
    return f"The benchmark's own scorer ({home}) takes this folder: {command}"


def _oneig(mode: str, path: Path, model: str, num_images: int) -> tuple[str, str]:
    side = math.isqrt(num_images)
    return (
        "https://github.com/OneIG-Bench/OneIG-Benchmark, which needs Qwen2.5-VL, CLIP, CSD and DreamSim",
        f"set mode={mode}, image_dir={path}, model_names={model} and image_grid={side} in run_overall.sh and run it",
    )
