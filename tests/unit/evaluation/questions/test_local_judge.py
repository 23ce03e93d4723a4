"""Models of a few thousand random weights, written and loaded as published ones are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.questions import local_judge
from bitdance_scale.evaluation.questions.judge import JudgeError
from bitdance_scale.evaluation.questions.local_judge import load_judge
from tests.unit.evaluation.questions.small_vilt import SMALL, WORDS, save_vilt, tokenizer

CPU = torch.device("cpu")


def images(number: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (number, 40, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def vilt(tmp_path_factory):
    return save_vilt(tmp_path_factory.mktemp("vilt"))


def test_a_classifier_of_answers(vilt):
    judge = load_judge(str(vilt), CPU, batch_size=2)
    assert (judge.model, judge.follows_instructions) == (str(vilt), False)
    assert judge.protocol == "transformers visual question answering, greedy, version 1, float32"
    half = load_judge(str(vilt), CPU, torch.bfloat16)
    assert half.protocol.endswith(", bfloat16") and len(half.answer(images(1), ["is it red?"])) == 1
    shown, questions = images(3), ["is it red?", "is it a cat?", "is it a " + "red " * 40]
    said = judge.answer(shown, questions)
    assert {*said} <= {"yes", "no", "a dog"}
    # Each label wins where its bias is the largest; batches have no part in an answer.
    bias = judge._model.classifier[-1].bias
    for number, label in enumerate(("yes", "no", "a dog")):
        with torch.no_grad():
            bias.copy_(100 * torch.nn.functional.one_hot(torch.tensor(number), 3))
        assert judge.answer(shown, questions) == [label] * 3


def test_folders_that_are_no_judges(vilt, tmp_path):
    from transformers import BertConfig, BertModel, ViltForQuestionAnswering

    with pytest.raises(JudgeError, match=r"none: cannot be loaded.*name a folder, or a model of the hub"):
        load_judge(str(tmp_path / "none"), CPU)
    BertModel(BertConfig(**SMALL, vocab_size=8)).save_pretrained(tmp_path / "bert")
    with pytest.raises(JudgeError, match="bert: is a model of type bert, which answers no questions about images"):
        load_judge(str(tmp_path / "bert"), CPU)

    model = ViltForQuestionAnswering.from_pretrained(vilt)
    processor = local_judge._load_processor(__import__("transformers"), str(vilt))
    for folder in ("others", "lacking"):
        processor.save_pretrained(tmp_path / folder)
    weights = {name: value for name, value in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(tmp_path / "lacking", state_dict=weights)
    with pytest.raises(JudgeError, match=r"lacking: lacks weights, which would be random: .*pooler"):
        load_judge(str(tmp_path / "lacking"), CPU)
    model.config.id2label = {0: "1", 1: "2", 2: "3"}
    model.save_pretrained(tmp_path / "others")
    with pytest.raises(JudgeError, match="others: has 3 answers, of which yes and no are none"):
        load_judge(str(tmp_path / "others"), CPU)


def test_a_network_that_writes_its_answer(tmp_path):
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    text = SMALL | {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 16}
    numbers = {"bos_token_id": 11, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config=text | numbers,
        vision_config=SMALL | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    torch.manual_seed(0)
    model = BlipForQuestionAnswering(config)
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer(tmp_path)).save_pretrained(tmp_path)
    judge = load_judge(str(tmp_path), CPU, batch_size=2)
    # The word with the largest bias, again and again; nothing where that is the end.
    predictions = judge._model.text_decoder.cls.predictions
    for number, starts_with in ((7, "red red"), (3, "")):
        with torch.no_grad():
            for bias in (predictions.bias, predictions.decoder.bias):
                bias.copy_(1000 * torch.nn.functional.one_hot(torch.tensor(number), len(WORDS)))
        said = judge.answer(images(3), ["is it red?", "is it a cat?", "is it?"])
        # Published tokenizers leave out the token that answers begin with.
        said = [text.removeprefix("[DEC]").strip() for text in said]
        assert len(said) == 3 and all(text.startswith(starts_with) and bool(text) == bool(starts_with) for text in said)


def test_a_package_that_a_processor_lacks_is_named(vilt, monkeypatch):
    import transformers

    def lacks(source):
        raise ImportError("\nViltVideoProcessor requires the Torchvision library\nbut it was not found")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lacks)
    with pytest.raises(ConfigError, match=r"requires the Torchvision library.*pip install torchvision"):
        load_judge(str(vilt), CPU)


def test_a_chat_model_is_asked_through_its_template(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ANSWER:", "yes", "no", "is", "it", "red")
    numbers = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<image>"], **special)
    template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ANSWER:"
    )
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**size),
        tokens,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token="<image>",
    )
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **SMALL, "image_size": 32, "patch_size": 16},
        text_config={"model_type": "llama", **SMALL, "num_key_value_heads": 2, "vocab_size": len(words)},
        image_token_index=numbers["<image>"],
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 3, 0
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    judge = load_judge(str(tmp_path), CPU, batch_size=2)
    assert judge.follows_instructions
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(local_judge, "_MAX_NEW_TOKENS", 3)
        shown, questions = images(3), ["is it red", "is it", "is it red it is"]
        together = judge.answer(shown, questions)
        singly = [judge.answer([image], [question])[0] for image, question in zip(shown, questions, strict=True)]
    # Prompts of unequal length are padded, and their answers cut off, at the right places.
    assert together == singly and all("USER:" not in text for text in together)
    processor.chat_template = None
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    processor.save_pretrained(tmp_path)
    with pytest.raises(JudgeError, match="its processor has no chat template"):
        load_judge(str(tmp_path), CPU)
