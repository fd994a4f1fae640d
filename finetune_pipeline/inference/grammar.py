"""The tokens that a JSON Schema allows next: llguidance over the model's vocabulary. Used in the child process only.

A schema is compiled in a thread, since llguidance cannot be interrupted; it releases the GIL, so decoding continues.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.json_schema import Enforceable, enforceable
from finetune_pipeline.inference.native import NativeModel
from finetune_pipeline.schemas import Unreadable, parse_json

COMPILE_SECONDS = 10.0
"""A schema that takes longer is refused, but its thread is busy until llguidance returns."""

COMPILERS = 2
"""Schemas compiled at the same time. While all threads are busy with late ones, new schemas are refused."""

MASK_SECONDS = 10.0
"""CPU time that the masks of one answer may take: all other answers wait for them."""

_QUEUED = (
    f"json_schema was not compiled within {COMPILE_SECONDS:g} s, since others were compiled before it; try again later"
)

CACHED = 16
"""Compiled schemas that are kept; one can take 100 MB."""

_LOCATE_SECONDS = 1.0
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=5_000,  # a row has several for each optional property that may come next
    max_lexer_states=50_000,  # 1 to 2 kB each
    max_grammar_size=20_000,
    verbose_errors=False,  # they would show tokens of the answer
)
_OPTIONS: Any = {
    "lenient": False,  # otherwise a schema can turn refusals off by `x-guidance`
    "coerce_one_of": False,
    "whitespace_flexible": False,  # otherwise a weak model may generate white space without end
    "item_separator": r",[\x20]?",
    "key_separator": r":[\x20]?",
    # Without \u each name has one spelling only, so that no property is written twice in two spellings.
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
}


class Grammar:
    """A schema that can be enforced. Every answer gets its own `Matcher`."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, given: Enforceable) -> None:
        import jsonschema_rs

        self._tokenizer = tokenizer
        self._schema = given.schema
        self._validator = jsonschema_rs.Draft202012Validator(given.checked)

    def matcher(self) -> "Matcher":
        """Return a matcher for one answer; llguidance compiles it in a few milliseconds.

        Copies of one compiled matcher would share its lexer with its limits: an answer that uses up the lexer's states
        would make all later answers fail.
        """
        return Matcher(_matcher(self._tokenizer, self._schema), self)

    def check(self, text: str) -> None:
        """Check a complete answer for what the grammar cannot express: unique items, properties that occur once.

        Raises:
            RequestRefused: it is not valid; the message names keyword and path.
        """
        try:
            value = parse_json(text)
        except Unreadable as unreadable:  # 1e999 is valid JSON, but no float can hold it
            raise RequestRefused(f"the model's answer follows the json_schema, but {unreadable}") from unreadable
        if not self._validator.is_valid(value):  # iter_errors takes exponential time in nested anyOf
            repeated = _repeated(value, "#")
            found = (
                f"uniqueItems of json_schema: two items at {repeated[:300]} are equal" if repeated else "json_schema"
            )
            raise RequestRefused(
                f"the model's answer violates {found}. This can only be checked on a complete answer; try again with a "
                "temperature and another seed, or remove the keyword"
            )


def _repeated(value: Any, at: str) -> str | None:
    """Return the path of the first array that has an item twice."""
    if isinstance(value, list):
        texts = [json.dumps(item, sort_keys=True) for item in value]
        if len({*texts}) < len(texts):
            return at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for name, part in parts if (found := _repeated(part, f"{at}/{name}"))), None)


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, grammar: Grammar) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._seconds = 0.0

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens are allowed next.

        Raises:
            RequestRefused: no token is, llguidance gives up, or its masks have taken MASK_SECONDS.
        """
        started = time.thread_time()
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        self._seconds += time.thread_time() - started
        if self._seconds > MASK_SECONDS:
            raise RequestRefused(
                f"the masks of the json_schema took more than {MASK_SECONDS:g} s in this answer; make its unions "
                "(recursive ones above all) and patterns smaller"
            )
        allowed: NDArray[np.bool_] = np.unpackbits(mask, bitorder="little").astype(bool)
        if not allowed.any():
            raise RequestRefused(
                "the json_schema allows none of the model's tokens next: its vocabulary lacks characters that the "
                "schema needs; use another schema or another model"
            )
        return allowed

    def accept(self, token: int) -> None:
        """Advance by this token.

        Raises:
            RequestRefused: llguidance gives up.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():  # llguidance never raises, and allows nothing from then on
            raise RequestRefused(
                "the json_schema cannot be enforced to the end of the answer: "
                f"{_first_line(self._matcher.get_error())}. Simplify it"
            )


