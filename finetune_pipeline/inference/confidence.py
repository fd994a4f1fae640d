"""The confidence of a completion: the lowest probability among the tokens of its values.

A mean over all tokens would hide one uncertain digit among brackets, quotes and keys, which are almost always certain.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence

Span = tuple[int, int]

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


def confidence(text: str, token_texts: Sequence[str], token_logprobs: Sequence[float]) -> float | None:
    """Return the lowest probability (0 to 1) among the tokens of values.

    The values of a JSON object or array are its strings (without quotes), numbers, booleans and nulls, but not its
    keys. Any other text is one value. For a JSON without values, such as `{}`, all tokens count.

    Args:
        text: the completion.
        token_texts: the texts of its tokens; joined, they start with `text`.
        token_logprobs: the natural log of each token's probability.

    Returns:
        None if there are no tokens.
    """
    probabilities = [min(1.0, math.exp(logprob)) for logprob in token_logprobs]
    spans = list(value_spans(text)) if _is_json_container(text) else []
    of_values = []
    end = 0
    for probability, token_text in zip(probabilities, token_texts, strict=True):
        start, end = end, end + len(token_text)
        # A token without text is the first part of the character that the next token completes.
        if any(start < span_end and span_start < max(end, start + 1) for span_start, span_end in spans):
            of_values.append(probability)
    return min(of_values or probabilities, default=None)


def value_spans(text: str) -> Iterator[Span]:
    """Yield start and end of each scalar value of a valid JSON text."""
    tokens = list(_JSON_TOKEN.finditer(text))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        start, end = token.span()
        is_key = following is not None and following.group() == ":"
        if token.group() in "{}[]:," or is_key:
            continue
        # An empty string has no character, so its closing quote counts.
        yield (start + 1, max(end - 1, start + 2)) if token.group().startswith('"') else (start, end)


def _is_json_container(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
