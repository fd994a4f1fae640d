"""Constrain completions to a JSON Schema with llguidance. Used in the child process only.

A schema is compiled in a thread, because llguidance cannot be interrupted; it releases the GIL, so decoding continues.
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

from finetune_pipeline.inference.errors import AnswerRefused, RequestRefused
from finetune_pipeline.inference.json_schema import EnforceableSchema, rewrite_schema
from finetune_pipeline.inference.native import NativeModel, NativeVocabulary
from finetune_pipeline.schemas import InvalidJsonError, parse_json
from finetune_pipeline.wording import first_line

COMPILE_SECONDS = 10.0
"""A schema that takes longer is refused, but its thread stays busy until llguidance returns."""

COMPILERS = 2
"""Threads that compile schemas. While all of them work on schemas that took too long, new schemas are refused."""

MASK_SECONDS = 10.0
"""CPU time that the token masks of one completion may take; all other completions wait for them."""

CACHED = 16
"""Compiled schemas that are kept; one can take 100 MB."""

_LOCATE_SECONDS = 1.0
_NO_REASON = "llguidance gave no reason"
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=5_000,  # each optional property that may come next adds several
    max_lexer_states=50_000,  # 1 to 2 kB each
    max_grammar_size=20_000,
    verbose_errors=False,  # verbose errors contain tokens of the completion
)
_OPTIONS: Any = {
    "lenient": False,  # otherwise a schema can disable errors with `x-guidance`
    "coerce_one_of": False,
    "whitespace_flexible": False,  # otherwise a weak model may generate white space forever
    "item_separator": r",[\x20]?",
    "key_separator": r":[\x20]?",
    # Without \u each property name has one spelling, so that no property is generated twice in two spellings.
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
}


class Grammar:
    """A schema that can be enforced. Every completion gets its own `Matcher`."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, schema: EnforceableSchema) -> None:
        import jsonschema_rs

        self._tokenizer = tokenizer
        self._schema = schema.schema
        self._validator = jsonschema_rs.Draft202012Validator(schema.checked)

    def matcher(self) -> "Matcher":
        """Return a matcher for one completion; llguidance compiles it in a few milliseconds.

        Copies of one matcher would share its lexer and the lexer's limits: a completion that uses up the lexer's states
        would make all later completions fail.
        """
        return Matcher(_matcher(self._tokenizer, self._schema), self)

    def check(self, text: str) -> None:
        """Check a complete text for what the grammar cannot express: unique items, properties that occur once.

        Raises:
            AnswerRefused: it is not valid; the message names keyword and path.
        """
        try:
            value = parse_json(text)
        except InvalidJsonError as unreadable:  # 1e999 is valid JSON, but no float can hold it
            raise AnswerRefused(f"The model's answer follows the json_schema, but {unreadable}") from unreadable
        if not self._validator.is_valid(value):  # iter_errors takes exponential time in nested anyOf
            repeated = _repeated(value, "#")
            found = (
                f"uniqueItems of json_schema: two items at {repeated[:300]} are equal" if repeated else "json_schema"
            )
            raise AnswerRefused(
                f"The model's answer violates {found}. This can only be checked on a complete answer. Try again with a "
                "temperature and another seed, or remove the keyword."
            )


def _repeated(value: Any, at: str) -> str | None:
    """Return the path of the first array with two equal items."""
    if isinstance(value, list):
        texts = [json.dumps(item, sort_keys=True) for item in value]
        if len({*texts}) < len(texts):
            return at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for name, part in parts if (found := _repeated(part, f"{at}/{name}"))), None)