class Grammars:
    """Compiles schemas for a model; a schema that was refused once is not compiled again.

    Args:
        model: whose vocabulary the matchers use.
        notify: called from another thread when a matcher is ready or its schema is refused.
    """

    def __init__(self, model: NativeModel, notify: Callable[[], None]) -> None:
        self._model = model
        self._notify = notify
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(COMPILERS, thread_name_prefix="schema")
        self._known: OrderedDict[str, Grammar | RequestRefused] = OrderedDict()
        self._late: set[Future[Matcher]] = set()
        self._tokenizer: llguidance.LLTokenizer | None = None

    def matcher(self, schema: dict[str, Any]) -> "Future[Matcher]":
        """Return the matcher for an answer with this schema; it is ready or refused within COMPILE_SECONDS."""
        text = json.dumps(schema)
        matcher: Future[Matcher] = Future()
        with self._lock:
            known = self._known.get(text)
            refused = known if isinstance(known, RequestRefused) else None
            if refused is None and len(self._late) >= COMPILERS:
                refused = RequestRefused(_all_late())
        if refused is not None:
            matcher.set_exception(refused)
        else:
            self._start(text, schema, matcher)
        return matcher

    def _start(self, text: str, schema: dict[str, Any], matcher: "Future[Matcher]") -> None:
        work = self._pool.submit(self._compile, text, schema)
        timer = threading.Timer(COMPILE_SECONDS, self._give_up, (text, work, matcher))
        timer.daemon = True
        timer.start()

        def done(work: "Future[Matcher]") -> None:
            timer.cancel()
            with self._lock:
                self._late.discard(work)
                if not _claimed(matcher):
                    return
                error = work.exception()
                if isinstance(error, RequestRefused):
                    matcher.set_exception(error)
                elif error is not None:
                    matcher.set_exception(RequestRefused(f"json_schema cannot be enforced: {error!r:.300}"))
                else:
                    matcher.set_result(work.result())
            self._notify()

        work.add_done_callback(done)
        matcher.add_done_callback(lambda matcher: work.cancel() if matcher.cancelled() else None)

    def _give_up(self, text: str, work: "Future[Matcher]", matcher: "Future[Matcher]") -> None:
        refused = RequestRefused(
            f"json_schema was not compiled within {COMPILE_SECONDS:g} s; make its patterns, enumerations and unions "
            "smaller"
        )
        queued = not work.running() and not work.done()
        with self._lock:
            if _claimed(matcher):
                matcher.set_exception(RequestRefused(_QUEUED) if queued else refused)
        if not work.cancel():  # it is running and cannot be stopped
            with self._lock:
                if not work.done():
                    self._late.add(work)
            self._remember(text, refused)
        self._notify()

    def _compile(self, text: str, schema: dict[str, Any]) -> "Matcher":
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._model)
        known = self._known.get(text)
        if known is None:
            try:
                known = compiled(self._tokenizer, schema)
            except RequestRefused as refused:
                known = refused
            self._remember(text, known)
        if isinstance(known, RequestRefused):
            raise known
        return known.matcher()

    def _remember(self, text: str, known: Grammar | RequestRefused) -> None:
        with self._lock:
            self._known[text] = known
            while len(self._known) > CACHED:
                self._known.popitem(last=False)


def _claimed(matcher: "Future[Matcher]") -> bool:
    """Return whether a result can be set: it has none and was not cancelled."""
    return not matcher.done() and matcher.set_running_or_notify_cancel()


def compiled(tokenizer: llguidance.LLTokenizer, schema: dict[str, Any]) -> Grammar:
    """Compile a schema.

    Raises:
        RequestRefused: it cannot be enforced; the message names keyword and path.
    """
    import jsonschema_rs

    given = enforceable(schema)
    _check_vocabulary(tokenizer, json.dumps(given.schema, ensure_ascii=False, separators=(",", ":")))
    matcher = _matcher(tokenizer, given.schema)
    if matcher.is_error():
        raise _located(tokenizer, given, matcher.get_error())
    try:
        return Grammar(tokenizer, given)
    except jsonschema_rs.ValidationError as error:  # the validator compiles smaller patterns than llguidance
        large = error.instance
        holders = (at for at, node in given.nodes if large in (node.get("pattern"), *node.get("patternProperties", {})))
        raise RequestRefused(
            f"json_schema at {next(holders, '#')[:300]}: pattern: it is too large for the check of complete answers; "
            "reduce its repetitions"
        ) from error


