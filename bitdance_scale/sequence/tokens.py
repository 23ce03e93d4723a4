"""Text tokenizers with the special tokens of BitDance, and the samples that they make from captions.

One interface has two tokenizers: a local Hugging Face folder (Qwen3's) and a sentencepiece model. Markup is inserted as
ids, and all other text is encoded with special tokens switched off, so no caption can spell one. The Hugging Face
backend also splits a text at its special tokens and encodes the pieces separately, so the ids equal those of the whole
chat string encoded at once, as in the published release.

The added tokens follow the tokenizer's last entry: `<|res_1|>` .. `<|res_256|>`, then `<|query_1|>` ..
`<|query_{P-1}|>` (from 151669 on for Qwen3; published release).
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitdance_scale.config.data_rules import MAX_MARKUP_TOKENS, NUM_RESOLUTION_TOKENS
from bitdance_scale.config.named_files import tokenizer_faults
from bitdance_scale.config.schema import TextSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.sequence.layout import ImageTokens
from bitdance_scale.sequence.pack import Sample

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast

_QUERY_NAME = re.compile(r"<\|query_\d+\|>")
MARKUP_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class TextTokenizer(abc.ABC):
    r"""Text to ids, ids to text, and the ids of the chat markup.

    Attributes:
        vocab_size: number of entries, the added ones included; rows of the embedding before padding.
        num_new_entries: how many of the entries were added here because the files lack them.
        num_query_entries: query tokens among the entries, at least P - 1; a tokenizer folder may hold more.
        image_tokens: ids of the special tokens around an image.
        max_caption_tokens: longer captions are cut to this many tokens.
        digest: SHA-256 of the vocabulary, the added entries included; a checkpoint fits only tokenizers with its
        digest. turn_end_ids: int64 [1], `<|im_end|>`. user_turn_ids: int64 [N], `<|im_start|>user\n`. reply_ids: int64
        [N], `<|im_end|>\n<|im_start|>assistant\n`.
    """

    def __init__(
        self, vocabulary: Sequence[str], num_new_entries: int, block_tokens: int, max_caption_tokens: int
    ) -> None:
        """`vocabulary` lists every entry by id."""
        self.vocab_size = len(vocabulary)
        self.num_new_entries = num_new_entries
        self.num_query_entries = sum(_QUERY_NAME.fullmatch(name) is not None for name in vocabulary)
        self.max_caption_tokens = max_caption_tokens
        self.digest = hashlib.sha256(json.dumps(list(vocabulary)).encode()).hexdigest()
        id_of = {name: index for index, name in enumerate(vocabulary)}
        resolution, queries = _resolution_names(), _query_names(block_tokens)
        self.image_tokens = ImageTokens(
            vision_start=id_of["<|vision_start|>"],
            vision_end=id_of["<|vision_end|>"],
            resolution=tuple(id_of[name] for name in resolution),
            queries=tuple(id_of[name] for name in queries),
        )
        turn_start, turn_end = [id_of["<|im_start|>"]], [id_of["<|im_end|>"]]
        self.turn_end_ids = np.array(turn_end, dtype=np.int64)
        self.user_turn_ids = np.concatenate([turn_start, self.encode("user\n")]).astype(np.int64)
        self._assistant_turn_ids = np.concatenate([turn_start, self.encode("assistant\n")]).astype(np.int64)
        self.reply_ids = np.concatenate([turn_end, self.encode("\n"), self._assistant_turn_ids]).astype(np.int64)

    @property
    def added_entries(self) -> dict[str, int]:
        """Ids of the resolution and query tokens, by name."""
        tokens = self.image_tokens
        names = [*_resolution_names(), *_query_names(tokens.block_tokens)]
        return dict(zip(names, (*tokens.resolution, *tokens.queries), strict=True))

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of a text, none of them special."""

    @abc.abstractmethod
    def _text_entries(self) -> Sequence[int]:
        """The ids that `_encode` may give."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; special tokens appear by name."""

    def encode(self, text: str) -> np.ndarray:
        """int64 [N], ids of a user's text; the name of a special token is encoded as ordinary characters."""
        return np.array(self._encode(text), dtype=np.int64)

    def prompt_ids(self, caption: str) -> np.ndarray:
        r"""int64 [A], `<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n`.

        A caption of more than `max_caption_tokens` tokens is cut to that many.
        """
        user_turn = self.encode(f"user\n{caption}")[: len(self.user_turn_ids) - 1 + self.max_caption_tokens]
        return np.concatenate([self.user_turn_ids[:1], user_turn, self.reply_ids])

    def unconditional_ids(self) -> np.ndarray:
        r"""int64 [A], `<|im_start|>assistant\n`: the unconditional prompt, and what a dropped caption leaves."""
        return self._assistant_turn_ids.copy()

    def drawing_sample(self, key: int, caption: str, grid: tuple[int, int], is_caption_dropped: bool) -> Sample:
        """The sample that teaches an image from its caption (arXiv 2602.14041 Sec. 4.3).

        Text targets are the prompt after its first token; with the caption dropped, the prompt is the unconditional one
        and has no text targets.

        Args:
            key: identity of the sample in the data set.
            caption: its text.
            grid: (height, width) of the image in latent cells.
            is_caption_dropped: whether the caption turn is omitted (classifier-free guidance).
        """
        before = self.unconditional_ids() if is_caption_dropped else self.prompt_ids(caption)
        return Sample(
            key=key,
            grid=grid,
            before_ids=before,
            after_ids=self.turn_end_ids,
            first_target_before=len(before) if is_caption_dropped else 1,
            first_target_after=len(self.turn_end_ids),
            predicts_image=True,
        )

    def caption_entries(self) -> np.ndarray:
        """Bool [vocab_size], entries that a reply in words is made of: those of text, and `<|im_end|>`, which ends it.

        Captions of training have no others: neither markup nor what else the tokenizer has of its own.
        """
        tokens, markup = self.image_tokens, [int(self.user_turn_ids[0])]
        is_word = np.zeros(self.vocab_size, dtype=bool)
        is_word[self._text_entries()] = True
        is_word[[*markup, tokens.vision_start, tokens.vision_end, *tokens.resolution, *tokens.queries]] = False
        is_word[self.turn_end_ids] = True
        return is_word

    def describing_prompt(self, key: int, grid: tuple[int, int]) -> Sample:
        """A describing sample up to where its caption begins; arguments as `describing_sample`."""
        return Sample(
            key=key,
            grid=grid,
            before_ids=self.user_turn_ids,
            after_ids=self.reply_ids,
            first_target_before=len(self.user_turn_ids),
            first_target_after=len(self.reply_ids),
            predicts_image=False,
        )

    def describing_sample(self, key: int, caption: str, grid: tuple[int, int]) -> Sample:
        """The sample that teaches a caption from its image: the image in the user's turn, the caption as the reply.

        Text targets run from the caption's first token to the closing `<|im_end|>`. The caption is encoded separately
        from the markup, as it would be generated after that markup.

        Args:
            key: identity of the sample in the data set.
            caption: its text.
            grid: (height, width) of the image in latent cells.
        """
        caption_ids = self.encode(caption)[: self.max_caption_tokens]
        prompt = self.describing_prompt(key, grid)
        return dataclasses.replace(prompt, after_ids=np.concatenate([prompt.after_ids, caption_ids, self.turn_end_ids]))


