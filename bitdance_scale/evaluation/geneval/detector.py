"""Objects of an image by Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527), as mmdetection finds them.

transformers computes the network. What is made of its output is mmdetection's: open-mmlab/mmdetection,
mmdet/models/seg_heads/panoptic_fusion_heads/maskformer_fusion_head.py (`instance_postprocess`, `predict`),
mmdet/models/dense_heads/maskformer_head.py (`simple_test`) and mmdet/structures/mask/utils.py (`mask2bbox`). Its
`post_process_instance_segmentation` of transformers differs: it brings every mask to 384 x 384, takes the mean over a
mask there, enlarges the cut mask to the image by the nearest pixel, keeps as many pairs of query and class as there are
queries, and makes no boxes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.geneval.classes import ALSO_NAMED, CLASSES, COCO_CLASSES
from bitdance_scale.evaluation.geneval.mmdet_weights import mmdet_network
from bitdance_scale.evaluation.geneval.preprocessing import Preprocessing
from bitdance_scale.evaluation.geneval.rules import CONFIDENCE, Detection
from bitdance_scale.evaluation.pretrained import load_network
from bitdance_scale.torchvision_operators import declare_operators

# mmdetection's `max_per_image`: pairs of query and class that are looked at.
_MAX_PAIRS = 100
# The last normalisation of the backbone, which transformers has since 5 and the published files do not.
_UNUSED = r"\.swin\.layernorm\.(weight|bias)$"


class Detector:
    """Finds objects of COCO's 80 classes.

    Args:
        network: `Mask2FormerForUniversalSegmentation` with a class per entry of `CLASSES`; the device is its own.
        preprocessing: of images.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing | None = None) -> None:
        self.network = network
        self.preprocessing = preprocessing or Preprocessing()

    def __call__(self, images: np.ndarray, minimum: float = CONFIDENCE) -> list[dict[str, list[Detection]]]:
        """Objects by class of each of the images uint8 [N, H, W, 3], the most confident first.

        Args:
            images: of one size, any size.
            minimum: objects of this confidence or less are left out, which saves the time of making their masks.
        """
        inputs = self.preprocessing(images, next(self.network.parameters()).device)
        with torch.no_grad():
            output = self.network(pixel_values=inputs)
        size = (images.shape[1], images.shape[2])
        return [
            self._objects(classes, masks, (inputs.shape[2], inputs.shape[3]), size, minimum)
            for classes, masks in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        ]

    def _objects(
        self, classes: torch.Tensor, masks: torch.Tensor, padded: tuple[int, int], size: tuple[int, int], minimum: float
    ) -> dict[str, list[Detection]]:
        """Of one image of this size: logits of classes [Q, 81] and of masks [Q, h, w]; `padded` is the input's size."""
        scores = classes.float().softmax(dim=-1)[:, :-1].flatten()
        scores, pairs = scores.topk(min(_MAX_PAIRS, scores.numel()))
        found: dict[str, list[Detection]] = {}
        # A confidence is a score times a share, so no pair of a low score can be among them.
        for score, pair in zip(scores[scores > minimum].tolist(), pairs[scores > minimum].tolist(), strict=True):
            query, label = divmod(pair, len(CLASSES))
            logits = self._enlarge(masks[query].float(), padded, size)
            one = _detection(score, logits)
            if one.confidence > minimum:
                found.setdefault(CLASSES[label], []).append(one)
        return {name: sorted(objects, key=lambda one: -one.confidence) for name, objects in found.items()}

    def _enlarge(self, logits: torch.Tensor, padded: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """Logits [h, w] of a mask over the image, [H, W]: to the input's size, without its padding, to the image's."""
        height, width = self.preprocessing.size(*size)
        logits = functional.interpolate(logits[None, None], padded, mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]
        return functional.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0]


def load_detector(source: str, preprocessing: Preprocessing | None = None) -> Detector:
    """The detector on the CPU in float32.

    Args:
        source: a folder of transformers or a hub name, such as `facebook/mask2former-swin-small-coco-instance`; or the
            file of mmdetection that GenEval is published with, `mask2former_swin-s-p4-w7-224_..._coco_....pth`.
        preprocessing: of images.

    Raises:
        CheckpointError: it cannot be had, is damaged, or is no network for COCO's 80 classes.
    """
    if Path(source).is_file():
        return Detector(mmdet_network(Path(source)), preprocessing)
    # Before transformers is imported, which takes seconds.
    declare_operators()
    from transformers import Mask2FormerForUniversalSegmentation

    network = load_network(Mask2FormerForUniversalSegmentation, source, _UNUSED)
    problem = _label_fault(network.config.id2label)
    if problem:
        raise CheckpointError(
            f"{source}: {problem}; name a Mask2Former for instances of COCO's 80 classes, such as "
            "facebook/mask2former-swin-small-coco-instance"
        )
    return Detector(network, preprocessing)


def _detection(score: float, logits: torch.Tensor) -> Detection:
    """The object of a mask [H, W], whose confidence is the class's score times the mean probability in the mask."""
    mask = logits > 0
    confidence = score * float((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
    (top, bottom), (left, right) = _ends(mask.any(dim=1)), _ends(mask.any(dim=0))
    return Detection((left, top, right, bottom), confidence, mask.cpu().numpy())


def _ends(line: torch.Tensor) -> tuple[float, float]:
    """The first true index of [N], and the one after the last; zeros if all are false."""
    places = line.nonzero().flatten()
    return (float(places[0]), float(places[-1]) + 1) if len(places) else (0.0, 0.0)


def _label_fault(labels: dict[int, str]) -> str | None:
    """Why these are not COCO's classes in their order."""
    if len(labels) != len(CLASSES):
        return f"it knows {len(labels)} classes, expected {len(CLASSES)}"
    for index, (name, in_prompts) in enumerate(zip(COCO_CLASSES, CLASSES, strict=True)):
        if labels[index] not in (name, in_prompts, ALSO_NAMED.get(name)):
            return f"its class {index} is {labels[index]!r}, expected {name!r}"
    return None
