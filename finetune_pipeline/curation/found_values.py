"""The values that redaction found in the texts of one example, and their placeholders."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from itertools import count

PLACEHOLDER = re.compile(
    r"\[(?P<kind>SECRET|EMAIL|PHONE|CARD|IBAN|SSN|AADHAAR|PAN|NIR|STEUER_ID|PASSPORT|NATIONAL_ID|IPV4|IPV6|MAC)"
    r"(?:_\d{1,6})?\]"
)

# CJK text without spaces and Markdown's emphasis may stand directly next to a value.
START = r"(?:(?<=\\[nrtbf])|(?<![A-Za-z0-9\\]))"  # of a word; in escaped text, the n of \n is not part of it

_SHORTEST = 6  # a shorter value is only replaced where its context shows what it is
_NUMBERS = frozenset({"phone", "card", "iban", "ssn", "aadhaar", "pan", "nir", "steuer_id", "passport", "national_id"})
_NO_SIGN = re.compile(r"[^A-Za-z0-9]")
_SPACE_WITHIN = r"[ \u00a0\u2009\u202f()./-]{0,3}"  # of numbers, which are written in many ways
_AT = re.compile(r"＠|%40|&#(?:64|x40);|\s?[\[({<]\s?at\s?[\])}>]\s?|\sat\s")
_DOT = re.compile(r"\s?[\[({<]\s?dot\s?[\])}>]\s?|\sdot\s")


class _Unused(dict[str, Iterator[str]]):
    """The placeholders of each kind, in order, without those that stand in the texts."""

    def __init__(self, in_texts: Collection[str]) -> None:
        super().__init__()
        self._in_texts = in_texts

    def __missing__(self, kind: str) -> Iterator[str]:
        numbered = (f"[{kind}]" if number == 1 else f"[{kind}_{number}]" for number in count(1))
        self[kind] = (placeholder for placeholder in numbered if placeholder not in self._in_texts)
        return self[kind]


class FoundValues:
    """Counts the replacements by kind, and remembers the values, which may stand in other texts without their context.

    Each value has one placeholder in all texts, whatever its form.

    Args:
        kinds: the kinds to replace, the fields of `settings.RedactionSettings`.
        texts: the texts of the example; placeholders that stand in them are given to no value.
        names_a_wallet: one of the texts speaks of what has a seed phrase, so twelve words may be one.
        phone_regions: countries whose national phone numbers are found, too.
    """

    def __init__(
        self,
        kinds: Collection[str],
        texts: Sequence[str],
        *,
        names_a_wallet: bool = False,
        phone_regions: Sequence[str] = (),
    ) -> None:
        self.kinds = frozenset(kinds)
        self.counts: Counter[str] = Counter()
        self._in_texts = {match[0] for text in texts for match in PLACEHOLDER.finditer(text)}
        self._placeholders: dict[str, str] = {}  # a value without its form -> its placeholder
        self._unused = _Unused(self._in_texts)
        self._phones: defaultdict[str, list[str]] = defaultdict(list)  # last seven digits -> the numbers
        self._values: dict[str, tuple[str, set[int]]] = {}  # value -> its kind, and the texts where it was found
        self._text = 0
        self.names_a_wallet = names_a_wallet
        self.phone_regions = phone_regions

    def start_text(self, index: int) -> None:
        """Begin with the text at this index."""
        self._text = index

    def replace(self, kind: str, value: str) -> str:
        """Return the placeholder of a value, or the value itself if its kind is not to be replaced."""
        if kind not in self.kinds:
            return value
        self.counts[kind] += 1
        if not PLACEHOLDER.search(value):
            self._values.setdefault(value, (kind, set()))[1].add(self._text)
        same = self._without_form(kind, value)
        if same not in self._placeholders:
            self._placeholders[same] = next(self._unused[kind.upper()])
        return self._placeholders[same]

    def numbered(self, texts: Sequence[str]) -> list[str]:
        """Return the redacted texts with the placeholders of each kind numbered as they come: `[EMAIL]`, `[EMAIL_2]`.

        Until then they have the order in which the patterns found the values.
        """
        own = set(self._placeholders.values())
        unused = _Unused(self._in_texts)
        numbered: dict[str, str] = {}

        def one(match: re.Match[str]) -> str:
            if match[0] in own and match[0] not in numbered:
                numbered[match[0]] = next(unused[match["kind"]])
            return numbered.get(match[0], match[0])

        return [PLACEHOLDER.sub(one, text) for text in texts]

    def _without_form(self, kind: str, value: str) -> str:
        """Return what is the same in all forms of a value: the characters of a number without its signs."""
        if kind not in _NUMBERS and kind != "mac":
            return value if kind == "secret" else _DOT.sub(".", _AT.sub("@", value.lower()))
        signs = _NO_SIGN.sub("", value.lower())
        if kind != "phone":
            return signs
        # With the code of the country, maybe with (0) after it, or with the zero that stands for it.
        number = signs.lstrip("0")
        if "+" in value or signs.startswith("00"):
            import phonenumbers

            with suppress(phonenumbers.NumberParseException):  # a number that only a name in front of it shows
                parsed = phonenumbers.parse(f"+{number}")
                number = f"{parsed.country_code}{phonenumbers.national_significant_number(parsed)}"
        for known in self._phones[number[-7:]]:
            if known.endswith(number) or number.endswith(known):
                return known
        self._phones[number[-7:]].append(number)
        return number

    def replace_matches(
        self, pattern: re.Pattern[str], text: str, kind: str, found: Callable[[re.Match[str], str], bool] | None = None
    ) -> str:
        """Replace the named group that matched (not `name`) or else the whole match, and keep the text around it.

        Args:
            found: decides on a match and its value; without it, every match counts.
        """

        def one(match: re.Match[str]) -> str:
            group: str | int = next(
                (g for g, value in match.groupdict().items() if value is not None and g != "name"), 0
            )
            if found is not None and not found(match, match[group]):
                return match[0]
            start, end = match.start(group) - match.start(), match.end(group) - match.start()
            return match[0][:start] + self.replace(kind, match[group]) + match[0][end:]

        return pattern.sub(one, text)

    def again(self, text: str) -> "re.Pattern[str] | None":
        """Return a pattern of the values that a text still has, where they stand without context.

        It has a group for each kind. A password that is a plain word is left alone in the text where it was found, in
        which the word may be a name.
        """
        lowered = text.lower()
        signs = _NO_SIGN.sub("", lowered)
        by_kind: dict[str, list[str]] = {}
        for value, (kind, texts) in sorted(self._values.items(), key=lambda item: (-len(item[0]), item[0])):
            # A quick look first: a pattern of thousands of values would be slow.
            is_there = value.lower() in lowered or (kind in _NUMBERS and _NO_SIGN.sub("", value.lower()) in signs)
            long_enough = len(value) >= (4 if any(c.isdigit() for c in value) else _SHORTEST)
            if is_there and long_enough and not (value.isalpha() and self._text in texts):
                by_kind.setdefault(kind, []).append(_pattern_of(value, kind))
        if not by_kind:
            return None
        groups = "|".join(f"(?P<{kind}>{'|'.join(patterns)})" for kind, patterns in by_kind.items())
        return re.compile(rf"(?:(?<=\\[nrtbf])|(?<![A-Za-z0-9]))(?:{groups})(?![A-Za-z0-9])")


def _pattern_of(value: str, kind: str) -> str:
    signs = _NO_SIGN.sub("", value)
    if kind in _NUMBERS and len(signs) >= _SHORTEST:
        return rf"(?:\+|\()?(?i:{_SPACE_WITHIN.join(signs)})"
    return re.escape(value) if kind == "secret" else f"(?i:{re.escape(value)})"
