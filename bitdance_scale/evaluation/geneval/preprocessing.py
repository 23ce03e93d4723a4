"""Images as the detector wants them: resized, normalised and padded as mmdetection does before its Mask2Former.

Processors of transformers are not used: of a published Mask2Former of theirs they may squeeze every image into a square
of another size, which finds fewer objects, and they need torchvision in some versions.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch.nn import functional

# ImageNet's, for pixels from 0 to 255.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images are brought to the detector's size; the defaults are those that GenEval is published with.

    Source: open-mmlab/mmdetection, configs/mask2former/mask2former_r50_lsj_8x2_50e_coco.py, `test_pipeline`.

    Attributes:
        short_px: the shorter side becomes this,
        long_px: unless the longer side would be more than this.
        divisor: zeros are added right and below, up to a multiple of this.
    """

    short_px: int = 800
    long_px: int = 1333
    divisor: int = 32

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to, before zeros are added."""
        scale = min(self.long_px / max(height, width), self.short_px / min(height, width))
        # As mmcv rounds: halves go up.
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def __call__(self, images: np.ndarray, device: torch.device) -> torch.Tensor:
        """Inputs float32 [N, 3, H', W'] on the device, of images uint8 [N, H, W, 3].

        Bilinear without a filter before it, as OpenCV resizes; `PIL` would average when it makes images smaller.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
        height, width = self.size(*images.shape[1:3])
        resized = functional.interpolate(pixels, (height, width), mode="bilinear", align_corners=False).round()
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        padding = (0, -width % self.divisor, 0, -height % self.divisor)
        return functional.pad((resized - mean) / std, padding)
