"""The personal data that redaction finds: e-mail addresses, phone and card numbers, and numbers of persons.

phonenumbers validates phone numbers, and python-stdnum the checksums of the other numbers. A number without a form of
its own, such as that of a passport, counts only where its name stands before it.
"""

import ipaddress
import re
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import NamedTuple

from finetune_pipeline.curation.found_values import FoundValues

_NUMBER = r"(?:(?<=\\[nrtbf])|(?<![A-Za-z0-9.+-]))"  # before a number
_NUMBER_ENDS = r"(?![A-Za-z0-9^=-]|_\w|\*{1,3} ?[A-Za-z0-9])"
_BLANK = " \u00a0\u2009\u202f"
_EMAIL = re.compile(
    r"(?:(?<=\\[nrtbf])|(?<![\w.%+\\-]))(?!git@[\w.-]+[:/])[\w%+-](?:[\w.%+-]{0,62}[\w%+-])?"
    r"(?:[@＠]|%40|&#64;|&#x40;)(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?!\d|_\w|-)"
)
_SPELLED_EMAIL = re.compile(  # jane (at) example.com; without brackets only after a word such as "mail"
    r"(?i)(?<![\w.%+-])[\w%+-](?:[\w.%+-]{0,62}[\w%+-])?\s?[\[({<]\s?at\s?[\])}>]\s?[a-z0-9][\w-]{0,61}"
    r"(?:(?:\.|\s?[\[({<]\s?dot\s?[\])}>]\s?|\sdot\s)[a-z0-9][\w-]{0,61}){0,6}"
    r"(?:\.|\s?[\[({<]\s?dot\s?[\])}>]\s?|\sdot\s)[a-z]{2,24}(?![\w-])"
)
_AROUND_SPOKEN = r"(?:address|adresse|to|at|is|are|was|me|us|him|her|them|an|ist|mir|uns|unter|est)"
_SPOKEN_EMAIL = re.compile(  # mail jane at example dot com
    rf"(?i)(?<![a-z])(?:e-?mails?|mails?|reach|contact|write|kontakt|schreib|schreiben|courriel|correo)(?![a-z])"
    rf"(?:[ \t]*[:=,]|\s{_AROUND_SPOKEN}(?![\w.%+-])){{0,4}}\s*(?!(?:{_AROUND_SPOKEN}|you|it|people|someone|anyone)\s)"
    r"(?<![\w.%+-])(?P<value>[\w%+-](?:[\w.%+-]{0,62}[\w%+-])?\sat\s[a-z0-9][\w-]{0,61}(?:\sdot\s[a-z0-9][\w-]{0,61}){0,6}"
    r"\sdot\s(?:com|org|net|edu|gov|mil|int|info|biz|name|pro|app|dev|cloud|online|[a-z]{2}))(?![\w-])"
)
_AT_SIGNS = ("@", "＠", "%40", "&#64;", "&#x40;")
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
_PAIRED_PHONE = re.compile(  # French numbers; not in a longer row of pairs, decimal or hexadecimal
    r"(?<![\w.,+-])(?<!\b\d[\da-fA-F] )(?<!\b[\da-fA-F]\d )(?P<value>0[1-9]([ .-])\d\d(?:\2\d\d){3})"
    + _NUMBER_ENDS
    + r"(?![ .,]\d| [a-fA-F]\d\b)"
)
_GERMAN_MOBILE = re.compile(
    r"(?<![\w.,+/-])(?<!\d )(?P<value>01[567]\d{1,2}[ /-](?:\d{7,8}|\d{2,4}(?: \d{2,4}){1,3}))"
    + _NUMBER_ENDS
    + r"(?!/|[ .,]\d| ?(?:mm|cm|m|kg|kN)\b)"
)
_LANDLINE = re.compile(  # German, Austrian, Swiss and British: area code, then the number
    r"(?<![\w.,+/-])(?<!\d )(?P<value>\(?0[1-9]\d{1,4}\)?(?: ?[/-] ?| )\d{2,9}(?:[ -]\d{1,6}){0,4})"
    + _NUMBER_ENDS
    + r"(?!/|[ .,]\d| ?(?:mm|cm|m|kg|kN)\b)"
)
_AREA = re.compile(r"\(?0(\d+)")
_BARE_PHONE = re.compile(  # United States and India: ten digits; China: eleven; Europe: ten or eleven after a zero
    r"(?<![A-Za-z0-9_.,+/=#$€£:(\[-])(?<![=#:*%&|^<>~] )(?<![\d,;x=/] )"
    r"(?P<value>[2-9]\d\d[2-9]\d{6}|[6-9]\d{4}[ -]?\d{5}|1[3-9]\d{9}|0[1-9]\d{8,9})"
    + _NUMBER_ENDS
    + r"(?![.,;]? ?\d|[/)\]:]| ?(?:mm|cm|m|kg|kN|ms|ns|bytes|[€$])(?![a-z]))"
)
_NO_PHONE = re.compile(
    r"(?i)(?:account|invoice|ticket|tracking|case|customer|transaction|timestamp|epoch|population|seed|hash|port|ean|upc"
    r"|imei|version|values?|amount|price|total|count|size|range|between|than|code|key|index|record)\b[^\w\n]*\w{0,6}\W*$"
    r"|\b(?:return|yield)\s*$"
)
_INTEGERS = frozenset({"2147483647", "2147483648", "0123456789"})  # limits of 32 bits look like a number of Dallas
_GROUPED = re.compile(r"\(?\d+\)?(?:[ /-]{1,3}\(?\d+\)?)+")  # digits alone may count anything
_INTERNATIONAL_PHONE = re.compile(
    rf"{_NUMBER}(?:\+|00)(?=[1-9(])\(?\d(?:[{_BLANK}()./-]{{0,3}}\d){{6,14}}{_NUMBER_ENDS}"
)
_NAMED_PHONE = re.compile(
    r"(?i)\b(?P<name>phone|telephone|telefon|t[ée]l[ée]phone|t[ée]l|tel|mobile|mobil|portable|festnetz|landline|cell|fax|call|whatsapp|handy|sms)\b"
    r"[\"']?(?:\s*(?:number|nummer|no\b|nr\b|is|ist|at|on|me|us|him|her|[:.=#\"']))*\s*"
    r"(?P<value>[(+\d][\d ()./-]{5,22}\d)(?![\w-]|[.,]\d)"
)
_PHONE_KEY = re.compile(
    r"(?i)(?:.*[^a-z])?(?:phone|telephone|telefon|tel|mobile|mobil|cell|fax)(?:[ _-]?(?:number|no|nr))?"
)
_PHONE = re.compile(r"[(+]*\d[\d ()./-]{5,22}\d")
_DATE = re.compile(r"(?:19|20)\d\d([./-]?)\d\d\1\d\d(?!\d).*|\d{1,2}([./-])\d{1,2}\2(?:19|20)?\d\d(?!\d).*")