class Matcher:
    """The state of one completion in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, grammar: Grammar) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._seconds = 0.0

    def allowed(self) -> NDArray[np.bool_]:
        """Return a mask of the tokens that are allowed next.

        Raises:
            AnswerRefused: there is none, llguidance fails, or the masks took more than MASK_SECONDS.
        """
        started = time.thread_time()
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._spent(started)
        allowed: NDArray[np.bool_] = np.unpackbits(mask, bitorder="little").astype(bool)
        if not allowed.any():
            raise AnswerRefused(
                "The json_schema allows none of the model's tokens next, because its vocabulary lacks characters that "
                "the schema needs. Use another schema or another model."
            )
        return allowed

    def allows(self, token: int) -> bool:
        """Return whether this token is allowed next, which takes much less time than the mask of all tokens.

        Raises:
            AnswerRefused: llguidance fails, or masks took more than MASK_SECONDS.
        """
        started = time.thread_time()
        allowed: bool = self._matcher.validate_tokens([token]) == 1
        self._spent(started)
        return allowed

    def accept(self, token: int) -> None:
        """Advance by this token.

        Raises:
            AnswerRefused: llguidance fails.
        """
        self._matcher.consume_token(token)
        self._check()

    def _spent(self, started: float) -> None:
        self._check()
        self._seconds += time.thread_time() - started
        if self._seconds > MASK_SECONDS:
            raise AnswerRefused(
                f"The token masks of the json_schema took more than {MASK_SECONDS:g} s in this answer. Make its "
                "unions (above all recursive ones) and patterns smaller."
            )

    def _check(self) -> None:
        if self._matcher.is_error():  # llguidance does not raise; it allows no token from then on
            raise AnswerRefused(
                "The json_schema cannot be enforced to the end of the answer: "
                f"{first_line(self._matcher.get_error()) or _NO_REASON}. Simplify it."
            )


class GrammarCompiler:
    """Compiles schemas for a model in threads; a schema that was refused once is not compiled again.

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
        """Return a matcher for one completion; the future is done within COMPILE_SECONDS."""
        text = json.dumps(schema)
        matcher: Future[Matcher] = Future()
        with self._lock:
            known = self._known.get(text)
            refused = known if isinstance(known, RequestRefused) else None
            if refused is None and len(self._late) >= COMPILERS:
                refused = RequestRefused(
                    f"{COMPILERS} other json_schemas take longer than {COMPILE_SECONDS:g} s to compile, so new ones "
                    "are refused for now; try again later."
                )
        if refused is not None:
            matcher.set_exception(refused)
            return matcher
        work = self._pool.submit(self._compile, text, schema)
        timer = threading.Timer(COMPILE_SECONDS, self._refuse_late, (text, work, matcher))
        timer.daemon = True
        timer.start()

        def done(work: "Future[Matcher]") -> None:
            timer.cancel()
            with self._lock:
                self._late.discard(work)
                if not _claim(matcher):
                    return
                error = work.exception()
                if isinstance(error, RequestRefused):
                    matcher.set_exception(error)
                elif error is not None:
                    matcher.set_exception(RequestRefused(f"The json_schema cannot be enforced: {error!r:.300}"))
                else:
                    matcher.set_result(work.result())
            self._notify()

        work.add_done_callback(done)
        matcher.add_done_callback(lambda matcher: work.cancel() if matcher.cancelled() else None)
        return matcher

    def _refuse_late(self, text: str, work: "Future[Matcher]", matcher: "Future[Matcher]") -> None:
        late = f"The json_schema was not compiled within {COMPILE_SECONDS:g} s"
        refused = RequestRefused(f"{late}. Make its patterns, enumerations and unions smaller.")
        queued = not work.running() and not work.done()
        with self._lock:
            if _claim(matcher):
                busy = RequestRefused(f"{late}, because others were compiled before it; try again later.")
                matcher.set_exception(busy if queued else refused)
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
                known = compile_grammar(self._tokenizer, schema)
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


def _claim(matcher: "Future[Matcher]") -> bool:
    """Return whether a result may be set: the future has none and was not canceled."""
    return not matcher.done() and matcher.set_running_or_notify_cancel()


def compile_grammar(tokenizer: llguidance.LLTokenizer, schema: dict[str, Any]) -> Grammar:
    """Compile a schema.

    Raises:
        RequestRefused: it cannot be enforced; the message names keyword and path.
    """
    import jsonschema_rs

    rewritten = rewrite_schema(schema)
    # llguidance would replace a byte that no token has by another token.
    text = json.dumps(rewritten.schema, ensure_ascii=False, separators=(",", ":"))
    missing = [c for c in sorted({*text}) if tokenizer.decode_bytes(tokenizer.greedy_tokenize(c)) != c.encode()]
    if missing:
        raise RequestRefused(
            f"The model's vocabulary cannot write {''.join(missing)[:40]!r}, which json_schema needs. Use another "
            "schema or another model."
        )
    matcher = _matcher(tokenizer, rewritten.schema)
    if matcher.is_error():
        raise _locate_error(tokenizer, rewritten, matcher.get_error())
    try:
        return Grammar(tokenizer, rewritten)
    except jsonschema_rs.ValidationError as error:  # the validator compiles only smaller patterns than llguidance does
        pattern = error.instance
        paths = (
            path
            for path, node in rewritten.nodes
            if pattern in (node.get("pattern"), *node.get("patternProperties", {}))
        )
        raise RequestRefused(
            f"json_schema at {next(paths, '#')[:300]}: pattern: it is too large for the check of complete answers; "
            "reduce its repetitions."
        ) from error