class _Vocabulary:
    """A model's tokens in the form that llguidance expects; tokens without text are marked as special."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, model: NativeModel) -> None:
        self.eos_tokens = [token for token in range(model.n_vocab) if model.ends(token)]
        self.eos_token_id = self.eos_tokens[0] if self.eos_tokens else None
        self.tokens = [model.piece(token) for token in range(model.n_vocab)]
        self.special_token_ids = [
            token for token, piece in enumerate(self.tokens) if not piece or model.ends(token) or model.is_marker(token)
        ]
        self._tokenize = model.tokenize
        self.tokenizer: llguidance.LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Return the model's own tokens of a text, which llguidance forces where only one text is possible."""
        tokens = self._tokenize(text)
        if b"".join(self.tokens[token] for token in tokens) == text.encode() or self.tokenizer is None:
            return tokens
        return self.tokenizer.greedy_tokenize(text)  # llama.cpp put a space in front, or read a control token


def _tokenizer(model: NativeModel) -> llguidance.LLTokenizer:
    vocabulary = _Vocabulary(model)
    if not vocabulary.eos_tokens:
        raise RequestRefused("the model has no token that ends an answer, so json_schema cannot be used with it")
    tokenizer = llguidance.LLTokenizer(vocabulary, eos_token=vocabulary.eos_tokens)  # type: ignore[arg-type]
    vocabulary.tokenizer = tokenizer
    return tokenizer


def _check_vocabulary(tokenizer: llguidance.LLTokenizer, text: str) -> None:
    """Refuse a schema with a byte that no token has: llguidance would force another token in its place."""
    missing = [c for c in sorted({*text}) if tokenizer.decode_bytes(tokenizer.greedy_tokenize(c)) != c.encode()]
    if missing:
        raise RequestRefused(
            f"the model's vocabulary cannot write {''.join(missing)[:40]!r}, which json_schema needs; use another "
            "schema or another model"
        )


def _matcher(tokenizer: llguidance.LLTokenizer, schema: dict[str, Any]) -> llguidance.LLMatcher:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), overrides=_OPTIONS)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some errors appear only at the first token
    return matcher


def _located(tokenizer: llguidance.LLTokenizer, given: Enforceable, error: str) -> RequestRefused:
    """Find what llguidance refuses: the innermost schema that fails alone in the same way, and its keyword."""
    why = _first_line(error).replace("min/maxProperties", "minProperties and maxProperties")
    definitions = given.schema.get("$defs", {})
    end = time.monotonic() + _LOCATE_SECONDS
    for alone in (dict.fromkeys(definitions, True), definitions):
        for at, node in given.nodes:
            if time.monotonic() > end:
                break
            if not _fails(tokenizer, {**node, "$defs": alone}, error):
                continue
            keywords = [name for name in node if name not in ("type", "$defs")]
            without = ({**{k: v for k, v in node.items() if k != name}, "$defs": alone} for name in keywords)
            found = [name for name, less in zip(keywords, without, strict=True) if not _fails(tokenizer, less, error)]
            keyword = min(found or keywords or ["type"], key=lambda name: (name not in why, name == "properties"))
            return RequestRefused(f"json_schema at {at[:300]}: {keyword}: {why}")
    return RequestRefused(f"json_schema at #: {next(iter(given.schema), 'schema')}: {why}")


def _fails(tokenizer: llguidance.LLTokenizer, schema: dict[str, Any], error: str) -> bool:
    matcher = _matcher(tokenizer, schema)
    return matcher.is_error() and _first_line(matcher.get_error()) in error


def _first_line(error: str) -> str:
    return (error.strip().splitlines() or ["llguidance gave no reason"])[0][:300]


def _all_late() -> str:
    return (
        f"{COMPILERS} other json_schemas take longer than {COMPILE_SECONDS:g} s to compile, so new ones are refused "
        "for now; try again later"
    )
