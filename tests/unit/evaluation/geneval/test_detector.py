import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.geneval.classes import CLASSES, COCO_CLASSES
from bitdance_scale.evaluation.geneval.detector import Detector, load_detector
from bitdance_scale.evaluation.geneval.preprocessing import Preprocessing
from tests.unit.evaluation.geneval.small_networks import save_mask2former


class Fixed(nn.Module):
    """Says the same of whatever it is shown."""

    def __init__(self, classes, masks):
        super().__init__()
        self.classes, self.masks = nn.Parameter(classes), masks

    def forward(self, pixel_values):
        self.seen = pixel_values
        repeated = [value.expand(len(pixel_values), *value.shape) for value in (self.classes, self.masks)]
        return types.SimpleNamespace(class_queries_logits=repeated[0], masks_queries_logits=repeated[1])


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 512), (800, 800), (800, 800)),
        ((512, 768), (800, 1200), (800, 1216)),
        ((300, 1000), (400, 1333), (416, 1344)),
        # 1333 / 1031 is 1.29292, and 333 times that 430.54
        ((333, 1031), (431, 1333), (448, 1344)),
    ],
)
def test_images_are_resized_as_the_published_scorer_does(size, resized, padded):
    assert Preprocessing().size(*size) == resized
    inputs = Preprocessing()(images(1, *size, 3), torch.device("cpu"))
    assert inputs.shape == (1, 3, *padded)
    assert inputs.dtype == torch.float32
    assert (inputs[..., resized[0] :, :] == 0).all()
    assert (inputs[..., resized[1] :] == 0).all()


def test_pixels_are_blended_and_normalised():
    shown = images(2, 20, 30, 3)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    inputs = Preprocessing(40, 100, 8)(shown, torch.device("cpu")).permute(0, 2, 3, 1).numpy()
    # Where an image grows, Pillow's bilinear filter is the same; it rounds twice.
    for image, made in zip(shown, inputs, strict=True):
        enlarged = np.asarray(Image.fromarray(image).resize((60, 40), Image.Resampling.BILINEAR)).astype(float)
        pixels = made[:, :60] * std + mean
        assert np.abs(pixels - enlarged).max() < 1.01
        assert np.abs(pixels - pixels.round()).max() < 1e-4
    # Where it shrinks, nothing but the nearest pixels counts: of ten rows in two halves rows 2 and 7, whose centres are
    # those of the halves; of all ten in one, rows 4 and 5 in equal parts.
    image = np.zeros((1, 10, 10, 3), dtype=np.uint8)
    image[0, 3:7] = np.array([250, 100, 60, 250])[:, None, None]
    inputs = Preprocessing(2, 2, 2)(image, torch.device("cpu"))
    # Tolerances are of float32 pixels of up to 255.
    assert inputs[0, 0, :, 0].numpy() * std[0] + mean[0] == pytest.approx([0, 0], abs=1e-4)
    inputs = Preprocessing(1, 1, 1)(image, torch.device("cpu"))
    assert inputs[0, :, 0, 0].numpy() * std + mean == pytest.approx([80] * 3, abs=1e-4)


def test_a_mask_becomes_a_box_and_a_confidence():
    # Class scores 0.8 and 0.2; a mask whose logits are 2 in rows 1 to 2 and columns 0 to 1 of 4 x 4, and -2 elsewhere.
    classes = torch.full((1, 81), -50.0)
    classes[0, 16], classes[0, 80] = np.log(0.8), np.log(0.2)
    masks = torch.full((1, 4, 4), -2.0)
    masks[0, 1:3, :2] = 2.0
    detector = Detector(Fixed(classes, masks), Preprocessing(16, 16, 16))
    (found,) = detector(images(1, 16, 16, 3))
    (dog,) = found.pop("dog")
    assert found == {}
    # The border is halfway between the centres of the cells, which are 4 pixels apart.
    assert dog.box == (0, 4, 8, 12)
    assert dog.mask.dtype == bool
    # Its logits are -2, -1.5, ..., 2 along a border: weights of 1/8, 3/8, 5/8 and 7/8 between two cells.
    line = np.array([0.5, 1.5, 2.0, 2.0])
    across, down = np.array([2.0] * 6 + [1.5, 0.5]), np.concatenate([line, line[::-1]])
    # Bilinear: each is 4 w - 2 with a weight w that is a product of both axes'.
    logits = 4 * np.outer((down + 2) / 4, (across + 2) / 4) - 2
    quality = (1 / (1 + np.exp(-logits[logits > 0]))).mean()
    assert dog.mask.sum() == (logits > 0).sum()
    assert dog.confidence == pytest.approx(0.8 * quality, abs=1e-6)


def reference(classes, masks, padded, resized, size):
    """What `predict` of mmdetection's fusion head makes, over all pairs at once: classes, boxes, scores, masks."""
    masks = functional.interpolate(masks[None], padded, mode="bilinear", align_corners=False)
    masks = masks[:, :, : resized[0], : resized[1]]
    masks = functional.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
    scores, top = classes.softmax(-1)[:, :80].reshape(-1).topk(100)
    chosen = masks[top // 80]
    inside = (chosen > 0).float()
    quality = (chosen.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    return [
        (CLASSES[pair % 80], (np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))), score, mask)
        for pair, mask, score in zip(top.tolist(), inside.bool().numpy(), (scores * quality).tolist(), strict=True)
    ]


