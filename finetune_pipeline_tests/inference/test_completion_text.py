import pytest

from finetune_pipeline.inference.completion_text import CompletionText


def feed(tokens, stop=(), **options):
    answer = CompletionText(stop, **options)
    returned = [answer.add(token) for token in tokens]
    return answer, [*returned, answer.finish()]


@pytest.mark.parametrize(
    ("tokens", "stop", "returned"),
    [
        ([b"ab", b"c"], (), ["ab", "c", ""]),
        (["é".encode()[:1], "é".encode()[1:]], (), ["", "é", ""]),  # a character in two tokens
        ([b"a", "é".encode()[:1]], (), ["a", "", "�"]),  # cut off within a character
        ([b"a", b"EN", b"D", b"z"], ("END",), ["a", "", "", "", ""]),  # neither the stop text nor the text after it
        ([b"a", b"EN", b"z"], ("END",), ["a", "", "ENz", ""]),  # not a stop text after all
        ([b"a", b"EN"], ("END",), ["a", "", "EN"]),  # the completion ends first
        ([b"one two"], ("two", "ne"), ["o", ""]),  # the first of several
        ([b"EEEND"], ("EEND",), ["E", ""]),  # its start repeats
    ],
)
def test_only_final_text_is_returned(tokens, stop, returned):
    answer, found = feed(tokens, stop)
    assert found == returned
    assert answer.text == "".join(returned)


def test_the_token_texts_include_the_stop_text():
    answer, _ = feed([b"a", b" EN", b"D b"], ("END",))
    assert answer.token_texts == ["a", " EN", "D b"]
    assert answer.text == "a "


def test_the_space_of_the_first_token_can_be_stripped():
    assert feed([b" Once", b" upon"], strip_space=True)[0].text == "Once upon"
