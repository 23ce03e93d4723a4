"""The 80 classes of COCO in their order, under the names that GenEval's prompts use."""

from __future__ import annotations

from collections.abc import Mapping

# Source: the categories of COCO's instances_val2017.json, by id.
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip

# What COCO's names leave to guess. Source: djghosh13/geneval, evaluation/object_names.txt.
_RENAMED: Mapping[str, str] = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}

ALSO_NAMED: Mapping[str, str] = {
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}
"""Names of VOC that published detectors of COCO's classes have in `config.json`, by COCO's name.

Source: the labels of huggingface/transformers' converted Mask2Formers (`coco-detection-mmdet-id2label.json`)."""

CLASSES = tuple(_RENAMED.get(name, name) for name in COCO_CLASSES)
"""Names in GenEval's prompts, by the index of the class in COCO's order."""
