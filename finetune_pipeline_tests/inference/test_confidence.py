import math

import pytest

from finetune_pipeline.inference.confidence import confidence, value_spans

SURE = 0.99


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # tokens as (text, probability)
        ([], None),
        ([("a wall", 0.9), (" of brick", 0.6)], 0.6),  # a text is one value
        ([("42", 0.7)], 0.7),  # a bare scalar too
        ([('{"', 0.1), ("width", 0.2), ('":', 0.3), ("150", 0.8), ("}", 0.1)], 0.8),  # keys and brackets do not count
        ([('{"a": ', SURE), ("1", 0.9), ("5", 0.5), ("0", 0.9), ("}", SURE)], 0.5),  # the least certain digit counts
        ([('{"a": "', 0.1), ("red", 0.8), ('"}', 0.1)], 0.8),  # quotes do not count
        ([('{"a": ', SURE), ("true", 0.4), (', "b": ', 0.1), ("null", 0.6), ("}", 0.1)], 0.4),
        ([("[", 0.1), ('"x"', 0.7), (", ", 0.1), ("[2]", 0.6), ("]", 0.1)], 0.6),  # nested arrays
        ([('{"a": "', SURE), ("b\\", 0.5), ('"c', 0.9), ('"}', 0.1)], 0.5),  # an escaped quote does not end a string
        ([('{"a": "', 0.1), ("x: {", 0.5), ('"}', 0.1)], 0.5),  # punctuation within a string is a value
        ([('{"a": "', 0.1), ('"', 0.3), ("}", 0.1)], 0.3),  # for an empty string, the closing quote counts
        ([("{}", 0.9)], 0.9),  # no values: all tokens
        ([('{"a": ', 0.9), ("15", 0.2)], 0.2),  # truncated JSON is a text
        ([('["', SURE), ("", 0.3), ("é", 0.9), ('"]', SURE)], 0.3),  # the first part of a character counts too
        ([(' { "a" :', 0.1), (" -1.5e3", 0.7), (" } ", 0.1)], 0.7),  # white space
    ],
)
def test_confidence_is_the_lowest_probability_of_a_value_token(tokens, expected):
    texts = [text for text, _ in tokens]
    found = confidence("".join(texts), texts, [math.log(probability) for _, probability in tokens])
    assert found == (None if expected is None else pytest.approx(expected))


def test_tokens_after_the_completion_do_not_count():
    assert confidence("[1]", ["[", "1", "]", " stop"], [-0.1, -0.2, -0.1, -9.0]) == pytest.approx(math.exp(-0.2))


def test_value_spans_are_the_scalar_values():
    text = '{"a": {"b": ["x", 12, true]}, "c": ""}'
    assert [text[start:end] for start, end in value_spans(text)] == ["x", "12", "true", '"']
