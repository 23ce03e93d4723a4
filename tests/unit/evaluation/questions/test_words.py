from __future__ import annotations

import pytest

from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark
from bitdance_scale.evaluation.questions.words import compare, edit_distance, quoted_texts, words_of
from tests.benchmark_data import benchmark_data


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


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('The title reads "The Impact of 5G", and "Urban Areas".', ["The Impact of 5G", "Urban Areas"]),
        (
            "\u6807\u9898\u4e3a\u201c5G\u6280\u672f\u201d\uff0c\u4e0e\u300c\u4f60\u597d\u300d",
            ["5G\u6280\u672f", "\u4f60\u597d"],
        ),
        ("\u300eA \u201cB\u201d C\u300f \u00abD\u00bb \u201eE\u201c", ["A \u201cB\u201d C", "D", "E"]),
        ("the dog's sign says 'don't walk,' near the cats' tree", ["don't walk,"]),
        ("a sign \u2018Open\u2019 at Joe\u2019s and the boys\u2019 house", ["Open"]),
        ("the film \u300a\u6d3b\u7740\u300b, the dogs' and cats' 12\" bowl", []),
        ('"" and " " and "A"', ["A"]),
    ],
)
def test_texts_in_quotes(prompt, texts):
    assert quoted_texts(prompt) == texts


def test_texts_that_published_prompts_ask_for():
    # Of the 200 prompts on text, English and Chinese, those with quotes; the others, such as those of whole pages of
    # papers, have none, or name a title in double angle brackets.
    for name, language, expected in (("OneIG-Bench.csv", "en", 193), ("OneIG-Bench-ZH.csv", "zh", 193)):
        prompts = find_benchmark(f"oneig-{language}").read(benchmark_data(name))
        texts = [quoted_texts(prompt.text) for prompt in prompts if prompt.category == "Text_Rendering"]
        assert (len(texts), sum(map(bool, texts))) == (200, expected)
        assert texts[0][0] == {"en": "The Impact of 5G Technology", "zh": "5G\u6280\u672f\u7684\u5f71\u54cd"}[language]
