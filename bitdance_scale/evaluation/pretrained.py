"""Networks of transformers by the name of a folder or of a hub repository, whole or not at all."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch

from bitdance_scale.errors import CheckpointError
from bitdance_scale.wording import first_few


def load_network(kind: Any, source: str, unused: str | None = None) -> Any:
    """A network on the CPU in float32, frozen.

    Its weights are safetensors, or what torch.save wrote, read by weights-only loading.

    Args:
        kind: a class of transformers with `from_pretrained`.
        source: a folder or a hub name, as `from_pretrained` takes it.
        unused: pattern of tensors that may be missing because nothing is computed with them.

    Raises:
        CheckpointError: it cannot be had, or is of another network; names `source`.
    """
    with reading(source):
        network, report = kind.from_pretrained(source, output_loading_info=True, weights_only=True, dtype=torch.float32)
    check_report(source, report, unused)
    return network.requires_grad_(False).eval()


def check_report(source: str, report: dict[str, Any], unused: str | None = None) -> None:
    """Refuses a network of which transformers made up tensors, which it does with a warning only."""
    missing = [name for name in report["missing_keys"] if unused is None or not re.search(unused, name)]
    # Newer ones of transformers give names with shapes.
    other = [name if isinstance(name, str) else name[0] for name in report["mismatched_keys"]]
    faults = [f"{name} is missing" for name in sorted(missing)]
    faults += [f"{name} has another shape" for name in sorted(other)]
    if faults:
        raise CheckpointError(f"{source}: {first_few(faults)}; the weights are of another network or incomplete")


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Turns what transformers raises for a source that cannot be had into a CheckpointError that names it."""
    try:
        yield
    except Exception as error:
        # The library raises what it happens on in a damaged file, and some of it is of no type but this one.
        lines = str(error).strip().splitlines()
        raise CheckpointError(f"{source}: {type(error).__name__}: {lines[0] if lines else 'no reason'}") from error