# --- Numbers of persons and accounts ----------------------------------------------------------------------------------

_WORD_START, _WORD_END = _NUMBER, _NUMBER_ENDS + r"(?!\.\d)"
_LINK = (  # what may stand between the name and the number
    r"(?:[\"'`()\]\s:=#.,-]|(?i:n°|no\.|(?:number|numéro|num|nummer|no|nr|is|ist|est|id|of|von|de|my|code|card|karte|carte)\b))"
)


class _Form(NamedTuple):
    """A form in which a kind of number is written.

    Attributes:
        module: the module of python-stdnum that validates it; empty if its form or its name is enough.
    """

    kind: str
    pattern: re.Pattern[str]
    module: str = ""

    @property
    def needs_name(self) -> bool:
        """Whether it counts only after its name."""
        return "(?i:" in self.pattern.pattern


_NAMES: list[str] = []


def _named(name: str, value: str) -> re.Pattern[str]:
    _NAMES.append(name)
    return re.compile(rf"(?:(?<=\\[nrtbf])|(?<![A-Za-z]))(?i:{name}){_LINK}{{1,8}}(?P<value>{value}){_WORD_END}")


def _alone(value: str) -> re.Pattern[str]:
    return re.compile(rf"{_WORD_START}(?P<value>{value}){_WORD_END}")


