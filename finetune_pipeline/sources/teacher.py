"""A teacher: a model behind any OpenAI-compatible endpoint that writes what is missing for training.

What it has answered is kept under `$FINETUNE_HOME/cache/teacher`, by a hash of the model and of all that it was asked,
so that nothing is paid for twice, whatever becomes of the reading. What it answers is text to be judged by who asked.
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
from finetune_pipeline.settings import TeacherSettings, home
from finetune_pipeline.sources.source_record import SourceError

_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 300.0
_LARGEST_BODY = 10_000_000
_GIVEN_UP_IN_A_ROW = 3
_SAID = 200
_BYTES_A_TOKEN = 3  # few tokenizers need more tokens than that on code or prose
_OVERHEAD = 50  # tokens of a chat template
_THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_REFUSAL = re.compile(
    r"(?i)^\W*(?:(?:i['’]?m|i am) (?:very |so |really )?(?:sorry|afraid|unable|not able)|sorry\b|i apologi[sz]e"
    r"|unfortunately\b|i (?:cannot|can['’]t|could not|couldn['’]t|won['’]t|will not|must decline|do not feel)\b"
    r"|as an ai\b|as a (?:large )?language model)"
)

T = TypeVar("T")


@dataclass(frozen=True)
class TeacherRequest:
    """What the teacher is asked, and how many tokens its answer may have."""

    system: str
    user: str
    max_answer: int


@dataclass(frozen=True)
class TeacherAnswer(Generic[T]):
    """What came of a question: a text, or the reason why there is none.

    Attributes:
        deferred: asked again, at another time or with more budget, the teacher may well answer.
    """

    asked_for: T
    text: str = ""
    reason: str = ""
    deferred: bool = False


@dataclass(frozen=True)
class _Reply:
    """A paid reply, as it is kept."""

    text: str
    refusal: str
    finish_reason: str


class _NotNow(Exception):
    """A request came to nothing this time."""

    def __init__(self, reason: str, retry_after: float | None = None, *, may_be_paid: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.may_be_paid = may_be_paid


class _GivenUp(Exception):
    """A question gets no answer in this reading."""


class _Refused(Exception):
    """The endpoint does not take this very request."""


class _OverBudget(Exception):
    """There are no tokens left to ask."""


def is_refusal(text: str) -> bool:
    """Whether a text says that its writer will not do what was asked."""
    return _REFUSAL.match(text) is not None


class Budget:
    """Tokens that may still be spent, shared by threads; what is on its way counts in full until it has come."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens
        self._under_way = 0
        self._changed = threading.Condition()

    def reserve(self, tokens: int) -> bool:
        """Take tokens out; where there are too few, wait for what those under way give back."""
        with self._changed:
            self._changed.wait_for(lambda: tokens <= self._left or not self._under_way)
            if tokens > self._left:
                return False
            self._left -= tokens
            self._under_way += 1
            return True

    def settle(self, reserved: int, spent: int) -> None:
        """Give back what of a reservation was not spent, or take what it had been too small for."""
        with self._changed:
            self._left += reserved - spent
            self._under_way -= 1
            self._changed.notify_all()