def test_objects_are_those_of_mmdetection():
    generator = torch.Generator().manual_seed(3)
    # Several classes of one query are above others' best ones, so that a query is found twice.
    classes = torch.randn(30, 81, generator=generator) * 4
    masks = functional.interpolate(torch.randn(1, 30, 3, 4, generator=generator) * 3, (12, 16), mode="bicubic")[0]
    preprocessing = Preprocessing(44, 60, 16)
    size = (66, 83)
    resized, padded = preprocessing.size(*size), (48, 64)
    assert resized == (44, 55)
    found = Detector(Fixed(classes, masks), preprocessing)(images(2, *size, 3), minimum=0.0)
    expected = [one for one in reference(classes, masks, padded, resized, size) if one[2] > 0]
    assert found[0].keys() == {name for name, *_ in expected}
    assert sum(map(len, found[0].values())) == len(expected) > 90
    for name, objects in found[0].items():
        theirs = sorted((one for one in expected if one[0] == name), key=lambda one: -one[2])
        assert [one.confidence for one in objects] == pytest.approx([one[2] for one in theirs], abs=1e-6)
        for ours, (_, (columns, rows), _, mask) in zip(objects, theirs, strict=True):
            assert ours.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert (ours.mask == mask).all()
    # The same in each image of a batch; a limit leaves out what is below it, and nothing else.
    assert [len(objects) for objects in found[1].values()] == [len(objects) for objects in found[0].values()]
    (few,) = Detector(Fixed(classes, masks), preprocessing)(images(1, *size, 3), minimum=0.3)
    kept = {name: [one.confidence for one in objects if one.confidence > 0.3] for name, objects in found[0].items()}
    assert {name: [one.confidence for one in objects] for name, objects in few.items()} == {
        name: values for name, values in kept.items() if values
    }
    assert 0 < sum(map(len, few.values())) < 60


def test_a_mask_without_a_pixel_is_nothing():
    classes = torch.zeros(1, 81)
    classes[0, 0] = 20.0
    detector = Detector(Fixed(classes, torch.full((1, 4, 4), -1.0)), Preprocessing(16, 16, 16))
    assert detector(images(1, 16, 16, 3)) == [{}]


def test_a_folder_of_transformers(mask2former_folder):
    detector = load_detector(str(mask2former_folder), Preprocessing(64, 96))
    shown = images(3, 48, 40, 3)
    found = detector(shown)
    assert all(sum(map(len, objects.values())) > 0 for objects in found)
    again = detector(shown)
    alone = [detector(image[None])[0] for image in shown]
    for objects, repeated, single in zip(found, again, alone, strict=True):
        assert objects.keys() == repeated.keys() == single.keys()
        for name in objects:
            pairs = zip(objects[name], repeated[name], single[name], strict=True)
            for first, second, third in pairs:
                assert first.confidence == second.confidence
                assert (first.mask == second.mask).all()
                # Sums over a batch are made in another order.
                assert first.confidence == pytest.approx(third.confidence, abs=1e-4)
                assert (first.mask != third.mask).mean() < 0.01
    # The three images do not all show the same.
    assert len({tuple(sorted(objects)) for objects in found}) > 1


def test_labels_as_published_detectors_spell_them(tmp_path):
    # config.json of transformers' Mask2Formers for instances of COCO has VOC's names of six classes.
    classes = list(COCO_CLASSES)
    for index, name in ((3, "motorbike"), (4, "aeroplane"), (57, "sofa"), (62, "tvmonitor")):
        classes[index] = name
    classes[58], classes[60] = "pottedplant", "diningtable"
    load_detector(str(save_mask2former(tmp_path / "published", tuple(classes))))
    classes[57] = "tvmonitor"
    with pytest.raises(CheckpointError, match="swapped: its class 57 is 'tvmonitor', expected 'couch'"):
        load_detector(str(save_mask2former(tmp_path / "swapped", tuple(classes))))


def test_folders_that_are_no_detector(mask2former_folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_detector(str(tmp_path / "nowhere"))
    other = save_mask2former(tmp_path / "stuff", (*COCO_CLASSES, "banner"))
    with pytest.raises(CheckpointError, match="stuff: it knows 81 classes, expected 80; name a Mask2Former"):
        load_detector(str(other))
    swapped = save_mask2former(tmp_path / "order", ("bicycle", "person", *COCO_CLASSES[2:]))
    with pytest.raises(CheckpointError, match="order: its class 0 is 'bicycle', expected 'person'"):
        load_detector(str(swapped))
    from safetensors.torch import load_file, save_file

    state = load_file(mask2former_folder / "model.safetensors")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((mask2former_folder / "config.json").read_bytes())
    del state["class_predictor.bias"]
    save_file(state, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"cut: class_predictor.bias is missing; .* another network or incomplete"
    ):
        load_detector(str(cut))
