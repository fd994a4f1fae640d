"""The words of a text in any script. Curation and the scores of answers compare texts by them.

Words are those of Unicode Standard Annex #29 ("Unicode Text Segmentation", section 4), with these changes:

- Scripts without spaces between words are cut into what is written as one sign: Han, kana and Bopomofo into characters,
  Thai, Lao, Khmer, Burmese and the like (line break class SA) into grapheme clusters. Their words need a dictionary.
- Underscores and colons separate words, and so do full stops between letters and semicolons between digits. The annex
  allows this. A prompt that continues directly after one of them still contains the words of a benchmark question.

- The minus of a negative number is a part of it, a percent sign after a number is a word, and C++ and C# differ from C.

Marks, such as vowel signs and accents, stay with their letter. Other punctuation and symbols are not part of words, and
invisible characters, such as the soft hyphen, do not separate them.
"""

import re
import unicodedata

import regex

from finetune_pipeline.records import normalize

# What nobody sees (of Unicode's Default_Ignorable_Code_Point): soft hyphen, zero-width space, direction marks, word
# joiner, byte order mark, fillers, variation selectors. The zero-width joiner and non-joiner stay, as they change how
# Persian, the scripts of India and emoji are read, and so do tags, by which the flags of England and Scotland differ.
_INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    r"\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0100-\U000e01ef]+"
)

# NFKC would make 102 of 10², and 21⁄2 of 2½.
_NUMBER_AFTER_DIGIT = re.compile(r"(?<=\d)(?=[²³¹⁰⁴-⁹₀-₉¼-¾⅐-⅟↉①-⒛⓪-⓿])")

# The same words as those of _UNICODE_WORD, four times as fast.
_ASCII_WORD = re.compile(
    r"(?:[a-z0-9]|(?<![\w)\]}.%-])-[0-9])[a-z0-9]*(?:(?:(?<=[a-z])'(?=[a-z])|(?<=[0-9])[.,'](?=[0-9]))[a-z0-9]+)*"
    r"(?:(?<=[a-z])(?:\+\+|#)(?![a-z0-9]))?|(?:(?<=[0-9])|(?<=[0-9] ))%"
)

_SIGNS = r"\p{Han}\p{Ideographic}\p{Hiragana}\p{Bopomofo}\p{WB=Katakana}"
_LETTERS = rf"[\p{{WB=ALetter}}\p{{WB=Hebrew_Letter}}--[{_SIGNS}]]"
_MARKS = r"\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}"
_NUMBER = rf"\p{{WB=Numeric}}[\p{{WB=Numeric}}{_MARKS}]*+"
_SIGN = rf"[{_SIGNS}] [{_MARKS}]*+ | (?=\p{{LB=SA}}) \X"
_UNICODE_WORD = regex.compile(
    rf"""(?xV1)
    [a-z0-9]++(?=[\ ?])   # most words of most texts, only to be faster
  | {_SIGN}
  | (?: (?<![\w)\]}}.%-])-(?=\p{{WB=Numeric}}) )?
    (?: {_LETTERS}[{_LETTERS}{_MARKS}]*+
        (?: (?: [\p{{WB=MidLetter}}\p{{WB=MidNumLet}}'--[:.]]
              | (?<=\p{{WB=Hebrew_Letter}})"(?=\p{{WB=Hebrew_Letter}})
            ) [{_MARKS}]*+ {_LETTERS}[{_LETTERS}{_MARKS}]*+ )*+
      | {_NUMBER} (?: [\p{{WB=MidNum}}\p{{WB=MidNumLet}}'--[;]] [{_MARKS}]*+ {_NUMBER} )*+
    )++ (?: (?<=[a-z])(?:\+\+|\#)(?![a-z0-9]) )?
  | (?<=\p{{WB=Numeric}}\ ?)[%‰٪]
    """
)
_ONE_SIGN = regex.compile(rf"(?xV1) (?:{_SIGN})")


def visible_form(text: str) -> str:
    """Return the normalized text without invisible characters; superscripts and fractions after a digit stand apart.

    `normalize` keeps them, since hashes of its result are stored.
    """
    return normalize(text if text.isascii() else _NUMBER_AFTER_DIGIT.sub(" ", _INVISIBLE.sub("", text)))


def as_displayed(text: str) -> str:
    """Return a text in NFC without invisible characters, so that two texts that look the same are equal."""
    return text if text.isascii() else unicodedata.normalize("NFC", _INVISIBLE.sub("", text))


def words(text: str) -> list[str]:
    """Return the words of the visible form of a text; if it has none, such as emoji, its parts between spaces.

    >>> words("A 3.5 m wall can't burn; 墙厚")
    ['a', '3.5', 'm', 'wall', "can't", 'burn', '墙', '厚']
    """
    text = visible_form(text).replace("\N{MINUS SIGN}", "-")
    found: list[str] = _ASCII_WORD.findall(text) if text.isascii() else _UNICODE_WORD.findall(text)
    return found or text.split()


def is_sign(word: str) -> bool:
    """Return True if a word of a text is one sign of a script without spaces between words.

    >>> [is_sign(word) for word in ("厚", "ㄅ", "นั", "벽은", "m")]
    [True, True, True, False, False]
    """
    return not word.isascii() and _ONE_SIGN.fullmatch(word) is not None