_SSN = r"(?!000|666)\d{3}-(?!00)\d\d-(?!0000)\d{4}"
_FORMS = (
    _Form("iban", _named("iban", r"[A-Za-z]{2}\d\d(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?")),
    _Form(
        "iban",
        _named(
            r"kontonummer|konto-?nr|blz|bankleitzahl|sort code|(?:bank )?account (?:number|no)|routing (?:number|no)",
            r"\d(?:[ -]?\d){5,16}",
        ),
    ),
    _Form("ssn", _alone(_SSN)),  # and the taxpayer numbers that have its form
    _Form("ssn", _named("ssn|social[ _-]?security(?: no| number)?", r"\d{3}[ .-]?\d\d[ .-]?\d{4}")),
    _Form("nir", _alone(r"[1-478] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d"), "fr.nir"),
    _Form(
        "nir",
        _named(
            "nir|insee|s[ée]curit[ée] sociale|s[ée]cu", r"[1-478] ?\d\d ?\d\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3}(?: ?\d\d)?"
        ),
    ),
    _Form("aadhaar", _alone(r"[2-9]\d{3}([ -])\d{4}\2\d{4}(?! \d)"), "in_.aadhaar"),
    _Form("aadhaar", _named("aadh?aar|aadhar|uidai|आधार", r"\d{4}[ -]?\d{4}[ -]?\d{4}")),
    _Form("pan", _alone(r"[A-Z]{3}P[A-Z]\d{4}[A-Z]"), "in_.pan"),
    _Form("pan", _named("pan|permanent account", r"[A-Za-z]{5}\d{4}[A-Za-z]")),
    _Form("steuer_id", _alone(r"[1-9]\d \d{3} \d{3} \d{3}(?! \d)"), "de.idnr"),
    _Form(
        "steuer_id",
        _named(
            r"steuer[ _-]?(?:id|identifikations)?[ _-]?(?:nummer|nr)?|st(?:eu)?\.?-?(?:id|nr)|id-?nr"
            r"|identifikationsnummer|tin|tax[ _-]?id|taxpayer",
            r"\d\d ?\d{3} ?\d{3} ?\d{3}|\d{2,3}/\d{3,4}/\d{4,5}",
        ),
    ),
    _Form(
        "passport",
        _named(
            r"passport|reisepass|passeport|pasaporte|passaporto|pass[ _-]?(?:nr|nummer|no|number)|паспорт|护照",
            r"(?=[A-Z]{0,3} ?(?:[A-Z]?\d[A-Z]{0,2}){4})(?:\d\d ?[A-Z]{2} ?\d{5}|[A-Z]{1,2} ?\d{6,8}|[A-Z0-9]{6,9})"
            r"|(?=[A-Z]{0,9}\d)[CFGHJKLMNPRTVWXYZ0-9]{9,10}"  # German, without or with the check digit
            r"|[a-z]{1,2} ?\d{6,8}|\d\d[a-z]{2}\d{5}|(?=(?:[a-z]{0,8}\d){2})[cfghjklmnprtvwxyz0-9]{9,10}",
        ),
    ),
    _Form("passport", re.compile(r"P[A-Z<][A-Z<]{3}[A-Z0-9<]{39}\s{1,2}[A-Z0-9<]{44}")),  # its machine-readable zone
    _Form("national_id", _alone(r"\d{3}\.\d{3}\.\d{3}-\d\d"), "br.cpf"),
    _Form("national_id", _alone(r"[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]"), "it.codicefiscale"),
    _Form("national_id", _alone(r"[1-9]\d{16}[\dXx]"), "cn.ric"),
    _Form("national_id", _alone(r"\d{6}-[1-8]\d{6}"), "kr.rrn"),
    _Form("national_id", _alone(r"756\.?\d{4}\.?\d{4}\.?\d\d"), "ch.ssn"),
    _Form("national_id", _alone(r"\d{8}-?[A-Z]"), "es.dni"),
    _Form("national_id", _alone(r"[XYZ]-?\d{7}-?[A-Z]"), "es.nie"),
    _Form("national_id", _alone(r"(?![DFIQUV])[A-Z](?![DFIOQUV])[A-Z] \d\d \d\d \d\d [A-D]")),  # United Kingdom
    _Form(
        "national_id",
        _named(
            r"national[ _-]?(?:insurance|id|identity)(?:[ _-]?(?:card|number|no))?|pesel|codice fiscale"
            r"|burgerservicenummer|rijksregister(?:nummer)?|personnummer|social[ _-]?insurance"
            r"|(?:sozial|renten)versicherungsnummer|personalausweis(?:nummer)?|身份证(?:号码?)?"
            r"|driver'?s?[ _-]?licen[cs]e(?: number| no)?|führerschein(?:nummer)?|permis de conduire"
            r"|(?-i:NINO|BSN|AHV|CPF|CURP|DNI|NIE|SIN)",  # words of other languages in lower case
            r"(?=(?:[^\d\n]{0,4}\d){6})[A-Z0-9][A-Z0-9 ./-]{6,18}[A-Z0-9]",
        ),
    ),
)
_ANY_NAME = re.compile(rf"(?i)(?:(?<=\\[nrtbf])|(?<![a-z]))(?:{'|'.join(_NAMES)})")
_IBAN = re.compile(rf"{_WORD_START}[A-Za-z]{{2}} ?\d\d(?:[ -]?[A-Za-z0-9]){{11,30}}")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(  # the form that ends with an IPv4 address first
    r"(?<![\w:.])(?=[0-9A-Fa-f:.]*[0-9A-Fa-f])[0-9A-Fa-f]{0,4}"
    r"(?:(?::[0-9A-Fa-f]{0,4}){1,6}:(?:\d{1,3}\.){3}\d{1,3}|(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)"
)
_MAC = re.compile(
    r"(?<![\w:-])(?:[0-9A-Fa-f]{2}(?:(?::[0-9A-Fa-f]{2}){5}|(?:-[0-9A-Fa-f]{2}){5})|(?:[0-9A-Fa-f]{4}\.){2}[0-9A-Fa-f]{4})(?![\w:-])"
)


