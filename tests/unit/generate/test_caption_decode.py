"""How tokens of a caption are chosen, when it ends, and its steps as a recorded graph takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate import qwen3_memory
from bitdance_scale.generate.caption_decode import ContextLayout, TokenChoice, decode_captions, lay_out_contexts
from bitdance_scale.generate.published_model import PublishedDescriber, load_describer
from bitdance_scale.generate.qwen3_captions import Qwen3Captions
from tests.unit.generate.test_qwen3_blocks import StandInForCapture

CPU = torch.device("cpu")
END = 4


@pytest.fixture(scope="module")
def describer(published) -> PublishedDescriber:
    return load_describer(published, torch.float32, CPU)


def nucleus(logits: np.ndarray, top_p: float, temperature: float) -> np.ndarray:
    """Probabilities by the definition: the smallest set of most probable tokens with at least `top_p` together."""
    weights = np.exp(logits.astype(np.float64) / temperature)
    shares = weights / weights.sum()
    kept, total = [], 0.0
    for token in np.argsort(-shares, kind="stable"):
        if total >= top_p:
            break
        kept.append(token)
        total += shares[token]
    found = np.zeros(len(shares))
    found[kept] = shares[kept] / total
    return found


@pytest.mark.parametrize(("top_p", "temperature"), [(0.6, 1.0), (0.9, 0.5), (1.0, 2.0), (0.01, 1.0), (None, 0.7)])
def test_drawn_tokens_have_the_probabilities_of_the_nucleus(top_p, temperature):
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 2
    logits[[3, 7]] = -np.inf
    num_draws = 20000
    # Evenly spaced numbers instead of random ones: a token with probability q gets q * num_draws of them, to within 1.
    uniforms = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    choice = TokenChoice(top_p, temperature)
    tokens = choice.choose(torch.from_numpy(logits).expand(num_draws, -1), uniforms)
    found = np.bincount(tokens.numpy(), minlength=12) / num_draws
    np.testing.assert_allclose(found, nucleus(logits, top_p or 1.0, temperature), atol=1.5 / num_draws)
    assert not found[[3, 7]].any()


def test_the_last_number_still_gives_a_token_of_the_nucleus():
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    for top_p in (0.1, 0.5, 1.0):
        token = int(TokenChoice(top_p).choose(logits, largest))
        assert nucleus(logits[0].numpy(), top_p, 1.0)[token] > 0


def test_greedy_takes_the_first_of_equal_logits():
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [5.0, 2.0, 2.0, 5.0]], dtype=torch.bfloat16)
    assert TokenChoice().choose(logits, None).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("top_p", "temperature", "named"),
    [(0, None, "top_p = 0"), (1.5, None, "top_p = 1.5")]
    + [(None, value, f"temperature = {value}") for value in (0, -1.0, float("inf"), float("nan"))],
)
def test_impossible_choices_are_refused(top_p, temperature, named):
    with pytest.raises(ConfigError, match=named):
        TokenChoice(top_p, temperature)


class Scripted:
    """In place of a network: each sequence says its tokens in turn."""

    def __init__(self, *scripts: list[int]) -> None:
        self._scripts, self.num_read = scripts, 0

    def start(self, layout: object, bits: object, max_tokens: int) -> torch.Tensor:
        self.max_tokens = max_tokens
        return self._logits()

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        self.num_read += 1
        return self._logits()

    def _logits(self) -> torch.Tensor:
        logits = torch.zeros(len(self._scripts), 6)
        for row, script in enumerate(self._scripts):
            logits[row, script[self.num_read] if self.num_read < len(script) else 0] = 9.0
        return logits


def decode(model: Scripted, max_tokens: int, is_choice: list[int] | None = None):
    allowed = torch.tensor([1] * 6 if is_choice is None else is_choice, dtype=torch.bool)
    return decode_captions(model, None, None, TokenChoice(), (), allowed, END, max_tokens)


def test_captions_end_at_their_own_end():
    model = Scripted([1, 2, END, 3, 3], [END], [5, 1, 1, END])
    captions = decode(model, max_tokens=8)
    assert [caption.ids for caption in captions] == [[1, 2], [], [5, 1, 1]]
    assert all(caption.is_ended for caption in captions)
    # Nothing is read after the last end.
    assert model.num_read == 3


def test_captions_are_cut_at_the_longest_length():
    model = Scripted([1, 2, END], [1, 2, 3], [1, 2, 3, END])
    captions = decode(model, max_tokens=2)
    assert [caption.ids for caption in captions] == [[1, 2]] * 3
    # The first ended just there.
    assert [caption.is_ended for caption in captions] == [True, False, False]
    assert model.num_read == model.max_tokens == 2


def test_rows_that_are_no_choice_are_passed_over():
    assert decode(Scripted([5, END]), 3, is_choice=[0, 0, 0, 1, 1, 0])[0].ids == [3]


def test_weights_that_are_not_finite_are_named():
    class Broken(Scripted):
        def _logits(self) -> torch.Tensor:
            return super()._logits() * float("nan")

    with pytest.raises(CheckpointError, match="not finite"):
        decode(Broken([1]), 3)


def layout_of(describer: PublishedDescriber, *grids: tuple[int, int]) -> ContextLayout:
    samples = [describer.text.describing_prompt(0, grid) for grid in grids]
    return lay_out_contexts(samples, describer.text.image_tokens, CPU)


def test_sequences_are_padded_on_the_left(describer):
    layout = layout_of(describer, (4, 4), (8, 4))
    alone = layout_of(describer, (4, 4))
    assert layout.first.tolist() == [16, 0]
    for name in ("token_ids", "position_ids", "document_ids", "block_ids"):
        assert torch.equal(getattr(layout, name)[:1, 16:], getattr(alone, name))
    assert torch.equal(layout.vision_positions[:16], alone.vision_positions + 16)
    assert layout.vision_rows.tolist() == [0] * 16 + [1] * 32
    mask = layout.mask()[0, 0]
    assert not mask[16:, :16].any() and torch.equal(mask[16:, 16:], alone.mask()[0, 0])
    # The caption begins right after the last slot.
    assert describer.text.decode(layout.token_ids[0, -3:]).endswith("assistant\n")


def test_steps_of_fixed_shape_say_the_same(describer, monkeypatch):
    monkeypatch.setattr(qwen3_memory, "CapturedCall", StandInForCapture)
    StandInForCapture.made.clear()
    layout = layout_of(describer, (4, 4), (8, 4))
    bits = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], size=(48, 16))).float()
    allowed = torch.from_numpy(describer.text.caption_entries())
    found = []
    for use_graphs in (False, True):
        model = Qwen3Captions(describer.backbone, describer.output, describer.projector, use_graphs)
        # Twice, so that the second caption is read over what the first left in memory.
        found += [decode_captions(model, layout, bits, TokenChoice(), (), allowed, END, 6) for _ in range(2)]
    assert all(captions == found[0] for captions in found)
    assert StandInForCapture.made == ["_read_token"]
