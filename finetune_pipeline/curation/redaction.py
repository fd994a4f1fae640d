"""Redaction: replace secrets and personal data by placeholders before an example can reach a dataset.

A placeholder is the kind in capitals, such as `[SECRET]` or `[EMAIL]`; further values of the kind in the same example
are `[EMAIL_2]`, `[EMAIL_3]`. The kinds are settings (`curation.redaction`).
What has the form of a kind, or its name before it, is found by `secret_patterns` and `personal_data`. A value that is
found in one text of an example is also replaced in the others, where it may stand without its name. Ordinary text only
costs the quick look of `_suspicious`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from finetune_pipeline.curation.found_values import FoundValues
from finetune_pipeline.curation.personal_data import (
    has_numbers,
    is_card,
    is_named,
    is_phone_under,
    replace_addresses,
    replace_emails,
    replace_numbers,
)
from finetune_pipeline.curation.secret_patterns import is_secret_under, may_have_seed, names_a_wallet, replace_secrets
from finetune_pipeline.records import Example
from finetune_pipeline.settings import RedactionSettings

_JSON_TOKEN = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"(?P<colon>\s*:)?|(?<![\w.+-])(?P<number>\d{6,19})(?![\w.+-])')

# Without any of these (in lower case), a long word or digits, a text has nothing to redact. `\u00` may be an escaped
# character in JSON, and `\uff20` is the full-width @ of East Asian keyboards.
_HINTS = (
    "@", "＠", "pwd", "secret", "token", "key", "credential", "bearer", "authorization", "sk-", "sk_", "rk_", "ya29",
    "akia", "asia", "eyj", "xox", "sg.", "hvs.", "hvb.", "8q~", "sig=", "signature", "curl", "pw:", '"pw"', 'auth"',
    "machine ", "sécu", "securite sociale", "national insurance", "паспорт", "护照", "mnemonic", "recovery", "wallet",
    "seed:", "seed phrase", "seed is", "seed word", "bip39", "cookie:", "mysql", "sshpass", "private-lines",
    "personalausweis", "\\u00", "\\uff20", "login -", "%40", "&#64;", "&#x40;", "(at)", "[at]", "{at}", "<at>", " dot ",
    "mot de passe", "mdp", "contrase", "senha", "palavra-", "wachtwoord", "kennwort", "lösenord", "adgangskode",
    "salasana", "hasło", "haslo", "heslo", "jelszó", "parola", "şifre", "пароль", "密码", "密碼", "パスワード",
    "비밀번호", "cvv", "cvc", "pin:", "pin :", "pin is", "pin ist", "pin was", "pin code", "pin-code", "pin lautet",
    '"pin"',
)  # fmt: skip
_PASS = re.compile(r"pass(?:[wpc]|nummer|[ -]?nr|eport|aport)|reisepass|pasaporte")
_LOWER_PAN = re.compile(r"[a-z]{5}\d{4}[a-z]")
_PGPASS = re.compile(r":(?:\d{4,5}|\*):[A-Za-z_*]")
_LONG_WORD = re.compile(r"(?<![\w/+-])[\w/+-]{24}")
_FOUR_DIGITS = re.compile(r"\d(?:\D{0,12}\d){3}")
_ADDRESS = re.compile(r"(?:[0-9a-fA-F]{1,4}[:.-]){2}|::")


@dataclass(frozen=True)
class Redacted:
    """A text without secrets and personal data, and how many were replaced, by kind."""

    text: str
    counts: Mapping[str, int] = field(default_factory=dict)


def redact(text: str, settings: RedactionSettings) -> Redacted:
    """Replace secrets and personal data by placeholders; redacting the result again changes nothing.

    JSON stays JSON: strings keep their quotes, and a card number without quotes becomes a string.
    """
    (clean,), counts = redact_texts([text], settings)
    return Redacted(clean, counts)


def redact_texts(texts: Sequence[str], settings: RedactionSettings) -> tuple[list[str], dict[str, int]]:
    """Redact the texts of one example; also return what was replaced, by kind.

    A value that is found in one of them is replaced in all of them, by the same placeholder. Placeholders are numbered
    in the order of the texts.
    """
    kinds = settings.kinds
    if not any(_suspicious(text, kinds) for text in texts):
        return list(texts), {}
    found = FoundValues(
        kinds,
        texts,
        names_a_wallet="secret" in kinds and any(map(names_a_wallet, texts)),
        phone_regions=settings.phone_regions,
    )
    clean = list(texts)
    # Repeat until nothing changes. Each pass removes text and adds only placeholders, so this ends.
    while (changed := _replaced(clean, found)) != clean:
        clean = changed
    return found.numbered(clean), dict(sorted(found.counts.items()))


def redact_example(example: Example, settings: RedactionSettings) -> tuple[Example, dict[str, int]]:
    """Redact the prompt, answers, history and provenance of an example; also return what was replaced, by kind."""
    outputs = [] if example.output == example.target else [example.output]
    provenances = [example.provenance] if example.provenance else []  # a heading, path or key may hold an address
    turns = [turn.content for turn in example.history]
    clean, counts = redact_texts([*turns, example.prompt, example.target, *outputs, *provenances], settings)
    if not counts:
        return example, {}
    contents, (prompt, target, *rest) = clean[: len(turns)], clean[len(turns) :]
    changes = {
        "prompt": prompt,
        "target": target,
        "history": tuple(
            turn.model_copy(update={"content": content})
            for turn, content in zip(example.history, contents, strict=True)
        ),
        "output": rest[0] if outputs else target,
        "provenance": rest[-1] if provenances else example.provenance,
    }
    return example.model_copy(update=changes), counts


def _suspicious(text: str, kinds: frozenset[str]) -> bool:
    lowered = text.lower()
    for hint in _HINTS:
        if hint in lowered:
            return True
    if "pas" in lowered and _PASS.search(lowered) is not None:
        return True
    if ("pan" in lowered or "permanent account" in lowered) and _LOWER_PAN.search(lowered) is not None:
        return True
    if "secret" in kinds and may_have_seed(text):
        return True
    if has_numbers(text) or _LONG_WORD.search(text) is not None or _PGPASS.search(text) is not None:
        return True
    return not kinds.isdisjoint({"ipv4", "ipv6", "mac"}) and _ADDRESS.search(text) is not None


def _replaced(texts: Sequence[str], found: FoundValues) -> list[str]:
    """Replace what each text shows, then the same values where they stand without context."""
    clean = []
    for index, text in enumerate(texts):
        found.start_text(index)
        clean.append(_once(text, found))
    if found.counts:
        for index, text in enumerate(clean):
            found.start_text(index)
            if (pattern := found.again(text)) is not None:
                clean[index] = _values_again(text, pattern, found)
    return clean


def _once(text: str, found: FoundValues) -> str:
    if not _is_json(text):
        return _in_text(text, found)

    def number(key: str, digits: str) -> str:
        if is_card(digits):
            return found.replace("card", digits)
        # A shorter number without a name may count anything.
        known = len(digits) >= 15 or is_phone_under(key, digits) or is_named(key)
        return _under_key(key, digits, found) if known else digits

    return _in_json(text, lambda key, value: _under_key(key, value, found), number)


def _values_again(text: str, pattern: re.Pattern[str], found: FoundValues) -> str:
    def replaced(text: str) -> str:
        return pattern.sub(lambda match: found.replace(str(match.lastgroup), match[0]), text)

    return (
        _in_json(text, lambda key, value: replaced(value), lambda key, digits: replaced(digits))
        if _is_json(text)
        else replaced(text)
    )


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in {"{", "[", '"'}:
        return False
    try:
        json.loads(text, parse_int=str)  # a number of thousands of digits is JSON too
    except (ValueError, RecursionError):
        return False
    return True


def _in_json(text: str, clean_string: Callable[[str, str], str], clean_number: Callable[[str, str], str]) -> str:
    """Clean each string of a JSON text by itself, with the key it belongs to, and each long number without quotes."""
    key = ""

    def clean(match: re.Match[str]) -> str:
        nonlocal key
        if match["number"]:
            cleaned = clean_number(key, match["number"])
            return match[0] if cleaned == match["number"] else f'"{cleaned}"'
        literal, colon = f'"{match["text"]}"', match["colon"] or ""
        value = json.loads(literal, strict=False)
        cleaned = clean_string("", value) if colon else clean_string(key, value)
        if colon:
            key = value
        if cleaned == value:
            return match[0]
        return json.dumps(cleaned, ensure_ascii=literal.isascii() or "\\u" in literal) + colon

    return _JSON_TOKEN.sub(clean, text)


_KEY_WORDS = re.compile(r"[_-]|(?<=[a-z])(?=[A-Z])")


def _under_key(key: str, value: str, found: FoundValues) -> str:
    if "secret" in found.kinds and is_secret_under(key, value):
        return found.replace("secret", value)
    if "phone" in found.kinds and is_phone_under(key, value):
        return found.replace("phone", value)
    if key and any(character.isdigit() for character in value):
        before = f"{_KEY_WORDS.sub(' ', key)}: "
        cleaned = replace_numbers(before + value, found)
        if cleaned.startswith(before):
            value = cleaned[len(before) :]
    return _in_text(value, found)


def _in_text(text: str, found: FoundValues) -> str:
    if not found.names_a_wallet and not _suspicious(text, found.kinds):
        return text
    if "secret" in found.kinds:
        text = replace_secrets(text, found)
    text = replace_emails(text, found)
    text = replace_addresses(text, found)
    return replace_numbers(text, found) if _FOUR_DIGITS.search(text) or is_named(text) else text
