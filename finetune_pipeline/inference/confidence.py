"""How sure a model was of an answer: the lowest probability among the tokens of its values.

A mean over all tokens is no measure: brackets, quotes and keys are nearly certain always and drown the one wrong digit.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence

Span = tuple[int, int]

_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


def confidence(text: str, token_texts: Sequence[str], token_logprobs: Sequence[float]) -> float | None:
    """Lowest probability (0 to 1) among the tokens that carry values.

    The values of a JSON object or array are its strings (without their quotes), numbers, booleans and nulls; keys are
    none. Any other text is one value. A JSON without values, such as `{}`, is judged by all its tokens.

    Args:
        text: the answer.
        token_texts: the texts of its tokens, which joined start with the answer.
        token_logprobs: natural log of each token's probability.

    Returns:
        None when there are no tokens.
    """
    probabilities = [min(1.0, math.exp(logprob)) for logprob in token_logprobs]
    spans = list(value_spans(text)) if _is_container(text) else []
    chosen = [p for p, span in zip(probabilities, _token_spans(token_texts), strict=True) if _meets(span, spans)]
    return min(chosen or probabilities, default=None)


def value_spans(text: str) -> Iterator[Span]:
    """Where the scalar values of a valid JSON text stand, first character to one after the last."""
    pieces = list(_PIECE.finditer(text))
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        start, end = piece.span()
        is_key = following is not None and following.group() == ":"
        if piece.group() in "{}[]:," or is_key:
            continue
        # An empty string has no character of its own: its closing quote tells that it is empty.
        yield (start + 1, max(end - 1, start + 2)) if piece.group().startswith('"') else (start, end)


def _is_container(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _token_spans(token_texts: Sequence[str]) -> Iterator[Span]:
    end = 0
    for token_text in token_texts:
        start, end = end, end + len(token_text)
        yield start, max(end, start + 1)  # a token without text is a part of the character that comes next


def _meets(token: Span, spans: Sequence[Span]) -> bool:
    return any(token[0] < end and start < token[1] for start, end in spans)
