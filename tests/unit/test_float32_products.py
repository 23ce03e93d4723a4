"""How float32 is multiplied on CUDA: set for the process, or within a block, after which it is as it was."""

from __future__ import annotations

import pytest
import torch

from bitdance_scale.float32_products import float32_products, set_float32_products


def found() -> tuple[str, str]:
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(autouse=True)
def _restored():
    with float32_products("float32"):
        yield


def test_blocks_nest_and_end():
    with float32_products("tf32"):
        assert found() == ("tf32", "tf32")
        with float32_products("float32"):
            assert found() == ("ieee", "ieee")
        assert found() == ("tf32", "tf32")
    with pytest.raises(ZeroDivisionError), float32_products("tf32"):
        1 / 0  # noqa: B018  (only to leave the block)
    assert found() == ("ieee", "ieee")


def test_the_process_keeps_what_is_set():
    set_float32_products("tf32")
    assert found() == ("tf32", "tf32")