# Without any of these, a text has no number of a person or a phone.
_MANY_DIGITS = re.compile(r"\d(?:[ ().\u00a0\u2009\u202f/-]{0,3}\d){6}")
_CODE = re.compile(  # the first letter alone is found fast
    r"[A-Z](?:[A-Z]{4}\d{4}[A-Z]|[A-Z]{5}\d\d[A-Z]\d\d|[A-Z] \d\d \d\d \d\d [A-D]|[A-Z<]{4}[A-Z0-9]+<)"
)


def has_numbers(text: str) -> bool:
    """Return whether `replace_numbers` may find something: a quick look at ordinary text."""
    return _MANY_DIGITS.search(text) is not None or _CODE.search(text) is not None


def is_named(key: str) -> bool:
    """Return whether a JSON key names one of the numbers that count after their name."""
    return _ANY_NAME.search(key) is not None


def replace_emails(text: str, found: FoundValues) -> str:
    """Replace e-mail addresses."""
    if any(sign in text for sign in _AT_SIGNS):
        text = found.replace_matches(_EMAIL, text, "email")
    text = found.replace_matches(_SPELLED_EMAIL, text, "email")
    return found.replace_matches(_SPOKEN_EMAIL, text, "email")


def replace_addresses(text: str, found: FoundValues) -> str:
    """Replace addresses of networks and devices."""
    if "mac" in found.kinds:
        text = found.replace_matches(_MAC, text, "mac")
    if "ipv6" in found.kinds:
        text = found.replace_matches(_IPV6, text, "ipv6", _is_ipv6)
    if "ipv4" in found.kinds:
        text = found.replace_matches(_IPV4, text, "ipv4", _is_ipv4)
    return text


def replace_numbers(text: str, found: FoundValues) -> str:
    """Replace numbers of persons, accounts, cards and phones."""
    if "iban" in found.kinds:
        text = _IBAN.sub(lambda match: _with_iban(match[0], found), text)
    has_names = _ANY_NAME.search(text) is not None
    for form in _FORMS:
        if form.kind in found.kinds and (has_names or not form.needs_name):
            text = found.replace_matches(form.pattern, text, form.kind, _validator(form))
    for pattern in (_CARD, _CARD_WITHIN):
        text = found.replace_matches(pattern, text, "card", lambda match, value: is_card(value))
    return _phones(text, found) if "phone" in found.kinds else text


def _phones(text: str, found: FoundValues) -> str:
    text = found.replace_matches(_AMERICAN_PHONE, text, "phone")
    tests: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], bool]], ...] = (
        (_SPACED_PHONE, _is_american),
        (_GERMAN_MOBILE, lambda match, value: _is_valid(match, value, "DE")),
        (_LANDLINE, _is_landline),
        (_PAIRED_PHONE, lambda match, value: _is_paired(value) and _is_valid(match, value, "FR")),
        (_INTERNATIONAL_PHONE, lambda match, value: _is_international(value)),
        (_NAMED_PHONE, lambda match, value: is_number_of_phone(value)),
        (_BARE_PHONE, _is_bare_phone),
    )
    for pattern, test in tests:
        text = found.replace_matches(pattern, text, "phone", test)
    for region in found.phone_regions:
        text = _phones_of(region, text, found)
    return text