def check_schema(vocabulary: NativeVocabulary, schema: dict[str, Any]) -> None:
    """Check that a schema can be enforced with a model's vocabulary.

    Raises:
        RequestRefused: it cannot; the message says why.
    """
    compile_grammar(_tokenizer(vocabulary), schema)


class _Vocabulary:
    """A model's tokens as llguidance expects them; tokens without text are marked as special."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, model: NativeVocabulary) -> None:
        self.eos_tokens = [token for token in range(model.n_vocab) if model.is_end_of_generation(token)]
        self.eos_token_id = self.eos_tokens[0] if self.eos_tokens else None
        self.tokens = [model.token_bytes(token) for token in range(model.n_vocab)]
        self.special_token_ids = [
            token
            for token, text in enumerate(self.tokens)
            if not text or model.is_end_of_generation(token) or model.is_control(token)
        ]
        self._tokenize = model.tokenize
        self.tokenizer: llguidance.LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Return the model's own tokens of a text; llguidance forces them where only one text is possible."""
        tokens = self._tokenize(text)
        if b"".join(self.tokens[token] for token in tokens) == text.encode() or self.tokenizer is None:
            return tokens
        return self.tokenizer.greedy_tokenize(text)  # llama.cpp added a space, or parsed a control token


def _tokenizer(model: NativeVocabulary) -> llguidance.LLTokenizer:
    vocabulary = _Vocabulary(model)
    if not vocabulary.eos_tokens:
        raise RequestRefused("The model has no end-of-generation token, so json_schema cannot be used with it.")
    tokenizer = llguidance.LLTokenizer(vocabulary, eos_token=vocabulary.eos_tokens)  # type: ignore[arg-type]
    vocabulary.tokenizer = tokenizer
    return tokenizer


def _matcher(tokenizer: llguidance.LLTokenizer, schema: dict[str, Any]) -> llguidance.LLMatcher:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema, ensure_ascii=False), overrides=_OPTIONS)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some errors appear only at the first token
    return matcher


def _locate_error(tokenizer: llguidance.LLTokenizer, rewritten: EnforceableSchema, error: str) -> RequestRefused:
    """Find the innermost subschema that fails alone with the same error, and the keyword that causes it."""
    why = (first_line(error) or _NO_REASON).replace("min/maxProperties", "minProperties and maxProperties")
    definitions = rewritten.schema.get("$defs", {})
    end = time.monotonic() + _LOCATE_SECONDS
    for other_definitions in (dict.fromkeys(definitions, True), definitions):
        for at, node in rewritten.nodes:
            if time.monotonic() > end:
                break
            if not _fails(tokenizer, {**node, "$defs": other_definitions}, error):
                continue
            keywords = [name for name in node if name not in ("type", "$defs")]
            without = (
                {**{k: v for k, v in node.items() if k != name}, "$defs": other_definitions} for name in keywords
            )
            found = [name for name, less in zip(keywords, without, strict=True) if not _fails(tokenizer, less, error)]
            keyword = min(found or keywords or ["type"], key=lambda name: (name not in why, name == "properties"))
            return RequestRefused(f"json_schema at {at[:300]}: {keyword}: {why}")
    return RequestRefused(f"json_schema at #: {next(iter(rewritten.schema), 'schema')}: {why}")


def _fails(tokenizer: llguidance.LLTokenizer, schema: dict[str, Any], error: str) -> bool:
    matcher = _matcher(tokenizer, schema)
    return matcher.is_error() and first_line(matcher.get_error()) in error