class Teacher:
    """Asks one model, several questions at a time, within a budget.

    Raises:
        SourceError: the key is not in the environment.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        self.settings = settings
        self._key = _key(settings)
        self._budget = Budget(settings.max_tokens)
        self._limit = "max_tokens"
        self._not_before = 0.0
        self._stopped = threading.Event()
        self._client = _client(settings, self._key)

    def answers(self, questions: Iterable[tuple[T, TeacherRequest]]) -> Iterator[TeacherAnswer[T]]:
        """The answers, in the order of the questions, each with what it was asked for.

        When the budget is spent, what is kept from earlier is still given, and the rest has the reason "budget".

        Raises:
            SourceError: the endpoint cannot be used: wrong key or model, or it does not answer again and again.
        """
        waiting: deque[tuple[T, Future[str]]] = deque()
        given_up = 0
        executor = ThreadPoolExecutor(self.settings.parallel, thread_name_prefix="teacher")
        try:
            for asked_for, question in questions:
                waiting.append((asked_for, executor.submit(self._answer, question)))
                if len(waiting) > 2 * self.settings.parallel:
                    answer, given_up = self._collect(*waiting.popleft(), given_up)
                    yield answer
            while waiting:
                answer, given_up = self._collect(*waiting.popleft(), given_up)
                yield answer
        finally:
            # What is under way is paid for: its answers are waited for and kept.
            self._stopped.set()
            executor.shutdown(wait=True, cancel_futures=True)
            self._client.close()

    def _collect(self, asked_for: T, future: Future[str], given_up: int) -> tuple[TeacherAnswer[T], int]:
        try:
            return TeacherAnswer(asked_for, future.result()), 0
        except _OverBudget:
            reason = (
                f"budget: no tokens are left of the {self.settings.max_tokens:,} of one reading (teacher.max_tokens); "
                "the next reading goes on here"
            )
            return TeacherAnswer(asked_for, reason=reason, deferred=True), given_up
        except _Refused as error:
            return TeacherAnswer(asked_for, reason=str(error)), 0
        except _GivenUp as error:
            if given_up + 1 >= _GIVEN_UP_IN_A_ROW:
                raise SourceError(
                    f"the teacher {self.settings.url} answered none of {_GIVEN_UP_IN_A_ROW} questions in a row "
                    f"({error}); look at it, then read again: what it has answered is kept"
                ) from error
            return TeacherAnswer(asked_for, reason=f"the teacher gave no answer: {error}", deferred=True), given_up + 1

    def _answer(self, question: TeacherRequest) -> str:
        messages = [{"role": "system", "content": question.system}, {"role": "user", "content": question.user}]
        key = hash_of([self.settings.model, messages, question.max_answer])
        path = home() / "cache" / "teacher" / key[:2] / f"{key}.json"
        reply = _kept(path)
        if reply is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whoever asks the same at the same time, here or in another process, waits and finds the answer.
            with FileLock(f"{path.parent}.lock"):
                reply = _kept(path)
                if reply is None:
                    reply = self._ask(messages, question)
                    write_text(path, json.dumps({**asdict(reply), "model": self.settings.model}) + "\n")
        return _usable(reply, question.max_answer)

    def _ask(self, messages: list[dict[str, str]], question: TeacherRequest) -> _Reply:
        wait = _FIRST_WAIT
        for attempt in range(1, self.settings.attempts + 1):
            self._wait_until_allowed()
            try:
                return self._once(messages, question)
            except _NotNow as error:
                if attempt == self.settings.attempts:
                    raise _GivenUp(f"{error} ({attempt} tries)") from error
                self._back_off(error, wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, messages: list[dict[str, str]], question: TeacherRequest) -> _Reply:
        asked = _OVERHEAD + _tokens(question.system) + _tokens(question.user)
        reserved, spent = asked + question.max_answer, 0
        if not self._budget.reserve(reserved):
            raise _OverBudget
        try:
            reply, said = _read_reply(self._post(messages, question.max_answer))
            spent = said or asked + _tokens(reply.text)
            return reply
        except _NotNow as error:
            spent = reserved if error.may_be_paid else 0
            raise
        finally:
            self._budget.settle(reserved, spent)

    def _back_off(self, error: _NotNow, wait: float) -> None:
        if error.retry_after is None:
            self._stopped.wait(wait * random.uniform(0.5, 1.0))
        elif error.retry_after > _LONGEST_RETRY_AFTER:
            raise _GivenUp(f"{error}, and asks to come back in {error.retry_after:.0f} seconds") from error
        else:  # it is said to all of us
            self._not_before = max(self._not_before, time.monotonic() + error.retry_after)

    def _wait_until_allowed(self) -> None:
        while not self._stopped.is_set() and (left := self._not_before - time.monotonic()) > 0:
            self._stopped.wait(left + random.uniform(0.0, 0.1))
        if self._stopped.is_set():
            raise _GivenUp("the reading ended")

    def _post(self, messages: list[dict[str, str]], max_answer: int) -> Any:
        limit = self._limit
        body = {"model": self.settings.model, "messages": messages, limit: max_answer}
        status, headers, content = self._send(body)
        said = self._said(content)
        if status == 400 and limit == "max_tokens" and "max_completion_tokens" in said:
            self._limit = "max_completion_tokens"  # OpenAI's newer models have only this name
            return self._post(messages, max_answer)
        if status in {408, 409, 425, 429} or status >= 500:
            raise _NotNow(f"it answered {status}: {said}", _retry_after(headers.get("Retry-After")))
        if status in {400, 413, 422}:
            raise _Refused(f"the teacher refused the request ({status}): {said}")
        if status != 200:
            raise SourceError(
                f"the teacher {self.settings.url} answered {status} for the model {self.settings.model!r}; correct "
                f"teacher.url, teacher.model or the key in {self.settings.api_key_env or 'teacher.api_key_env'}"
            )
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _NotNow(f"it sent what is no JSON: {said}", may_be_paid=True) from None

    def _send(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and content, all within the timeout: one that trickles is too slow too."""
        content, end = bytearray(), time.monotonic() + self.settings.timeout_seconds
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > end or len(content) > _LARGEST_BODY:
                        raise _NotNow("its answer is too long, or takes too long", may_be_paid=True)
                return response.status_code, response.headers, bytes(content)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _NotNow(f"it cannot be reached ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise _NotNow(f"it broke off or was too slow ({type(error).__name__})", may_be_paid=True) from error

    def _said(self, content: bytes) -> str:
        text = " ".join(content[: 10 * _SAID].decode("utf-8", "replace").replace("\0", "").split())
        return (text.replace(self._key, "[KEY]") if self._key else text)[:_SAID]


def _key(settings: TeacherSettings) -> str:
    if settings.api_key_env is None:
        return ""
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise SourceError(f"{settings.api_key_env} is not set; export the teacher's key for {settings.url} in it")
    if not key.isascii() or not key.isprintable():
        raise SourceError(f"what {settings.api_key_env} holds is no key; export the teacher's key in it")
    return key


def _client(settings: TeacherSettings, key: str) -> httpx.Client:
    try:
        return httpx.Client(
            base_url=settings.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(settings.timeout_seconds, connect=min(10.0, settings.timeout_seconds), pool=None),
            limits=httpx.Limits(max_connections=settings.parallel),
        )
    except httpx.InvalidURL as error:
        raise SourceError(f"teacher.url {settings.url!r} is no address ({error}); correct it") from error


def _kept(path: Path) -> _Reply | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _Reply(str(document["text"]), str(document["refusal"]), str(document["finish_reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_reply(document: Any) -> tuple[_Reply, int]:
    """What was answered, and the tokens that it cost (0: it does not say)."""
    try:
        choice = document["choices"][0]
        text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal") or ""
        if not isinstance(text, str) or not isinstance(refusal, str):
            raise TypeError("the content is no text")
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no character
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _NotNow(f"it sent what is no chat completion ({type(error).__name__})", may_be_paid=True) from None
    usage = document.get("usage")
    used = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    counts = [count for count in used if isinstance(count, int) and count > 0]
    return _Reply(text, refusal, str(choice.get("finish_reason"))), sum(counts) if len(counts) == 2 else 0


def _usable(reply: _Reply, max_answer: int) -> str:
    text = _THOUGHTS.sub("", reply.text, count=1).strip()
    if reply.refusal or is_refusal(text):
        raise _Refused("the teacher refused to answer")
    if reply.finish_reason == "length":
        raise _Refused(f"the teacher's answer was cut off at {max_answer:,} tokens")
    if not text:
        raise _Refused("the teacher's answer is empty")
    return text


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / _BYTES_A_TOKEN)


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a header that gives seconds or a date."""
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
