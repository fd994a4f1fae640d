"""Words in many scripts, and what compares texts by them: repetition, decontamination, ROUGE-1."""

from unicodedata import category

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_pipeline import words as module
from finetune_pipeline.curation.acceptance import repeated_fraction
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.evaluation.metrics.text import count_words
from finetune_pipeline.words import words

# In each script: a question, its words, and an answer next to one that differs by a mark or a character only.
SCRIPTS = {
    "Latin": ("What's the façade's U-value?", "what's the façade's u value", ("résumé wall", "resume wall")),
    "Cyrillic": ("Какая толщина стены й?", "какая толщина стены й", ("мой дом", "мои дом")),
    "Han": ("墙有多厚？", "墙 有 多 厚", ("墙厚二百毫米", "墙厚三百毫米")),
    "kana": ("カベの厚さガは", "カ ベ の 厚 さ ガ は", ("かべはがある", "かべはかある")),
    "Hangul": ("이 벽은 두께가 얼마?", "이 벽은 두께가 얼마", ("벽 두께", "벽 두개")),
    "Thai": ("ผนังหนาเท่าไร", "ผ นั ง ห น า เ ท่ า ไ ร", ("ดี มา", "ดู มา")),
    "Lao": ("ຝາໜາເທົ່າໃດ", "ຝ າ ຫ ນ າ ເ ທົ່ າ ໃ ດ", ("ດີ ຝາ", "ດູ ຝາ")),
    "Khmer": ("ជញ្ជាំងក្រាស់", None, ("ទឹក ដី", "ទូក ដី")),
    "Burmese": ("နံရံဘယ်လောက်ထူ", None, ("ကို မြို့", "ကူ မြို့")),
    "Devanagari": ("दीवार कितनी मोटी है?", "दीवार कितनी मोटी है", ("मोटी दीवार", "मोटा दीवार")),
    "Bengali": ("এই দেয়াল কত পুরু?", "এই দেয়াল কত পুরু", ("পুরু দেয়াল", "পুরি দেয়াল")),
    "Tamil": ("இந்த சுவர் எவ்வளவு தடிமன்?", "இந்த சுவர் எவ்வளவு தடிமன்", ("சுவர் மேல்", "சுவரி மேல்")),
    "Arabic": ("ما هو سُمك الجدار؟", "ما هو سُمك الجدار", ("جدار كَتَبَ", "جدار كُتِبَ")),
    "Hebrew": ('מה עובי הקיר, 20 ס"מ?', 'מה עובי הקיר 20 ס"מ', ("קיר בֵּית", "קיר בַּיִת")),
}


def nfkc(text):
    return module.normalize(text)


@pytest.mark.parametrize("script", [name for name, (_, expected, _) in SCRIPTS.items() if expected is not None])
def test_words(script):
    question, expected, _ = SCRIPTS[script]
    assert words(question) == nfkc(expected).split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_letter_or_mark_is_lost(script):
    question = nfkc(SCRIPTS[script][0])
    assert "".join(words(question)) == "".join(c for c in question if category(c)[0] in "LMN" or c in "'\"")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_answer_that_differs_by_a_mark_is_wrong(script):
    right, wrong = SCRIPTS[script][2]
    correct, total = count_words(right, right)
    assert correct == total >= 2
    assert count_words(right, wrong)[0] < total


@pytest.mark.parametrize(
    ("right", "wrong"), [("-5 mm", "5 mm"), ("−5 °C", "5 °C"), ("10 %", "10"), ("in C++", "in C#"), ("in C#", "in C")]
)
def test_an_answer_that_differs_by_a_sign_is_wrong(right, wrong):
    assert count_words(right, wrong)[0] < count_words(right, right)[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_repeated_answer_is_found(script):
    question = SCRIPTS[script][0]
    assert repeated_fraction(question * 12) > 0.8
    assert repeated_fraction(question) == 0.0


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "around", ["{}", "Please answer: {}. Thank you very much.", "(2) {} / 100 mm", "请{}谢谢你", "ขอ{}ครับ"]
)
def test_a_short_question_is_found_within_a_longer_prompt(script, around):
    question = SCRIPTS[script][0]
    index = NearIndex({"q": question})
    assert index.contains(around.format(question))
    assert not index.contains(around.format("another question of someone else"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.5 m, 1,200 mm, 1'000, EI-120, 3.5mm", ["3.5", "m", "1,200", "mm", "1'000", "ei", "120", "3.5mm"]),
        ("can't; l’eau d'une 'quoted'", ["can't", "l’eau", "d'une", "quoted"]),
        (
            "Question:what is it.Next door_type a;b 1;2",
            ["question", "what", "is", "it", "next", "door", "type", "a", "b", "1", "2"],
        ),
        ("Ｆｕｌｌ １２ ﾊﾟ", ["full", "12", "パ"]),
        (
            "-5 mm, (-3.5), x=-2, −7, 5-10, EI -120, 2024-01-15, a-1",
            [
                "-5",
                "mm",
                "-3.5",
                "x",
                "-2",
                "-7",
                "5",
                "10",
                "ei",
                "-120",
                "2024",
                "01",
                "15",
                "a",
                "1",
            ],
        ),
        ("10%, 10 %, 5‰ and 100 % %", ["10", "%", "10", "%", "5", "‰", "and", "100", "%"]),
        ("C++ or c#, #1, a+b, i++;", ["c++", "or", "c#", "1", "a", "b", "i++"]),
        ("ㄅㄆㄇ aㄅb 人々a", ["ㄅ", "ㄆ", "ㄇ", "a", "ㄅ", "b", "人", "々", "a"]),
        ("soft\u00adware \ufeffa\u200bb \u202bשלום\u202c", ["software", "ab", "שלום"]),  # invisible characters
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # the non-joiner is a part of the word
        ("👍 !!", ["👍", "!!"]),  # no words at all
        ("", []),
    ],
)
def test_words_of_mixed_text(text, expected):
    assert words(text) == expected


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="az09AZ_.,:;'\"- \n?%+#)é中", max_size=20))
def test_ascii_text_has_the_same_words_on_the_fast_path(text):
    text = nfkc(text.encode("ascii", "ignore").decode())
    assert module._ASCII_WORD.findall(text) == module._UNICODE_WORD.findall(text)


@pytest.mark.parametrize(
    "text", ["!" * 300, "a" * 300, "The answer is " + "=-" * 200, "🙂" * 100, "哈" * 60, "0," * 100]
)
def test_endless_words_and_symbols_repeat_themselves(text):
    assert repeated_fraction(text) > 0.8


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/" + "/".join(f"part{n}of{n * n}" for n in range(40)),
        "sha512-" + "".join(f"{n * 7919 % 65_521:04x}" for n in range(64)),
        '{"type":"wall","thickness_mm":150,"layers":["brick","insulation","plaster"],"fire_rating":"EI 120"}',
    ],
)
def test_long_words_that_do_not_repeat_are_kept(text):
    assert repeated_fraction(text) < 0.1