def _phones_of(region: str, text: str, found: FoundValues) -> str:
    """Replace the phone numbers that are valid in a region and grouped as there."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    parts, position = [], 0
    for match in PhoneNumberMatcher(text, region, leniency=Leniency.STRICT_GROUPING):
        before = text[max(0, match.start - 30) : match.start]
        named_otherwise = _PART.search(before) or _NO_PHONE.search(before) or _DATE.fullmatch(match.raw_string)
        if not named_otherwise and _GROUPED.fullmatch(match.raw_string):
            parts += [text[position : match.start], found.replace("phone", match.raw_string)]
            position = match.end
    return "".join([*parts, text[position:]])


def is_phone_under(key: str, value: str) -> bool:
    """Return whether the value of a JSON key is a phone number because of the key."""
    named = _PHONE_KEY.fullmatch(key) and _PHONE.fullmatch(value.strip())
    return named is not None and is_number_of_phone(value)


def _with_iban(text: str, found: FoundValues) -> str:
    """Replace the IBAN at the start of a text; words after it may look like a part of it."""
    from stdnum import iban

    ends = [match.end() for match in re.finditer(r"[A-Za-z0-9](?![A-Za-z0-9])|\d(?=[A-Za-z])", text)]
    for end in sorted({*ends, len(text)}, reverse=True):
        if text[:end].isascii() and iban.is_valid(text[:end], check_country=False):
            return found.replace("iban", text[:end]) + text[end:]
    return text


@lru_cache
def _validator(form: _Form) -> Callable[[re.Match[str], str], bool] | None:
    if not form.module:
        return None
    module = import_module(f"stdnum.{form.module}")

    def is_valid(match: re.Match[str], value: str) -> bool:
        try:
            return bool(module.is_valid(value)) and not _is_measured(value)
        except (LookupError, ValueError):  # some modules raise them for a wrong country or digits of other scripts
            return False

    return is_valid


def _is_measured(text: str) -> bool:
    """Return whether groups of digits are round measurements, such as 2400 1200 3650."""
    groups = re.findall(r"\d+", text)
    return len(groups) > 1 and all(int(group) % 5 == 0 for group in groups)


def _is_ipv4(match: re.Match[str], value: str) -> bool:
    return all(int(part) <= 255 for part in value.split("."))


def _is_ipv6(match: re.Match[str], value: str) -> bool:
    if not any(character.isdigit() for character in value):
        return False  # a::b is a name in C++
    try:
        ipaddress.IPv6Address(value)
    except ValueError:
        return False
    return True


def is_card(text: str) -> bool:
    """Return whether a number has the form and the checksum of a payment card."""
    digits = re.sub(r"\D", "", text)
    if not (_CARD_FORM.fullmatch(text) and _CARD_ISSUER.fullmatch(digits)):
        return False
    # Luhn's checksum.
    doubled = [int(d) * 2 if i % 2 else int(d) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def is_number_of_phone(text: str) -> bool:
    """Return whether a number may be that of a phone if a name says so: its length fits, and it is not a date."""
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

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(value, region))
    except phonenumbers.NumberParseException:  # such as an invisible character within
        return False


def _is_paired(value: str) -> bool:
    """Return True if five pairs of digits are a phone number, not a row of small ascending numbers."""
    pairs = [int(pair) for pair in re.split("[ .-]", value)]
    return pairs != sorted(pairs) or pairs[-1] > 60


def _is_landline(match: re.Match[str], value: str) -> bool:
    """Return whether a number is valid in a country where its first group is the area code."""
    import phonenumbers

    area = _AREA.match(value)
    if area is None or not value.strip("(")[len(area[1]) + 1 :].strip(" )/-"):
        return False
    for region in ("DE", "GB", "AT", "CH"):
        if _is_valid(match, value, region):
            number = phonenumbers.parse(value, region)
            length = phonenumbers.length_of_geographical_area_code(number)
            if length == len(area[1]) and len(phonenumbers.national_significant_number(number)) >= length + 5:
                return True
    return False


def _is_bare_phone(match: re.Match[str], value: str) -> bool:
    """Return whether digits without a name are a phone number where such numbers are written without spaces."""
    before = match.string[max(0, match.start() - 30) : match.start()]
    if value in _INTEGERS or len(set(value)) < 4 or _NO_PHONE.search(before):
        return False
    regions = ("FR", "DE", "GB") if value.startswith("0") else ("US", "IN", "CN")
    return any(_is_valid(match, value, region) for region in regions)
