"""Choose the next token of one answer: the most probable, or a drawn one, and only what a JSON schema allows."""

import json
import math
import re
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.native import NativeModel, Sampler, draw, grammar
from finetune_pipeline.inference.protocol import GenerateRequest

MAX_GRAMMAR_BYTES = 200_000
"""A larger grammar could overflow the stack of llama.cpp's parser, and take every other request with it."""

MAX_REPEATS = 10_000
"""More repetitions than a schema may ask for: each is written out, so that a billion would fill all memory."""

MAX_QUANTIFIERS = 32
"""?, *, +, {} and | in all patterns of a schema: llama.cpp follows every way through them at every token, and the ways
of a hundred of them hold up every other request for a second, those of a thousand for ever."""

_REPEATED = ("minItems", "maxItems", "minLength", "maxLength")


class TokenChooser:
    """The sampling state of one answer."""

    def __init__(self, model: NativeModel, request: GenerateRequest) -> None:
        self._grammar: Sampler | None = None
        self._draw: Sampler | None = None
        if request.json_schema is not None:
            self._grammar = grammar(model, grammar_of(json.dumps(request.json_schema)))
        self.seed = request.pick_seed()
        if self.seed is not None:
            self._draw = draw(request.temperature, request.top_p, self.seed)

    @property
    def is_greedy(self) -> bool:
        """It takes the most probable token and nothing else, which a whole batch can do at once."""
        return self._grammar is None and self._draw is None

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token.

        Raises:
            RequestRefused: the schema allows none of the model's tokens here.
        """
        ids = np.arange(len(logits), dtype=np.int32)
        token = self._pick(ids, logits)
        if self._grammar is None:
            return token
        # Checking one token is cheap, checking the whole vocabulary is not: do that only when the first choice fails.
        if not self._allowed(np.array([token], np.int32), logits[[token]])[0]:
            allowed = self._allowed(ids, logits)
            if not allowed.any():
                raise RequestRefused(
                    "the json_schema leaves none of the model's tokens as the next one: its vocabulary lacks "
                    "characters that the schema needs, so use another schema or another model"
                )
            token = self._pick(ids[allowed], logits[allowed])
        return token

    def accept(self, token: int) -> None:
        """The answer goes on after this token."""
        if self._grammar is not None:
            self._grammar.accept(token)

    def close(self) -> None:
        """Free what llama.cpp holds for it."""
        for sampler in (self._grammar, self._draw):
            if sampler is not None:
                sampler.close()

    def _pick(self, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> int:
        if self._draw is None:
            return int(ids[logits.argmax()])
        left, selected = self._draw.apply(ids, logits)
        return int(left["id"][selected])

    def _allowed(self, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        assert self._grammar is not None
        left, _ = self._grammar.apply(ids, logits)
        allowed: NDArray[np.bool_] = np.isfinite(left["logit"])
        return allowed


@lru_cache(maxsize=64)
def grammar_of(schema: str) -> str:
    """The grammar (GBNF) of a JSON schema, given as JSON text.

    Raises:
        RequestRefused: the schema uses what cannot be turned into a grammar, or is too large.
    """
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    _refuse_remote(json.loads(schema))
    _refuse_endless(json.loads(schema))
    try:
        text: str = json_schema_to_gbnf(schema)
    except Exception as error:  # the converter asserts, indexes and recurses its way through what it does not know
        raise RequestRefused(
            f"this json_schema cannot be turned into a grammar: {type(error).__name__}: {error}. Use type, properties, "
            "required, enum, const, items, anyOf and $ref within the schema"
        ) from error
    if len(text) > MAX_GRAMMAR_BYTES:
        raise RequestRefused(
            f"this json_schema gives a grammar of {len(text)} bytes, at most {MAX_GRAMMAR_BYTES} are taken; make "
            "maxLength, maxItems and enumerations smaller"
        )
    return text


def _refuse_remote(schema: Any) -> None:
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise RequestRefused(f"json_schema refers to {reference!r}; only references within it (#/...) are followed")
    for item in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []:
        _refuse_remote(item)


def _refuse_endless(schema: Any) -> None:
    repeats = _repeats(schema)
    if repeats > MAX_REPEATS:
        raise RequestRefused(
            f"json_schema asks for {repeats} repetitions, at most {MAX_REPEATS} are taken; make {', '.join(_REPEATED)} "
            "and the counts in pattern smaller"
        )
    quantifiers = _quantifiers(schema)
    if quantifiers > MAX_QUANTIFIERS:
        raise RequestRefused(
            f"the patterns of json_schema have {quantifiers} quantifiers and alternatives, at most {MAX_QUANTIFIERS} "
            "are taken; make them simpler, or list the values in an enum"
        )


def _quantifiers(schema: Any) -> int:
    if isinstance(schema, list):
        return sum(map(_quantifiers, schema))
    if not isinstance(schema, dict):
        return 0
    return len(re.findall(r"[?*+{|]", str(schema.get("pattern", "")))) + _quantifiers([*schema.values()])


def _repeats(schema: Any) -> int:
    if isinstance(schema, list):
        return sum(map(_repeats, schema))
    if not isinstance(schema, dict):
        return 0
    own = [schema.get(name) for name in _REPEATED]
    counts = re.findall(r"\d+", " ".join(re.findall(r"\{[\d,]*\}", str(schema.get("pattern", "")))))
    in_pattern = math.prod(int(count[:9]) or 1 for count in counts) if counts else 0  # they may be nested
    return (
        sum(count for count in own if isinstance(count, int) and count > 0) + in_pattern + _repeats([*schema.values()])
    )
