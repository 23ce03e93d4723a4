import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.clip import clip_input, load_clip
from bitdance_scale.evaluation.geneval.colours import ColourClassifier, colour_texts, crop
from bitdance_scale.evaluation.geneval.rules import COLOURS, Detection


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_object_alone_is_what_pillow_cuts_out():
    image = picture(12, 10)
    mask = np.random.default_rng(1).random((12, 10)) < 0.5
    box = (2.0, 3.0, 9.0, 8.0)
    # As the published scorer does it.
    blank = Image.new("RGB", (10, 12), "#999")
    expected = Image.composite(Image.fromarray(image), blank, Image.fromarray(mask)).crop(box)
    assert (crop(image, Detection(box, 1.0, mask)) == np.asarray(expected)).all()
    assert (crop(image, Detection(box, 1.0)) == image[3:8, 2:9]).all()
    assert (crop(image, Detection((0, 0, 10, 12), 1.0, np.zeros((12, 10), bool))) == 153).all()


@pytest.mark.parametrize("size", [(40, 40), (24, 24), (33, 70), (71, 34), (100, 25), (8, 19)])
def test_images_are_prepared_as_by_open_clip(size):
    transforms = pytest.importorskip("torchvision.transforms")
    image = picture(*size)
    steps = transforms.Compose(
        [
            transforms.Resize(24, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    made = clip_input(image, 24)
    assert made.dtype == np.float32
    # Pixels are the same; they are normalised in another order of the same operations.
    assert np.abs(made - steps(Image.fromarray(image)).numpy()).max() < 1e-5


class Words:
    """Embeds a text as its words' first letters, and an image as the mean of its pixels."""

    def embed_texts(self, texts):
        vectors = [[sum(word.startswith(letter) for word in text.split()) for letter in "roygbpw"] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(vectors, dtype=torch.float32), dim=-1)

    def embed_images(self, images):
        self.seen = images
        return torch.nn.functional.normalize(
            torch.stack([torch.eye(7)[round(float(image.mean())) % 7] for image in images]), dim=-1
        )


def test_a_colour_is_the_mean_of_its_three_texts():
    assert colour_texts("red", "bus") == (
        "a photo of a red bus",
        "a photo of a red-colored bus",
        "a photo of a red object",
    )
    classifier = ColourClassifier(Words())
    directions = classifier.directions("bus")
    # "a photo of a red bus" has photo, of, red and bus; the third text has object, another o, and no b.
    first, third = np.array([1, 1, 0, 0, 1, 1, 0]) / 2, np.array([1, 2, 0, 0, 0, 1, 0]) / 6**0.5
    mean = (2 * first + third) / 3
    assert directions[COLOURS.index("red")].numpy() == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
    assert directions.norm(dim=-1).numpy() == pytest.approx(1)
    assert classifier.directions("bus") is directions
    assert not torch.equal(classifier.directions("owl"), directions)


def test_each_object_has_the_colour_that_is_most_like_it():
    clip = Words()
    image = np.zeros((6, 40, 3), dtype=np.uint8)
    image[:, :20], image[:, 20:] = 7, 10
    objects = [Detection((0, 0, 20, 6), 1.0), Detection((20, 0, 40, 6), 1.0)]
    # 7 is "r" and 10 is "g", which red and green are most like.
    assert ColourClassifier(clip)(image, "tie", objects) == ["red", "green"]
    assert [part.shape for part in clip.seen] == [(6, 20, 3), (6, 20, 3)]
    assert ColourClassifier(clip)(image, "tie", objects * 20) == ["red", "green"] * 20


def test_clip_of_transformers(clip_folder):
    clip = load_clip(str(clip_folder))
    texts = [text for colour in ("red", "brown") for text in colour_texts(colour, "tv remote")]
    images = [picture(40, 30), picture(20, 55, seed=1)]
    pixels = torch.from_numpy(np.stack([clip_input(image, 32) for image in images]))
    # Its own forward pass, of texts that are filled up to one length.
    tokens = clip._tokenizer(texts, padding=True, return_tensors="pt")
    assert len(set(tokens["attention_mask"].sum(dim=1).tolist())) > 1
    with torch.no_grad():
        expected = clip.model(pixel_values=pixels, **tokens)
    assert torch.allclose(clip.embed_texts(texts), expected.text_embeds, atol=1e-5)
    assert torch.allclose(clip.embed_images(images), expected.image_embeds, atol=1e-5)
    assert torch.allclose(clip.embed_images(images[1:]), expected.image_embeds[1:], atol=1e-5)
    # Nothing above compares constants.
    assert (expected.text_embeds[0] - expected.text_embeds[1]).abs().max() > 1e-3
    assert (expected.image_embeds[0] - expected.image_embeds[1]).abs().max() > 1e-3


def test_folders_that_are_no_clip(mask2former_folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_clip(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=str(mask2former_folder)):
        load_clip(str(mask2former_folder))
