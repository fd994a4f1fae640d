"""Redaction: replace secrets and personal data by placeholders before an example can reach a dataset.

It finds keys, tokens and passwords (`[SECRET]`), e-mail addresses (`[EMAIL]`), phone numbers (`[PHONE]`) and payment
card numbers (`[CARD]`). Well-known tokens are found by the patterns of detect-secrets (without its entropy plugins,
which match ordinary text) and by some that it lacks; phonenumbers validates international phone numbers. Ordinary text
only costs the quick look of `_suspicious`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from finetune_pipeline.records import Example

_PLACEHOLDER = re.compile(r"\[(?:SECRET|EMAIL|PHONE|CARD)\]")
_JSON_TOKEN = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"(?P<colon>\s*:)?|(?<![\w.+-])(?P<number>\d{14,19})(?![\w.+-])')

# Without any of these (in lower case), a text has no secret. `\u00` may be an escaped character in JSON, and `\uff20`
# is the full-width @ of East Asian keyboards.
_HINTS = (
    "@", "＠", "passw", "passp", "passc", "pwd", "secret", "token", "key", "credential", "bearer", "authorization",
    "sk-", "sk_", "rk_", "hf_", "github_pat", "aiza", "ya29", "akia", "asia", "eyj", "xox", "xapp-", "whsec_",
    "hooks.slack", "sg.", "hvs.", "sig=", "signature", "curl", "pw:", '"pw"', "\\u00", "\\uff20",
)  # fmt: skip
_LONG_WORD = re.compile(r"(?<![\w-])[\w-]{24}")
_MANY_DIGITS = re.compile(r"\d(?:[ ().\u00a0\u2009\u202f/-]{0,3}\d){6}")

# CJK text without spaces and Markdown's emphasis may stand directly next to a secret.
_START = r"(?:(?<=\\[nrtbf])|(?<![A-Za-z0-9\\]))"  # of a word; in escaped text, the n of \n is not part of it
_NUMBER = r"(?:(?<=\\[nrtbf])|(?<![A-Za-z0-9.+-]))"  # before a number
_NUMBER_ENDS = r"(?![A-Za-z0-9^=-]|_\w|\*{1,3} ?[A-Za-z0-9])"
_BLANK = " \u00a0\u2009\u202f"
_TOKENS = re.compile(
    _START
    + r"""(?:
        sk-(?:proj|svcacct|admin|None|ant|or|lf)-[A-Za-z0-9_-]{16,}   # OpenAI, Anthropic, OpenRouter, Langfuse
      | sk-[A-Za-z0-9]{32,}                                           # OpenAI's older form, DeepSeek
      | [sr]k_(?:live|test)_[A-Za-z0-9]{16,} | whsec_[A-Za-z0-9+/=]{24,}   # Stripe
      | hf_[A-Za-z0-9]{30,} | api_org_[A-Za-z0-9]{30,}                # Hugging Face
      | github_pat_[A-Za-z0-9_]{22,}                                  # GitHub, fine-grained
      | AIza[A-Za-z0-9_-]{35} | ya29\.[A-Za-z0-9_-]{20,} | GOCSPX-[A-Za-z0-9_-]{20,}   # Google
      | gsk_[A-Za-z0-9]{40,} | xai-[A-Za-z0-9]{40,} | nvapi-[A-Za-z0-9_-]{40,} | r8_[A-Za-z0-9]{30,}
      | npm_[A-Za-z0-9]{36} | hvs\.[A-Za-z0-9_-]{20,} | dop_v1_[a-f0-9]{64} | shp(?:at|ss|ca)_[a-fA-F0-9]{32}
      | xapp-[A-Za-z0-9-]{20,} | dapi[a-f0-9]{32} | AKC[A-Za-z0-9]{20,}
      | eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]*)?     # JSON Web Token
    )""",
    re.VERBOSE,
)
_REST_OF_TOKEN = re.compile(r"[A-Za-z0-9_-]*")  # newer tokens are longer than the patterns
_OPENAI = "T3BlbkFJ"  # in every key of the older form
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?P<body>(?:(?!-----)[^\"])*)"
    r"(?P<end>-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)?"
)
_KEY_LINE = re.compile(r"[A-Za-z0-9+/=]{16}")
_KEY_LINES = re.compile(r"(?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{16,})+")
_AUTHORIZATION = re.compile(
    r"(?i)\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)\s+(?P<value>[\w.~+/=-]{8,})"
)
_BEARER = re.compile(_START + r"(?i:bearer)\s+(?P<value>(?=[\w.~+/=-]{0,60}\d)[\w.~+/=-]{20,})")
_IN_URL = re.compile(r"://[^\s/:@\"'<>\\]{0,100}:(?P<value>[^\s@/\"'<>\\]{1,200})@")
_IN_QUERY = re.compile(
    r"(?i)[?&](?:[\w-]{0,30}(?:key|token|secret|password)|sig|signature|pwd)=(?P<value>[^\s&\"'#<>${}\\]{8,})"
)
_IN_CONNECTION = re.compile(  # strings of ADO.NET and JDBC (semicolons) and of libpq (spaces)
    r"(?i)(?:;|\w=[^\s,;()\"']{1,200}\s)(?:password|pwd)=(?P<value>[^\s;,()\"'\\]{1,200})"
    r"|(?<![\w.])(?:password|pwd)=(?P<first>[^\s;,()\"'\\]{1,200})(?=;\s?\w[\w ]{0,30}=|\s(?:host|user|dbname|port)=)"
)
_AWS_SECRET = re.compile(
    r"(?i)aws.{0,20}?(?:key|pwd|pw|password|pass|token|secret).{0,20}?['\"\s:=](?P<value>[0-9a-z/+]{40})(?![0-9a-z/+])"
)
_AWS_ID = r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"
_AWS_ALONE = r"(?P<value>(?<![A-Za-z0-9/+])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=]))"
_AWS_PAIRS = (
    re.compile(rf"(?s){_AWS_ID}.{{1,40}}?{_AWS_ALONE}"),
    re.compile(rf"(?s){_AWS_ALONE}.{{1,40}}?(?<![A-Za-z0-9]){_AWS_ID}"),
)

_SECRET_NAME = (
    r"(?:password|passwd|passphrase|passcode|passwort|pwd|secret|token|credentials?"
    r"|(?:api|access|private|secret|account|encryption|signing)[ _-]?key)"
)
_EMPHASIS = r"(?:\*{1,3}|_{1,2})"  # of Markdown
_SECRET_KEY = re.compile(rf"(?i)(?:.*[^a-z]|.*(?<=[a-z])(?-i:(?=[A-Z])))?{_SECRET_NAME}(?:[ _-]?\d)?")
_ASSIGNED = re.compile(
    rf"(?i)(?P<name>{_SECRET_NAME})(?:_\d)?(?:[\"'`]?\]?|{_EMPHASIS})\s{{0,3}}(?::=|=>|=|:){_EMPHASIS}?\s{{0,3}}"
    r"(?:\"(?P<double>[^\"\\\s]{4,200})\"|'(?P<single>[^'\\\s]{4,200})'|`(?P<tick>[^`\\\s]{4,200})`"
    r"|(?P<bare>[^\s\"'`,;(){}<>\[\]\\]{6,200})(?![^\s\"'`,;.)}\]<>›»\\]))"
)
_SAID = re.compile(
    r"(?i)"
    + _START
    + r"(?:(?:password|passphrase|passcode|passwort|(?:api|access|secret)[ _-]?key|token)"
    + r"(?:\s+(?:for|of|für|von)\s+[^\s:]{1,60})?(?:\s+(?:is|was|ist)\s*:?|\s*:)|pw:)\s*[\"'`]?"
    + r"(?P<said>[^\s\"'`,;]{8,100})"
)
_IN_COMMAND = re.compile(rf"(?i)(?<![\w-])--(?P<name>{_SECRET_NAME})[ =][\"']?(?P<value>[^\s\"'`$<>{{}}]{{6,200}})")
_IN_TAG = re.compile(rf"(?i)<(?P<name>{_SECRET_NAME})>(?P<value>[^\s<>$%{{}}]{{6,200}})</")
_OF_CURL = re.compile(r"\bcurl\b[^\n]{0,200}?\s(?:-u|--user)[ =][\"']?[^\s:\"']{1,60}:(?P<value>[^\s\"'`$<>{}]{4,200})")
# A plain word, also with a number after it, is a password only in a note or an environment file: after a colon or "is",
# in quotes after an equals sign, or after an upper-case name and an equals sign without spaces. In code it is a name.
_END_OF_WORD = r"(?=[\"'`]?(?:[\s\\})\]<>›»,;]|[.!?](?:\s|$)|$))"
_NOTED = re.compile(
    r"(?:[Pp]ass(?:word|wd|phrase|code)|[Pp]asswort|\b[Pp]wd)(?:[\"']?\s{0,3}:|\s(?:is|was|ist))\s{0,3}[\"'`]?"
    rf"(?P<value>[A-Za-z]{{4,40}}\d{{1,2}}){_END_OF_WORD}"
)
_QUOTED = re.compile(
    r"(?:\b|_)(?:[Pp]ass(?:word|wd|phrase|code)|[Pp]asswort|PASSWORD|[Pp]wd)\s{0,3}=\s{0,3}"
    r"(?:\"(?P<double>[a-z]{6,40}|[A-Za-z]{4,40}\d{1,2})\"|'(?P<single>[a-z]{6,40}|[A-Za-z]{4,40}\d{1,2})')"
)
_IN_ENVIRONMENT = re.compile(
    rf"(?:PASS(?:WORD|WD|PHRASE|CODE)|_PWD|_SECRET)=[\"']?(?P<value>[A-Za-z][A-Za-z0-9-]{{5,63}}){_END_OF_WORD}"
)
_PASSWORD_KEY = re.compile(r"(?i)pass(?:word|wd|phrase|code)|passwort|pwd")
_NO_PASSWORD = re.compile(  # placeholders, types, methods
    r"(?i).*(?:pass|pwd|secret|token|your|example|placeholder|redacted|hidden|value|str|text|field|input|param"
    r"|arg|var|user|name|label|line|item|required|optional|none|null|empty|undefined|default|true|false|dummy|setting"
    r"|char|byte|int|float|base|hash|sha|crypt|argon|kdf|utf|aes).*|change(?:[_-]?(?:me|it|this|now))?"
)
_CODE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+|[A-Za-z_]+\d{0,2}|\$.*|%.*|<.*>|\*+|x+")

_EMAIL = re.compile(
    r"(?:(?<=\\[nrtbf])|(?<![\w.%+\\-]))(?!git@[\w.-]+[:/])[\w%+-](?:[\w.%+-]{0,62}[\w%+-])?"
    r"[@＠](?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?!\d|_\w|-)"
)
_CARD = re.compile(rf"{_NUMBER}\d(?:[{_BLANK}-]?\d){{13,18}}(?![A-Za-z0-9-]|_\w|\.\d)")
_CARD_FORM = re.compile(
    rf"\d{{14,19}}|\d{{4}}([{_BLANK}.-])\d{{4}}\1\d{{4}}\1\d{{2,4}}(?:\1\d{{3}})?"
    rf"|\d{{4}}([{_BLANK}-])\d{{6}}\2\d{{4,5}}"
)
_CARD_ISSUER = re.compile(  # Visa; Mastercard; American Express; Discover and UnionPay; JCB; Diners Club
    r"4\d{15}|4\d{18}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|[45]\d\d|2\d\d)\d{12,15}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-59]|[689]\d)\d{11}"
)
_CARD_WITHIN = re.compile(  # next to another number, such as an amount; not in a row of four-digit numbers
    rf"{_NUMBER}(?<!\d{{4}}[{_BLANK}-])(?:\d{{4}}([{_BLANK}.-])\d{{4}}\1\d{{4}}\1\d{{4}}"
    rf"|\d{{4}}([{_BLANK}-])\d{{6}}\2\d{{4,5}}|\d{{14,19}})(?![A-Za-z0-9-]|_\w|\.\d|[{_BLANK}-]\d{{4}}(?!\d))"
)
_AMERICAN_PHONE = re.compile(
    _NUMBER + r"(?:(?:\+?1[ .-]?)?\([2-9]\d\d\) ?\d{3}[ .-]\d{4}|\+?1[ .-][2-9]\d\d[ .-]\d{3}[ .-]\d{4}"
    r"|[2-9]\d\d-[2-9]\d\d-\d{4})(?![A-Za-z0-9-]|_\w)"
)
_SPACED_PHONE = re.compile(  # North American; not in a row of numbers, and not a measurement
    _NUMBER
    + r"(?<![\d,;x=/] )(?P<value>[2-9][0-8]\d([ .])[2-9]\d\d\2\d{4})"
    + _NUMBER_ENDS
    + r"(?![.,]\d|[ /;,]{1,2}\d| ?(?:mm|cm|m|kg|kN)\b)"
)
_PART = re.compile(
    r"(?i)\b(?:part|parts|art|article|artikel|ref|item|order|serial|sku|isbn|type|id)\b[^\w\n]*\w{0,6}\W*$"
)
_PAIRED_PHONE = re.compile(  # French mobile numbers; not in a longer row of pairs, decimal or hexadecimal
    r"(?<![\w.,+-])(?<!\b\d[\da-fA-F] )(?<!\b[\da-fA-F]\d )(?P<value>0[67]([ .])\d\d(?:\2\d\d){3})"
    + _NUMBER_ENDS
    + r"(?![ .,]\d| [a-fA-F]\d\b)"
)
_GERMAN_MOBILE = re.compile(
    r"(?<![\w.,+/-])(?<!\d )(?P<value>01[567]\d{1,2}[ /-](?:\d{7,8}|\d{2,4}(?: \d{2,4}){1,3}))"
    + _NUMBER_ENDS
    + r"(?!/|[ .,]\d| ?(?:mm|cm|m|kg|kN)\b)"
)
_INTERNATIONAL_PHONE = re.compile(
    rf"{_NUMBER}(?:\+|00)(?=[1-9(])\(?\d(?:[{_BLANK}()./-]{{0,3}}\d){{6,14}}{_NUMBER_ENDS}"
)
_NAMED_PHONE = re.compile(
    r"(?i)\b(?P<name>phone|telephone|telefon|tel|mobile|mobil|cell|fax|call|whatsapp|handy|sms)\b"
    r"[\"']?(?:\s*(?:number|nummer|no\b|nr\b|is|ist|at|on|me|us|him|her|[:.=#\"']))*\s*"
    r"(?P<value>[(+\d][\d ()./-]{5,22}\d)(?![\w-]|[.,]\d)"
)
_PHONE_KEY = re.compile(
    r"(?i)(?:.*[^a-z])?(?:phone|telephone|telefon|tel|mobile|mobil|cell|fax)(?:[ _-]?(?:number|no|nr))?"
)
_PHONE = re.compile(r"[(+]*\d[\d ()./-]{5,22}\d")
_DATE = re.compile(r"(?:19|20)\d\d([./-]?)\d\d\1\d\d(?!\d).*|\d{1,2}([./-])\d{1,2}\2(?:19|20)?\d\d(?!\d).*")


@dataclass(frozen=True)
class Redacted:
    """A text without secrets and personal data, and how many were replaced, by kind."""

    text: str
    counts: Mapping[str, int] = field(default_factory=dict)


def redact(text: str) -> Redacted:
    """Replace secrets and personal data by placeholders; redacting the result again changes nothing.

    JSON stays JSON: strings keep their quotes, and a card number without quotes becomes a string.
    """
    if not _suspicious(text):
        return Redacted(text)
    counts: Counter[str] = Counter()
    # Repeat until nothing changes. Each pass removes text and adds only placeholders, so this ends.
    while (changed := (_in_json if _is_json(text) else _in_text)(text, counts)) != text:
        text = changed
    return Redacted(text, dict(sorted(counts.items())))


def redact_example(example: Example) -> tuple[Example, dict[str, int]]:
    """Redact the prompt, answers, history and provenance of an example; also return what was replaced, by kind."""
    counts: Counter[str] = Counter()

    def clean(text: str) -> str:
        redacted = redact(text)
        counts.update(redacted.counts)
        return redacted.text

    prompt, target = clean(example.prompt), clean(example.target)
    history = tuple(turn.model_copy(update={"content": clean(turn.content)}) for turn in example.history)
    output = target if example.output == example.target else clean(example.output)
    provenance = example.provenance and clean(example.provenance)  # a heading, path or key may hold an e-mail address
    if not counts:
        return example, {}
    changes = {"prompt": prompt, "target": target, "history": history, "output": output, "provenance": provenance}
    return example.model_copy(update=changes), dict(sorted(counts.items()))


def _suspicious(text: str) -> bool:
    lowered = text.lower()
    for hint in _HINTS:
        if hint in lowered:
            return True
    return _MANY_DIGITS.search(text) is not None or _LONG_WORD.search(text) is not None


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in {"{", "[", '"'}:
        return False
    try:
        json.loads(text, parse_int=str)  # a number of thousands of digits is JSON too
    except (ValueError, RecursionError):
        return False
    return True


def _in_json(text: str, counts: Counter[str]) -> str:
    """Redact each string of a JSON text by itself, with the key it belongs to."""
    key = ""

    def clean(match: re.Match[str]) -> str:
        nonlocal key
        if match["number"]:
            return f'"{_count(counts, "card")}"' if _is_card(match["number"]) else match[0]
        literal, colon = f'"{match["text"]}"', match["colon"] or ""
        value = json.loads(literal, strict=False)
        cleaned = _in_text(value, counts) if colon else _under_key(key, value, counts)
        if colon:
            key = value
        if cleaned == value:
            return match[0]
        return json.dumps(cleaned, ensure_ascii=literal.isascii() or "\\u" in literal) + colon

    return _JSON_TOKEN.sub(clean, text)


def _under_key(key: str, value: str, counts: Counter[str]) -> str:
    noted = (_NOTED.search(f"{key}: {value}") or _PASSWORD_KEY.fullmatch(key)) and _is_password(value)
    if key.lower() == "pw" and _looks_chosen(value):
        return _count(counts, "secret")
    if _SECRET_KEY.fullmatch(key) and not re.search(r"\s", value) and (noted or _looks_secret(key, value)):
        return _count(counts, "secret")
    if _PHONE_KEY.fullmatch(key) and _PHONE.fullmatch(value.strip()) and _is_number_of_phone(value):
        return _count(counts, "phone")
    return _in_text(value, counts)


def _in_text(text: str, counts: Counter[str]) -> str:
    if not _suspicious(text):
        return text
    text = _secrets(text, counts)
    if "@" in text or "＠" in text:
        text = _EMAIL.sub(lambda match: _count(counts, "email"), text)
    return _numbers(text, counts) if _MANY_DIGITS.search(text) else text


def _secrets(text: str, counts: Counter[str]) -> str:
    text = _PRIVATE_KEY.sub(lambda match: _without_key(match, counts), text)
    for pattern in (_AUTHORIZATION, _BEARER, _IN_URL, _IN_QUERY, _IN_CONNECTION, _AWS_SECRET):
        text = _replace(pattern, text, lambda match, value: bool(_PLACEHOLDER.sub("", value)), counts, "secret")
    for pattern in _AWS_PAIRS:
        text = _replace(pattern, text, lambda match, value: _is_mixed(value), counts, "secret")
    text = _TOKENS.sub(lambda match: _count(counts, "secret"), text)
    for pattern in _known_tokens():
        if _OPENAI in pattern.pattern and _OPENAI not in text:
            continue  # on `sk-sk-sk-...` the pattern would take quadratic time
        text = _whole_tokens(pattern, text, counts)
    for pattern in (_ASSIGNED, _IN_COMMAND, _IN_TAG):
        text = _replace(pattern, text, lambda match, value: _looks_secret(match["name"], value), counts, "secret")
    text = _replace(_OF_CURL, text, lambda match, value: bool(_PLACEHOLDER.sub("", value)), counts, "secret")
    for pattern in (_NOTED, _QUOTED, _IN_ENVIRONMENT):
        text = _replace(pattern, text, lambda match, value: _is_password(value), counts, "secret")
    return _replace(_SAID, text, lambda match, value: _looks_chosen(value), counts, "secret")


def _without_key(match: re.Match[str], counts: Counter[str]) -> str:
    """Return the placeholder of a private key, and the text after a key that was cut off; words about keys are kept."""
    if match["end"]:
        return _count(counts, "secret") if _KEY_LINE.search(match["body"]) else match[0]
    lines = _KEY_LINES.match(match["body"])
    return _count(counts, "secret") + match["body"][lines.end() :] if lines else match[0]


def _numbers(text: str, counts: Counter[str]) -> str:
    for pattern in (_CARD, _CARD_WITHIN):
        text = pattern.sub(lambda match: _count(counts, "card") if _is_card(match[0]) else match[0], text)
    text = _AMERICAN_PHONE.sub(lambda match: _count(counts, "phone"), text)
    text = _replace(_SPACED_PHONE, text, lambda match, value: _is_american(match, value), counts, "phone")
    text = _replace(_GERMAN_MOBILE, text, lambda match, value: _is_valid(match, value, "DE"), counts, "phone")
    text = _replace(_PAIRED_PHONE, text, lambda match, value: _is_paired(value), counts, "phone")
    text = _INTERNATIONAL_PHONE.sub(
        lambda match: _count(counts, "phone") if _is_international(match[0]) else match[0], text
    )
    return _replace(_NAMED_PHONE, text, lambda match, value: _is_number_of_phone(value), counts, "phone")


def _replace(
    pattern: re.Pattern[str],
    text: str,
    found: Callable[[re.Match[str], str], bool],
    counts: Counter[str],
    kind: str,
) -> str:
    """Replace the named group that matched (not `name`) if `found` accepts it, and keep the text around it."""

    def one(match: re.Match[str]) -> str:
        group = next((g for g, value in match.groupdict().items() if value is not None and g != "name"), None)
        if group is None or not found(match, match[group]):
            return match[0]
        start, end = match.start(group) - match.start(), match.end(group) - match.start()
        return match[0][:start] + _count(counts, kind) + match[0][end:]

    return pattern.sub(one, text)


def _whole_tokens(pattern: re.Pattern[str], text: str, counts: Counter[str]) -> str:
    parts, position = [], 0
    for match in pattern.finditer(text):
        if match.start() < position:
            continue
        parts += [text[position : match.start()], _count(counts, "secret")]
        rest = _REST_OF_TOKEN.match(text, match.end())
        position = rest.end() if rest else match.end()
    return "".join([*parts, text[position:]])


def _count(counts: Counter[str], kind: str) -> str:
    counts[kind] += 1
    return f"[{kind.upper()}]"


def _looks_secret(name: str, value: str) -> bool:
    """Return True if a value of a name such as `password` is a secret, not a word, an identifier or a placeholder."""
    value = _PLACEHOLDER.sub("", value)
    if len(value) < 4 or _CODE.fullmatch(value) or value.startswith("os."):
        return False
    if value.replace("_", "").isdecimal():
        return len(value) >= 6 and "token" not in name.lower()
    return len(value) >= 6 and (any(c.isdigit() for c in value) or any(c in "!@#$%^&*+?~" for c in value))


def _is_password(value: str) -> bool:
    """Return True if a plain word may be a password: not a placeholder, not the name of a variable."""
    return not _NO_PASSWORD.fullmatch(value) and value != value.upper()


def _is_mixed(value: str) -> bool:
    """Return True if it has digits, upper and lower case, as 40 random characters do and a commit hash does not."""
    return any(c.isdigit() for c in value) and value != value.lower() and value != value.upper()


def _looks_chosen(value: str) -> bool:
    """Return True if the word after "password is" looks like one, unlike "base64-encoded" and "required"."""
    plain = _PLACEHOLDER.sub("", value).rstrip(".!?)")
    mixed = plain != plain.lower() and plain != plain.upper()
    return len(plain) >= 8 and "-" not in plain and mixed and any(c.isdigit() for c in plain)


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    if not (_CARD_FORM.fullmatch(text) and _CARD_ISSUER.fullmatch(digits)):
        return False
    # The checksum of Luhn.
    doubled = [int(d) * 2 if i % 2 else int(d) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _is_number_of_phone(text: str) -> bool:
    digits = sum(c.isdigit() for c in text)
    return 7 <= digits <= 15 and not _DATE.fullmatch(text.strip()) and len(set(text)) > 2


def _is_international(text: str) -> bool:
    from phonenumbers import PhoneNumberMatcher

    number = re.sub(r"^00", "+", text)
    return any(found.start == 0 for found in PhoneNumberMatcher(number, None))


def _is_american(match: re.Match[str], value: str) -> bool:
    """Return True if three groups of digits are a North American phone number, not round measurements."""
    return not (" " in value and value[-1] in "05") and _is_valid(match, value, "US")


def _is_valid(match: re.Match[str], value: str, region: str) -> bool:
    """Return True if the phone number is valid in a region and the text before it does not call it a part number."""
    if _PART.search(match.string[max(0, match.start() - 30) : match.start()]):
        return False
    import phonenumbers

    return phonenumbers.is_valid_number(phonenumbers.parse(value, region))


def _is_paired(value: str) -> bool:
    """Return True if five pairs of digits are a phone number, not a row of small ascending numbers."""
    pairs = [int(pair) for pair in re.split("[ .]", value)]
    return pairs != sorted(pairs) or pairs[-1] > 60


@lru_cache(maxsize=1)
def _known_tokens() -> tuple[re.Pattern[str], ...]:
    """Return the patterns of detect-secrets whose whole match is a token."""
    from detect_secrets.plugins import (
        aws,
        azure_storage_key,
        discord,
        github_token,
        gitlab_token,
        mailchimp,
        openai,
        pypi_token,
        sendgrid,
        slack,
        square_oauth,
        stripe,
        telegram_token,
        twilio,
    )

    plugins = (
        azure_storage_key.AzureStorageKeyDetector, discord.DiscordBotTokenDetector, github_token.GitHubTokenDetector,
        gitlab_token.GitLabTokenDetector, mailchimp.MailchimpDetector, openai.OpenAIDetector,
        pypi_token.PypiTokenDetector, sendgrid.SendGridDetector, slack.SlackDetector, square_oauth.SquareOAuthDetector,
        stripe.StripeDetector, telegram_token.TelegramBotTokenDetector, twilio.TwilioKeyDetector,
    )  # fmt: skip
    # The second pattern of AWS would match the name and the quotes too; _AWS_SECRET is used instead.
    return (aws.AWSKeyDetector.denylist[0], *(pattern for plugin in plugins for pattern in plugin.denylist))
