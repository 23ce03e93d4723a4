"""Judges that transformers loads: networks for visual question answering, and chat models that see images.

Answers are greedy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.questions.judge import Asked, Judge, JudgeError
from bitdance_scale.torchvision_operators import declare_operators
from bitdance_scale.wording import first_few

_MAX_NEW_TOKENS = 512
# Of networks for question answering, which were trained on answers of a word or two.
_MAX_SHORT_TOKENS = 10
_ANSWERS = frozenset({"yes", "no"})


class _LocalJudge(Judge):
    """A model on one device, asked in batches.

    Args:
        model_name: its path or name, which names its answers too.
        model: the network.
        processor: makes its inputs.
        batch_size: questions at a time.
    """

    def __init__(self, model_name: str, model: Any, processor: Any, batch_size: int) -> None:
        self.model, self._model, self._processor = model_name, model, processor
        # Weights of fewer bits may answer otherwise.
        self.protocol = f"{self.protocol}, {str(model.dtype).removeprefix('torch.')}"
        self._batch_size = batch_size

    @torch.no_grad()
    def stream(self, asked: Iterable[Asked]) -> Iterator[tuple[int, str]]:
        """As `Judge.stream`, in the order of the questions."""
        questions, place = iter(asked), 0
        while batch := list(islice(questions, self._batch_size)):
            for text in self._answers(batch):
                yield place, text
                place += 1

    @abstractmethod
    def _answers(self, batch: list[Asked]) -> list[str]:
        """The texts that answer a batch."""


class QuestionAnsweringJudge(_LocalJudge):
    """ViLT (Kim et al., arXiv 2102.03334), BLIP (Li et al., arXiv 2201.12086) and the like: short answers."""

    protocol = "transformers visual question answering, greedy, version 1"
    follows_instructions = False

    def _answers(self, batch: list[Asked]) -> list[str]:
        images, questions = zip(*batch, strict=True)
        tokenizer = self._processor.tokenizer
        inputs = self._processor(
            images=list(images),
            text=list(questions),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=_max_tokens(self._model.config, tokenizer),
        )
        inputs = _moved(inputs, self._model)
        if not hasattr(self._model, "generate"):
            best = self._model(**inputs).logits.argmax(-1)
            return [self._model.config.id2label[number] for number in best.tolist()]
        tokens = self._model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=_MAX_SHORT_TOKENS)
        texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


class ChatJudge(_LocalJudge):
    """A chat model that sees images, asked through its own chat template."""

    protocol = f"transformers chat template, greedy, at most {_MAX_NEW_TOKENS} tokens, version 1"
    follows_instructions = True

    def _answers(self, batch: list[Asked]) -> list[str]:
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for _, question in batch
        ]
        texts = self._processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        # Most templates begin with the token that the tokenizer would begin with.
        beginning = self._processor.tokenizer.bos_token
        inputs = self._processor(
            images=[[image] for image, _ in batch],
            text=texts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (beginning and texts[0].startswith(beginning)),
        )
        inputs = _moved(inputs, self._model)
        tokens = self._model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=_MAX_NEW_TOKENS)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        said: list[str] = self._processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in said]


def load_judge(
    source: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> Judge:
    """A judge from a folder or a name on the Hugging Face hub; code of the folder is not run.

    Args:
        source: a folder that `save_pretrained` wrote, or a name such as "Salesforce/blip-vqa-base".
        device: where it is put.
        dtype: of its weights.
        batch_size: questions at a time.

    Raises:
        ConfigError: a package that it needs is not installed.
        JudgeError: it cannot be had, is of a kind that answers no questions on images, lacks weights, or cannot say
            yes and no.
    """
    declare_operators()
    import transformers

    with_kind = (
        (transformers.AutoModelForVisualQuestionAnswering, QuestionAnsweringJudge),
        (transformers.AutoModelForImageTextToText, ChatJudge),
    )
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        kinds = [(loader, kind) for loader, kind in with_kind if type(config) in loader._model_mapping]
        if not kinds:
            raise JudgeError(
                f"{source}: is a model of type {config.model_type}, which answers no questions about images; name one "
                "for visual question answering, or a chat model that sees images"
            )
        loader, kind = kinds[0]
        processor = _load_processor(transformers, source)
        model, found = loader.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        hint = "" if Path(source).is_dir() else "; name a folder, or a model of the hub that can be reached from here"
        raise JudgeError(f"{source}: cannot be loaded ({' '.join(str(error).split())[:400]}){hint}") from error
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise JudgeError(f"{source}: lacks weights, which would be random: {first_few(lacking)}; download it again")
    judge: Judge = kind(source, model.to(device).eval(), processor, batch_size)
    _check_kind(judge, source, model, processor)
    return judge


def _load_processor(transformers: Any, source: str) -> Any:
    try:
        return transformers.AutoProcessor.from_pretrained(source)
    except ImportError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"{source}: its processor needs a package that is not installed ({lines[0] if lines else error}); most "
            "need `pip install torchvision`, built for the torch that is installed"
        ) from error


def _check_kind(judge: Judge, source: str, model: Any, processor: Any) -> None:
    if isinstance(judge, ChatJudge):
        if not getattr(processor, "chat_template", None):
            raise JudgeError(
                f"{source}: its processor has no chat template; name a chat model that was trained to answer"
            )
        # What is generated is cut off after the prompts, which end at the same place only so.
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
    elif not hasattr(model, "generate") and not _ANSWERS.issubset(model.config.id2label.values()):
        raise JudgeError(
            f"{source}: has {len(model.config.id2label)} answers, of which yes and no are none; name a model that was "
            "trained on VQA v2"
        )


def _max_tokens(config: Any, tokenizer: Any) -> int:
    """The longest question that a network takes."""
    text = getattr(config, "text_config", config)
    return int(min(getattr(text, "max_position_embeddings", tokenizer.model_max_length), tokenizer.model_max_length))


def _moved(inputs: Any, model: Any) -> dict[str, Any]:
    """Inputs on the model's device, and those that are no indices in its dtype."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in moved.items()}
