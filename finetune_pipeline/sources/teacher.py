"""A teacher: a model behind any OpenAI-compatible endpoint that writes what is missing for training.

Replies are cached under `$FINETUNE_HOME/cache/teacher`, by a hash of the model and the request, so that nothing is paid
for twice, even if the sync fails. The caller validates what a teacher writes.
"""

import json
import math
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
from filelock import FileLock

from finetune_pipeline.artifacts import hash_of, write_text
from finetune_pipeline.refusals import may_be_refusal
from finetune_pipeline.settings import TeacherSettings, home
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError

_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 300.0
_LARGEST_BODY = 10_000_000
_MAX_FAILURES_IN_A_ROW = 3
_MESSAGE_CHARACTERS = 200
_BYTES_PER_TOKEN = 3  # few tokenizers need more tokens than that on code or prose
_TEMPLATE_TOKENS = 50  # of a chat template
_THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)

T = TypeVar("T")


@dataclass(frozen=True)
class TeacherRequest(Generic[T]):
    """The messages for the teacher about one record."""

    provenance: str
    task: T  # data of the caller; it is not sent
    system: str
    user: str
    max_tokens: int  # limit of the answer


@dataclass(frozen=True)
class _Reply:
    """A paid reply, as it is cached."""

    text: str
    refusal: str
    finish_reason: str


