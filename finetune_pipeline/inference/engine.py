"""The parent's handle of a model that runs in a child process. Thread-safe: all threads' requests share the batch."""

import hashlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import finetune_pipeline
from finetune_pipeline.inference.errors import (
    BY_NAME,
    EngineClosed,
    EngineCrashed,
    EngineError,
    EngineStuck,
    RequestRefused,
)
from finetune_pipeline.inference.protocol import LOAD_ID, Completion, EngineInfo, GenerateRequest, ModelSpec
from finetune_pipeline.inference.threads import SPIN_COUNT
from finetune_pipeline.records import Message

CLOSE_SECONDS = 5.0
"""How long a child may take to exit before it is killed."""

_REBUILD = (
    "llama.cpp crashed in native code. Rebuild it for a plain processor (some builds crash on quantised models where "
    'the processor has AMX): CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --force-reinstall --no-cache-dir --no-deps '
    "--no-binary llama-cpp-python llama-cpp-python"
)
_KILLED = (
    "it was killed from outside, by somebody or by the system because memory ran out: use a smaller model, context or "
    "parallel, or free some memory"
)
_WHAT_TO_DO = {
    "SIGKILL": _KILLED,
    "SIGTERM": _KILLED,
    "SIGSEGV": _REBUILD,
    "SIGILL": _REBUILD,
    "SIGBUS": _REBUILD + "; or the model file changed while it was in use",
    "SIGABRT": "llama.cpp stopped itself; the lines above say why. If they do not help, " + _REBUILD,
}

WHERE_SECONDS = 1.0
"""Time that a stuck child has to report whose token it is choosing."""


@dataclass(frozen=True)
class _Waiting:
    """A request whose result is pending."""

    future: "Future[Any]"
    on_delta: Callable[[str], None] | None = None
    schema: dict[str, Any] | None = None


