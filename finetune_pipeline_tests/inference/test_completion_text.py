import pytest

from finetune_pipeline.inference.completion_text import CompletionText


def feed(pieces, stop=(), **options):
    answer = CompletionText(stop, **options)
    shown = [answer.add(piece) for piece in pieces]
    return answer, [*shown, answer.finish()]


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        ([b"ab", b"c"], (), ["ab", "c", ""]),
        (["é".encode()[:1], "é".encode()[1:]], (), ["", "é", ""]),  # a character in two tokens
        ([b"a", "é".encode()[:1]], (), ["a", "", "�"]),  # cut off within a character
        ([b"a", b"EN", b"D", b"z"], ("END",), ["a", "", "", "", ""]),  # nothing of a stop text, nothing after it
        ([b"a", b"EN", b"z"], ("END",), ["a", "", "ENz", ""]),  # it was none after all
        ([b"a", b"EN"], ("END",), ["a", "", "EN"]),  # the end comes first
        ([b"one two"], ("two", "ne"), ["o", ""]),  # the first of several
        ([b"EEEND"], ("EEND",), ["E", ""]),  # it starts within itself
    ],
)
def test_only_what_is_sure_is_shown(pieces, stop, shown):
    answer, found = feed(pieces, stop)
    assert found == shown
    assert answer.text == "".join(shown)


def test_the_texts_of_the_tokens_join_to_all_that_was_said():
    answer, _ = feed([b"a", b" EN", b"D b"], ("END",))
    assert answer.token_texts == ["a", " EN", "D b"]
    assert answer.text == "a "


def test_the_dummy_space_of_the_first_token_goes_when_asked():
    assert feed([b" Once", b" upon"], strip_space=True)[0].text == "Once upon"