class _RetryableError(Exception):
    """A request failed in a way that a retry may fix."""

    def __init__(self, reason: str, retry_after: float | None = None, *, may_be_paid: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds that the endpoint asks to wait
        self.may_be_paid = may_be_paid  # the endpoint may have charged for it


class _GivenUp(Exception):
    """All tries of a request failed."""


class _Rejected(Exception):
    """The endpoint rejects this request, or its answer cannot be used. A retry would give the same."""


class _BudgetSpent(Exception):
    """Too few tokens are left for the request."""


class Teacher:
    """Sends requests to one model, several at a time, within a budget.

    Raises:
        SourceError: the key is not in the environment.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        self.settings = settings
        self._key = os.environ.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
        if settings.api_key_env and not self._key:
            raise SourceError(f"{settings.api_key_env} is not set; export the teacher's key for {settings.url} in it")
        if not self._key.isascii() or not self._key.isprintable():
            raise SourceError(f"the value of {settings.api_key_env} is not a key; export the teacher's key in it")
        self._tokens_left = settings.max_tokens
        self._running = 0  # requests
        self._budget_changed = threading.Condition()
        self._limit_field = "max_tokens"
        self._not_before = 0.0
        self._stopped = threading.Event()
        try:
            self._client = httpx.Client(
                base_url=settings.url.rstrip("/") + "/",
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=httpx.Timeout(settings.timeout_seconds, connect=min(10.0, settings.timeout_seconds), pool=None),
                limits=httpx.Limits(max_connections=settings.parallel),
            )
        except httpx.InvalidURL as error:
            raise SourceError(f"teacher.url {settings.url!r} is not a URL ({error}); correct it") from error

    def answers(
        self, requests: Iterable[TeacherRequest[T] | SkippedRecord]
    ) -> Iterator[tuple[TeacherRequest[T], str] | SkippedRecord]:
        """Yield each request with its answer, in order. A request without an answer becomes a skipped record.

        When the budget is spent, cached answers are still given, and the others have the reason "budget". Skipped
        records among the requests are passed through.

        Raises:
            SourceError: the endpoint cannot be used: the key or model is wrong, or it does not answer repeatedly.
        """
        pending, waiting = iter(requests), deque[tuple[TeacherRequest[T], Future[str]]]()
        failures = 0  # requests in a row that got no answer
        executor = ThreadPoolExecutor(self.settings.parallel, thread_name_prefix="teacher")
        try:
            while True:
                while len(waiting) <= 2 * self.settings.parallel and (one := next(pending, None)) is not None:
                    if isinstance(one, SkippedRecord):
                        yield one
                    else:
                        waiting.append((one, executor.submit(self._answer, one)))
                if not waiting:
                    return
                request, future = waiting.popleft()
                try:
                    text = future.result()
                except _BudgetSpent:
                    tokens = self.settings.max_tokens
                    reason = f"budget: the {tokens:,} tokens of one sync (teacher.max_tokens) are spent"
                    yield SkippedRecord(request.provenance, f"{reason}; the next sync resumes here", deferred=True)
                except _Rejected as error:
                    failures = 0
                    yield SkippedRecord(request.provenance, str(error))
                except _GivenUp as error:
                    failures += 1
                    if failures == _MAX_FAILURES_IN_A_ROW:
                        raise SourceError(
                            f"the teacher {self.settings.url} answered none of {failures} requests in a row ({error}); "
                            "check the endpoint, then run again: its earlier answers are kept"
                        ) from error
                    yield SkippedRecord(request.provenance, f"the teacher gave no answer: {error}", deferred=True)
                else:
                    failures = 0
                    yield request, text
        finally:
            # Running requests are paid for, so their answers are waited for and cached.
            self._stopped.set()
            executor.shutdown(wait=True, cancel_futures=True)
            self._client.close()

    def _answer(self, request: TeacherRequest[Any]) -> str:
        """Return the answer from the cache or the endpoint."""
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        key = hash_of([self.settings.model, messages, request.max_tokens])
        path = home() / "cache" / "teacher" / key[:2] / f"{key}.json"
        reply = _read_cache(path)
        if reply is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The same request in another thread or process waits here, and then finds the answer.
            with FileLock(f"{path.parent}.lock"):
                reply = _read_cache(path)
                if reply is None:
                    reply = self._send_with_retries(messages, request)
                    write_text(path, json.dumps({**asdict(reply), "model": self.settings.model}) + "\n")
        text = _THOUGHTS.sub("", reply.text, count=1).strip()
        if reply.refusal or may_be_refusal(text):
            raise _Rejected("the teacher refused to answer")
        if reply.finish_reason == "length":
            raise _Rejected(f"the teacher's answer was cut off at {request.max_tokens:,} tokens")
        if not text:
            raise _Rejected("the teacher's answer is empty")
        return text

    def _send_with_retries(self, messages: list[dict[str, str]], request: TeacherRequest[Any]) -> _Reply:
        wait = _FIRST_WAIT
        for attempt in range(1, self.settings.attempts + 1):
            while not self._stopped.is_set() and (left := self._not_before - time.monotonic()) > 0:
                self._stopped.wait(left + random.uniform(0.0, 0.1))
            if self._stopped.is_set():
                raise _GivenUp("the sync ended")
            try:
                return self._send_within_budget(messages, request)
            except _RetryableError as error:
                if attempt == self.settings.attempts:
                    raise _GivenUp(f"{error} ({attempt} tries)") from error
                if error.retry_after is None:
                    self._stopped.wait(wait * random.uniform(0.5, 1.0))
                elif error.retry_after > _LONGEST_RETRY_AFTER:
                    reason = f"{error}, and asks to retry after {error.retry_after:.0f} seconds"
                    raise _GivenUp(reason) from error
                else:  # applies to all threads
                    self._not_before = max(self._not_before, time.monotonic() + error.retry_after)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("unreachable: the last try returns or raises")

    def _send_within_budget(self, messages: list[dict[str, str]], request: TeacherRequest[Any]) -> _Reply:
        prompt_tokens = _TEMPLATE_TOKENS + _estimated_tokens(request.system) + _estimated_tokens(request.user)
        reserved, spent = prompt_tokens + request.max_tokens, 0
        with self._budget_changed:
            # A running request counts with its largest possible cost, and gives back what it did not spend.
            self._budget_changed.wait_for(lambda: reserved <= self._tokens_left or not self._running)
            if reserved > self._tokens_left:
                raise _BudgetSpent
            self._tokens_left -= reserved
            self._running += 1
        try:
            reply, usage = _parse_completion(self._post(messages, request.max_tokens))
            spent = usage or prompt_tokens + _estimated_tokens(reply.text)
            return reply
        except _RetryableError as error:
            spent = reserved if error.may_be_paid else 0
            raise
        finally:
            with self._budget_changed:
                self._tokens_left += reserved - spent
                self._running -= 1
                self._budget_changed.notify_all()

    def _post(self, messages: list[dict[str, str]], max_tokens: int) -> Any:
        """Return the endpoint's JSON. The timeout applies to the complete answer."""
        limit_field = self._limit_field
        body = {"model": self.settings.model, "messages": messages, limit_field: max_tokens}
        content, end = bytearray(), time.monotonic() + self.settings.timeout_seconds
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > end or len(content) > _LARGEST_BODY:
                        raise _RetryableError("its answer is too long, or takes too long", may_be_paid=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _RetryableError(f"it cannot be reached ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            reason = f"it closed the connection or was too slow ({type(error).__name__})"
            raise _RetryableError(reason, may_be_paid=True) from error
        status = response.status_code
        message = " ".join(content[: 10 * _MESSAGE_CHARACTERS].decode("utf-8", "replace").replace("\0", "").split())
        message = (message.replace(self._key, "[KEY]") if self._key else message)[:_MESSAGE_CHARACTERS]
        if status == 400 and limit_field == "max_tokens" and "max_completion_tokens" in message:
            self._limit_field = "max_completion_tokens"  # OpenAI's newer models have only this name
            return self._post(messages, max_tokens)
        if status in {408, 409, 425, 429} or status >= 500:
            retry_after = _retry_after(response.headers.get("Retry-After"))
            raise _RetryableError(f"it answered {status}: {message}", retry_after)
        if status in {400, 413, 422}:
            raise _Rejected(f"the teacher rejected the request ({status}): {message}")
        if status != 200:
            raise SourceError(
                f"the teacher {self.settings.url} answered {status} for the model {self.settings.model!r}; correct "
                f"teacher.url, teacher.model or the key in {self.settings.api_key_env or 'teacher.api_key_env'}"
            )
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _RetryableError(f"its answer is not JSON: {message}", may_be_paid=True) from None


def _read_cache(path: Path) -> _Reply | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _Reply(str(document["text"]), str(document["refusal"]), str(document["finish_reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parse_completion(document: Any) -> tuple[_Reply, int]:
    """Return a reply and its cost in tokens (0 if the endpoint does not say)."""
    try:
        choice = document["choices"][0]
        text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal") or ""
        if not isinstance(text, str) or not isinstance(refusal, str):
            raise TypeError("the content is not text")
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be stored
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"its answer is not a chat completion ({type(error).__name__})"
        raise _RetryableError(reason, may_be_paid=True) from None
    usage = document.get("usage")
    used = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    counts = [count for count in used if isinstance(count, int) and count > 0]
    return _Reply(text, refusal, str(choice.get("finish_reason"))), sum(counts) if len(counts) == 2 else 0


def _estimated_tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)


def _retry_after(value: str | None) -> float | None:
    """Return the seconds to wait by a Retry-After header, which gives seconds or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
