from __future__ import annotations

import pytest

from bitdance_scale.evaluation.questions.words import compare, edit_distance, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Grand  OPENING!", ["grand", "opening"]),
        ("\u201cFresh\u201d bread & tea", ["fresh", "bread", "&", "tea"]),
        ("don't eco-friendly", ["don't", "eco-friendly"]),
        ("$4.99 50%", ["$4.99", "50%"]),
        ("\uff28\uff29", ["hi"]),
        ("Stra\u00dfe", ["strasse"]),
        ("\u4f60\u597d, world", ["\u4f60", "\u597d", "world"]),
        ("... !", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_word_accuracy_counts_each_read_word_once_in_any_order():
    found = compare(["the cat and the dog"], ["DOG and", "the mouse"])
    assert (found.words, found.words_read, found.word_accuracy, found.is_exact) == (5, 3, 0.6, False)
    assert compare(["a b"], ["b a", "c"]).word_accuracy == 1
    assert compare(["a a"], ["a"]).word_accuracy == 0.5
    assert compare(["a"], []).word_accuracy == 0
    with pytest.raises(ValueError, match="has no words"):
        compare(["!"], ["a"])


def test_an_exact_match_is_of_lines_in_order():
    assert compare(["Grand Opening", "Today"], ["GRAND OPENING!", "", "today"]).is_exact
    assert not compare(["Grand Opening", "Today"], ["today", "grand opening"]).is_exact
    assert not compare(["Grand Opening"], ["grand", "opening"]).is_exact


def test_the_edit_distance_is_levenshteins_over_the_longer_text():
    assert edit_distance("kitten", "sitting") == pytest.approx(3 / 7)
    assert edit_distance("sitting", "kitten") == pytest.approx(3 / 7)
    assert (edit_distance("", ""), edit_distance("", "ab"), edit_distance("ab", "ab")) == (0, 1, 0)
    assert compare(["Grand Opening"], ["grand", "openin"]).edit_distance == pytest.approx(1 / 13)