def load_text_tokenizer(
    section: TextSection,
    block_tokens: int,
    is_causal: bool = False,
    is_raster: bool = False,
    has_context_queries: bool = False,
) -> TextTokenizer:
    """Loads the tokenizer of a run and adds the resolution and query tokens.

    Args:
        section: kind and path; only local files are read, and no code of the folder is run.
        block_tokens: P, vision tokens per block; P - 1 query tokens are added.
        is_causal: whether positions of one block see only those before them (`ImageTokens`).
        is_raster: whether vision tokens follow row by row (`ImageTokens`).
        has_context_queries: whether an image that is only context is laid as an image to draw (`ImageTokens`).

    Raises:
        ConfigError: there is no such file or folder, it holds no tokenizer of that kind, or the tokenizer lacks what
            the chat markup needs.
    """
    load = {"huggingface": _load_huggingface, "sentencepiece": _load_sentencepiece}
    if section.kind not in load:
        raise ConfigError(f"text.kind = {section.kind!r}: must be one of {', '.join(load)}")
    for fault in tokenizer_faults(section):
        raise ConfigError(fault)
    tokenizer = load[section.kind](section, block_tokens)
    tokenizer.image_tokens = dataclasses.replace(
        tokenizer.image_tokens, is_causal=is_causal, is_raster=is_raster, has_context_queries=has_context_queries
    )
    if "\n" not in tokenizer.decode(tokenizer.encode("user\n")):
        raise ConfigError(
            f"text.path = {section.path!r}: this tokenizer loses line breaks, which the chat markup needs; train a "
            "sentencepiece model with user_defined_symbols=['\\n']"
        )
    num_markup = max(
        len(tokenizer.prompt_ids("")) + len(tokenizer.turn_end_ids),
        len(tokenizer.user_turn_ids) + len(tokenizer.reply_ids) + len(tokenizer.turn_end_ids),
    )
    if num_markup > MAX_MARKUP_TOKENS:
        raise ConfigError(
            f"text.path = {section.path!r}: this tokenizer spells the chat markup in {num_markup} tokens, more than "
            f"the {MAX_MARKUP_TOKENS} that packs leave room for; use one with entries for 'user' and 'assistant'"
        )
    return tokenizer


