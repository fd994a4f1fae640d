"""Refusals: answers that begin as models decline a request, in English, German, French and Spanish."""

import re

_CANNOT = r"(?:can['’]?t|can\s?not|won['’]?t|will not|(?:am|are|['’]m|['’]re) (?:not able|unable))"
_REFUSAL = re.compile(
    rf"(?i)\W*(?:"
    rf"(?:(?:i['’]?m|i am|we['’]?re|we are)\s+(?:\w+\s+)?(?:sorry|afraid)|sorry|(?:my )?apologies|i apologi[sz]e"
    rf"|unfortunately)\b.{{0,40}}?\b(?:i|we)\s*{_CANNOT}\b"
    r"|(?:i['’]?m|i am|we['’]?re|we are)\s+(?:unable|not able)\s+to\b"
    rf"|(?:i|we)\s+{_CANNOT}\s+(?:\w+ly\s+)?(?:help|assist|comply|fulfil+|provide|answer|do that|discuss|engage)\b"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|es tut mir leid,? (?:aber )?(?:das kann ich|ich kann)\b"
    r"|ich kann (?:ihnen |dir )?(?:dabei|damit) (?:leider )?nicht\b"
    r"|désolée?,? (?:mais )?je ne peux pas\b|je ne peux pas (?:vous |t['’])?aider\b|lo siento,? (?:pero )?no puedo\b"
    r")"
)

_OPENING = re.compile(
    r"(?i)^\W*(?:(?:i['’]?m|i am) (?:very |so |really )?(?:sorry|afraid|unable|not able)|sorry\b|i apologi[sz]e"
    r"|unfortunately\b|i (?:cannot|can['’]t|could not|couldn['’]t|won['’]t|will not|must decline|do not feel)\b"
    r"|as an ai\b|as a (?:large )?language model)"
)


def is_refusal(answer: str) -> bool:
    """Return True if an answer begins with a refusal, such as "I'm sorry, but I cannot ..."."""
    return _REFUSAL.match(answer) is not None


def may_be_refusal(text: str) -> bool:
    """Return True if a text begins with "I cannot", "I'm sorry" and the like.

    An answer may begin so without being a refusal. A teacher's instructions and artifacts never do.
    """
    return _OPENING.match(text) is not None