class Engine:
    """A model in a child process of its own, from construction until `close`.

    `spec` says what runs; its adapter is the present one.

    The child dies with this process, also by kill -9; when the child dies, every pending request fails with
    EngineCrashed, and so does every later one: open a new engine then. A child that has work and makes no progress for
    `spec.stuck_seconds` is killed; the request with a schema that it was stuck in is refused, never retried.

    Args:
        spec: which model, and how much of it at once.

    Raises:
        ModelNotLoaded: the file is missing, not a GGUF, truncated, or memory does not suffice.
        EngineCrashed: the child died while it loaded.
    """

    info: EngineInfo

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._ids = itertools.count(LOAD_ID + 1)
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._ended: EngineError | None = None
        self._said: deque[str] = deque(maxlen=30)
        loaded: Future[Any] = Future()
        self._waiting: dict[int, _Waiting] = {LOAD_ID: _Waiting(loaded)}
        self._silent = 0.0
        self._stuck = False
        self._at: Future[int] = Future()
        self._gone = threading.Event()
        started: Future[subprocess.Popen[str]] = Future()
        # The kernel ties a child to the *thread* that started it: this one lives exactly as long as the child.
        threading.Thread(target=self._supervise, args=(started,), name=f"engine {spec.gguf.name}", daemon=True).start()
        self._process = started.result()
        try:
            self._write({"op": "load", "spec": spec.model_dump(mode="json")})
            self.info = EngineInfo.model_validate(loaded.result())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._ended is None

    @property
    def ended(self) -> EngineError | None:
        """The error that ended it; None while it runs."""
        return self._ended

    def render(self, messages: list[Message]) -> str:
        """The text that the model sees for these messages: its own chat template, with the prompt for the answer.

        Raises:
            RequestRefused: the model has no chat template, or it refuses these messages.
        """
        text: str = self._ask({"op": "render", "messages": messages}).result()
        return text

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, control tokens in it read as such and nothing added."""
        tokens: list[int] = self._ask({"op": "tokenize", "text": text}).result()
        return tokens

    def encode(self, messages: list[Message]) -> list[int]:
        """Return the tokens that the model sees for these messages; control tokens are the chat template's own.

        Where no message holds a control token, they are what transformers' `apply_chat_template(tokenize=True)` gives:
        a template that wants a beginning-of-sequence token writes it itself.

        Raises:
            RequestRefused: as `render` does.
        """
        tokens: list[int] = self._ask({"op": "encode", "messages": messages}).result()
        return tokens

    def submit(self, request: GenerateRequest, on_delta: Callable[[str], None] | None = None) -> "Future[Completion]":
        """Start a request; its future ends with the completion or an EngineError. Cancelling it frees its place.

        Callbacks, of the future too, run in the engine's own thread: they must not wait for the engine.

        Args:
            on_delta: called with the answer's text in pieces as they come, before the future ends. What it raises ends
                this request alone, and its future raises it.

        Raises:
            EngineCrashed, EngineClosed: the engine has ended already.
        """
        order = {"op": "generate", "request": request.model_dump(mode="json"), "stream": on_delta is not None}
        return self._ask(order, on_delta, request.json_schema)

    def swap_adapter(self, adapter: Path | None) -> "Future[None]":
        """Change to another LoRA adapter of the same base, or to the base alone; the future ends when it is done.

        Requests that were submitted before are answered with the old adapter, those after with the new one: these wait
        until the running answers have ended, and no answer is by two adapters. Cancelling the future before that
        leaves the old one. llama.cpp tells adapters of another base by names and shapes only: which base an adapter
        was trained on is the caller's to know.

        Raises:
            ModelNotLoaded: (by the future) the file is missing, no adapter, or of another base; the old one stays.
            EngineCrashed, EngineClosed: the engine has ended.
        """
        return self._ask({"op": "swap", "adapter": str(adapter) if adapter else None})

    def generate(
        self, requests: Sequence[GenerateRequest], progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """Answer all requests, in their order.

        What else is in the batch changes the last digits of the logits, never more: a greedy answer is the same alone
        and in company unless two tokens were as good as equally probable at some step.

        Args:
            requests: any number; `spec.parallel` of them are decoded together.
            progress: called from this thread with the number of answers that are done.

        Raises:
            RequestRefused: one of them cannot be answered; the others are cancelled.
            EngineCrashed: the child died.
        """
        futures = [self.submit(request) for request in requests]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress:
                    progress(done)
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def stream(self, request: GenerateRequest) -> Iterator[str | Completion]:
        """The answer's text in pieces as they come, then the completion; leaving it early cancels the rest."""
        arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        future = self.submit(request, arrived.put)
        future.add_done_callback(lambda _: arrived.put(None))
        try:
            yield from iter(arrived.get, None)
            yield future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """End the child; requests that are not done fail with EngineClosed. May be called again."""
        self._end(EngineClosed(f"the engine of {self.spec.gguf} was closed; open a new one to ask again"))
        with self._writing:
            _close_quietly(self._process.stdin)
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(
        self,
        order: dict[str, Any],
        on_delta: Callable[[str], None] | None = None,
        schema: dict[str, Any] | None = None,
    ) -> "Future[Any]":
        id, future = next(self._ids), Future[Any]()
        with self._lock:
            if self._ended:
                raise self._ended
            self._waiting[id] = _Waiting(future, on_delta, schema)
        future.add_done_callback(lambda done: self._forget(id) if done.cancelled() else None)
        self._write({**order, "id": id})
        return future

    def _forget(self, id: int) -> None:
        with self._lock:
            known = self._waiting.pop(id, None)
        if known:
            self._write({"op": "cancel", "id": id})

    def _write(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._writing:
            try:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
            except (OSError, ValueError):  # the child is gone; the supervisor says so to every future
                pass

    def _supervise(self, started: "Future[subprocess.Popen[str]]") -> None:
        try:
            process = start_child()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(process)
        listener = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        listener.start()
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self._silent = 0.0
                self._receive(json.loads(line))
        except Exception as error:  # a line that is none of ours: nobody must wait for ever because of it
            self._said.append(f"its output could not be read: {error!r}")
            process.kill()
        process.wait()
        self._gone.set()
        listener.join(1.0)
        self._refuse_suspects()
        self._end(self._crash(process.returncode))
        _close_quietly(process.stdout)

    def _watch(self, process: "subprocess.Popen[str]") -> None:
        """Kill the child when it has work and sends nothing; time in which this process is stopped does not count."""
        tick = min(1.0, self.spec.stuck_seconds / 5)
        while not self._gone.wait(tick):
            with self._lock:
                has_work = bool(self._waiting) and LOAD_ID not in self._waiting  # loading a large file takes minutes
            self._silent = self._silent + tick if has_work else 0.0
            if self._silent >= self.spec.stuck_seconds:
                # In a thread: the pipe of a child that reads nothing may be full.
                threading.Thread(target=self._write, args=({"op": "where"},), daemon=True).start()
                with suppress(TimeoutError):
                    self._at.result(WHERE_SECONDS)
                self._stuck = True
                process.kill()
                return

    def _refuse_suspects(self) -> None:
        """Refuse the request that the child was stuck in; if it could not say which, every request with a schema."""
        if not self._stuck:
            return
        at = self._at.result() if self._at.done() else 0
        with self._lock:
            suspects = [id for id, who in self._waiting.items() if who.schema is not None and at in (0, id)]
            refused = [self._waiting.pop(id) for id in suspects]
        for who in refused:
            if who.future.set_running_or_notify_cancel():
                who.future.set_exception(
                    RequestRefused(
                        f"the model made no progress for {self.spec.stuck_seconds:g} s while it answered with "
                        f"{_named(who.schema)}, and its process was ended; simplify this schema"
                    )
                )

    def _listen(self, stderr: IO[str]) -> None:
        with stderr:
            for line in stderr:
                self._said.append(line.rstrip())

    def _receive(self, message: dict[str, Any]) -> None:
        if "at" in message and not self._at.done():
            self._at.set_result(message["at"])
        if "id" not in message:
            return
        with self._lock:
            who = self._waiting.get(message["id"])
            if "piece" not in message:
                self._waiting.pop(message["id"], None)
        if "adapter" in message:  # also when its future was cancelled too late
            adapter = message["adapter"]
            self.spec = self.spec.model_copy(update={"adapter": Path(adapter) if adapter else None})
        if who is None:  # cancelled
            return
        future = who.future
        if "piece" in message:
            self._hand_on(message, future, who.on_delta)
        elif future.set_running_or_notify_cancel():
            if "error" in message:
                future.set_exception(BY_NAME[message["error"]](message["message"]))
            else:
                future.set_result(_result_of(message["result"]))

    def _hand_on(self, message: dict[str, Any], future: "Future[Any]", on_delta: Callable[[str], None] | None) -> None:
        try:
            if on_delta:
                on_delta(message["piece"])
        except Exception as error:  # the caller's own fault: the requests of others go on
            self._forget(message["id"])
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _end(self, reason: EngineError) -> None:
        with self._lock:
            self._ended = self._ended or reason
            waiting, self._waiting = self._waiting, {}
        for who in waiting.values():
            if who.future.set_running_or_notify_cancel():
                who.future.set_exception(self._ended)

    def _crash(self, code: int) -> EngineCrashed:
        name = signal_name(code)
        if self._stuck:
            return EngineStuck(
                f"the process that ran {self.spec.gguf} had requests and made no progress for "
                f"{self.spec.stuck_seconds:g} s, so it was ended; open the engine again. If one batch takes longer "
                "on this machine, raise stuck_seconds",
                name,
            )
        how = f"was ended by {name}" if name else f"exited with status {code}"
        said = "\n".join(f"    {line}" for line in list(self._said)[-12:] if line) or "    (nothing)"
        what_to_do = _WHAT_TO_DO.get(name or "", "The lines above say why; correct that, then open the engine again")
        return EngineCrashed(f"the process that ran {self.spec.gguf} {how}. It said last:\n{said}\n{what_to_do}", name)


def _named(schema: dict[str, Any] | None) -> str:
    text = json.dumps(schema)
    title = (schema or {}).get("title") or (schema or {}).get("$id") or "without a title"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"the json_schema {str(title)[:100]!r} (sha256 {digest}, {len(text)} bytes: {text[:120]})"


def _result_of(result: Any) -> Any:
    is_completion = isinstance(result, dict) and "token_ids" in result
    return Completion.model_validate(result) if is_completion else result


def start_child() -> "subprocess.Popen[str]":
    """Start a worker that waits for its `load` line."""
    return subprocess.Popen(
        # -P: a file in the working directory must not stand in for a module.
        [sys.executable, "-P", "-m", "finetune_pipeline.inference.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=child_environment(),
    )


def child_environment() -> dict[str, str]:
    """The environment of a child: it finds this very package, wherever it is started from."""
    package_root = str(Path(finetune_pipeline.__file__).resolve().parents[1])
    paths = [package_root, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "GGML_NO_BACKTRACE": "1",  # a failed assertion would start a debugger on its own process
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", str(SPIN_COUNT)),
    }


def signal_name(returncode: int) -> str | None:
    """The name of the signal that ended a process, None when it exited by itself."""
    if returncode >= 0:
        return None
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def _close_quietly(stream: IO[str] | None) -> None:
    try:
        if stream:
            stream.close()
    except OSError:
        pass  # what was left in its buffer could not reach a child that is gone