class _HuggingFaceTokenizer(TextTokenizer):
    """A fast tokenizer of the transformers library."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, num_new_entries: int, block_tokens: int, max_caption_tokens: int
    ) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        document = json.loads(tokenizer.backend_tokenizer.to_str())
        document["added_tokens"] = []
        # A saved length limit or padding would silently change captions.
        document["truncation"] = document["padding"] = None
        self._plain = Tokenizer.from_str(json.dumps(document))
        id_of = tokenizer.get_vocab()
        vocabulary = sorted(id_of, key=id_of.__getitem__)
        super().__init__(vocabulary, num_new_entries, block_tokens, max_caption_tokens)

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _text_entries(self) -> Sequence[int]:
        return list(self._plain.get_vocab(with_added_tokens=False).values())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)


class _SentencePieceTokenizer(TextTokenizer):
    """A sentencepiece model; its special tokens exist only as ids after its last piece."""

    def __init__(self, processor: SentencePieceProcessor, block_tokens: int, max_caption_tokens: int) -> None:
        self._processor = processor
        pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
        self._special = [*MARKUP_TOKENS, *_resolution_names(), *_query_names(block_tokens)]
        super().__init__([*pieces, *self._special], len(self._special), block_tokens, max_caption_tokens)

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _text_entries(self) -> Sequence[int]:
        every = range(self._processor.vocab_size())
        return [index for index in every if not (self._processor.is_control(index) or self._processor.is_unused(index))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        num_pieces = self._processor.vocab_size()
        text, run = "", []
        for index in map(int, ids):
            if index < num_pieces:
                run.append(index)
            else:
                text += self._processor.decode(run) + self._special[index - num_pieces]
                run = []
        return text + self._processor.decode(run)


def _load_huggingface(section: TextSection, block_tokens: int) -> TextTokenizer:
    # Imported here because it takes seconds, which runs with a sentencepiece model can save.
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.tokenizer_path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # The library raises what it happens on in a damaged file, and some of it is of no type but this one.
        raise ConfigError(
            f"text.path = {section.path!r}: holds no usable Hugging Face tokenizer ({type(error).__name__}: {error}); "
            "fetch its files again"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"text.path = {section.path!r}: holds a slow tokenizer; add its tokenizer.json")
    missing = [name for name in MARKUP_TOKENS if name not in tokenizer.get_vocab()]
    if missing:
        raise ConfigError(
            f"text.path = {section.path!r}: the tokenizer has no {', '.join(missing)}; use a Qwen3 tokenizer"
        )
    names = [*_resolution_names(), *_query_names(block_tokens)]
    num_known = len(tokenizer.get_vocab())
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ids = tokenizer.get_vocab().values()
    if len(set(ids)) != len(ids) or max(ids) != len(ids) - 1:
        raise ConfigError(
            f"text.path = {section.path!r}: the tokenizer's {len(ids)} entries do not have the ids 0..{len(ids) - 1}; "
            "repair its added tokens"
        )
    return _HuggingFaceTokenizer(tokenizer, len(ids) - num_known, block_tokens, section.max_caption_tokens)


def _load_sentencepiece(section: TextSection, block_tokens: int) -> TextTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(section.tokenizer_path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"text.path = {section.path!r}: is not a sentencepiece model: {error}") from error
    pieces = {processor.id_to_piece(index) for index in range(processor.vocab_size())}
    names = (*MARKUP_TOKENS, *_resolution_names(), *_query_names(block_tokens))
    clashing = [name for name in names if name in pieces]
    if clashing:
        raise ConfigError(
            f"text.path = {section.path!r}: the model has pieces named {', '.join(clashing)}, which captions could "
            "spell; train it without them, as they are added when it is loaded"
        )
    return _SentencePieceTokenizer(processor, block_tokens, section.max_caption_tokens)


def _resolution_names() -> list[str]:
    return [f"<|res_{num_cells}|>" for num_cells in range(1, NUM_RESOLUTION_TOKENS + 1)]


def _query_names(block_tokens: int) -> list[str]:
    return [f"<|query_{number}|>" for number in range(1, block_tokens)]
