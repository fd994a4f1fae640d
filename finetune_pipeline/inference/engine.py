"""The parent's handle of a model that runs in a child process. Thread-safe; all threads share the batch."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import finetune_pipeline
from finetune_pipeline.inference.errors import (
    RAISED_BY_WORKER,
    EngineClosed,
    EngineCrashed,
    EngineError,
    EngineStuck,
    RequestRefused,
)
from finetune_pipeline.inference.protocol import LOAD_ID, Completion, Delta, EngineInfo, GenerateRequest, ModelSpec
from finetune_pipeline.records import Message

CLOSE_SECONDS = 5.0
"""How long a child may take to exit before it is killed."""

CURRENT_SECONDS = 1.0
"""How long a stuck child may take to report the request whose token it is sampling."""

_REBUILD = (
    "llama.cpp crashed in native code. Rebuild it for a generic CPU (some builds crash on quantized models where the "
    'CPU has AMX): CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --force-reinstall --no-cache-dir --no-deps '
    "--no-binary llama-cpp-python llama-cpp-python"
)
_KILLED = (
    "The process was killed by a signal from another process, or by the kernel (out of memory). Use a smaller model, "
    "context or parallel, or free some memory."
)
_ADVICE = {
    "SIGKILL": _KILLED,
    "SIGTERM": _KILLED,
    "SIGSEGV": _REBUILD,
    "SIGILL": _REBUILD,
    "SIGBUS": _REBUILD + "; or the model file changed while it was in use.",
    "SIGABRT": "llama.cpp aborted; the lines above say why. If they do not help: " + _REBUILD,
}


@dataclass(frozen=True)
class _PendingRequest:
    """A command whose result has not arrived."""

    future: "Future[Any]"
    on_delta: Callable[[Delta], None] | None = None
    schema: dict[str, Any] | None = None


class Engine:
    """A model in a child process, from construction until `close`.

    The child dies with this process, even after kill -9. If the child dies, all pending and later requests raise
    EngineCrashed; open a new engine then. A child that has work and makes no progress for `spec.stuck_seconds` is
    killed, and the request whose schema it was stuck in is refused.

    Args:
        spec: the model, and the resources it may use.

    Attributes:
        spec: the same with the current adapter.
        info: what was loaded.

    Raises:
        ModelNotLoaded: the file is missing, not a GGUF, truncated, or does not fit into memory.
        EngineCrashed: the child died while it loaded.
    """

    info: EngineInfo

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._ids = itertools.count(LOAD_ID + 1)
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._exit_error: EngineError | None = None
        self._stderr: deque[str] = deque(maxlen=30)
        loaded: Future[Any] = Future()
        self._pending: dict[int, _PendingRequest] = {LOAD_ID: _PendingRequest(loaded)}
        self._silent_seconds = 0.0
        self._stuck = False
        self._current: Future[int] = Future()
        self._exited = threading.Event()
        started: Future[subprocess.Popen[str]] = Future()
        # The kernel ties a child to the *thread* that started it, so this thread lives as long as the child.
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
        """Return whether requests can be answered."""
        return self._exit_error is None

    @property
    def exit_error(self) -> EngineError | None:
        """Why the engine ended; None while it runs."""
        return self._exit_error

    def render(self, messages: list[Message]) -> str:
        """Return the text of these messages in the model's chat template, with the generation prompt.

        Raises:
            RequestRefused: the model has no chat template, or it rejects these messages.
        """
        text: str = self._send({"op": "render", "messages": messages}).result()
        return text

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; control tokens in it are parsed, and nothing is added."""
        tokens: list[int] = self._send({"op": "tokenize", "text": text}).result()
        return tokens

    def encode(self, messages: list[Message]) -> list[int]:
        """Return the tokens that the model sees for these messages; all control tokens are the chat template's.

        If no message contains a control token, they are those of transformers' `apply_chat_template(tokenize=True)`.

        Raises:
            RequestRefused: as `render` does.
        """
        tokens: list[int] = self._send({"op": "encode", "messages": messages}).result()
        return tokens

    def submit(self, request: GenerateRequest, on_delta: Callable[[Delta], None] | None = None) -> "Future[Completion]":
        """Start a request and return its future; canceling the future stops the request.

        Callbacks, including the future's, run in the engine's own thread and must not wait for the engine.

        Args:
            on_delta: called with each text delta, before the future is done. An exception from it ends this request,
                and the future raises it.

        Raises:
            EngineCrashed, EngineClosed: the engine has ended.
        """
        fields = request.model_dump(mode="json", exclude_defaults=True)
        command = {"op": "generate", "request": fields, "stream": on_delta is not None}
        return self._send(command, on_delta, request.json_schema)

    def swap_adapter(self, adapter: Path | None) -> "Future[None]":
        """Change to another LoRA adapter of the same base model, or to None; the future is done when it is in use.

        Requests submitted before use the old adapter. Requests submitted after use the new one: they wait until the
        running completions are finished. Cancelling the future in time keeps the old adapter.

        llama.cpp compares only tensor names and shapes, so the caller must know that the adapter was trained on this
        base model.

        Raises:
            ModelNotLoaded: (from the future) the file is missing, not an adapter, or does not fit; the old one stays.
            EngineCrashed, EngineClosed: the engine has ended.
        """
        return self._send({"op": "swap", "adapter": str(adapter) if adapter else None})

    def generate(
        self, requests: Sequence[GenerateRequest], progress: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """Return the completions of all requests, in their order.

        What else is in the batch changes only the last digits of the logits, so a greedy completion is the same alone
        and in a batch, unless two tokens were almost equally probable at some step.

        Args:
            requests: any number; `spec.parallel` of them are decoded together.
            progress: called from this thread with the number of finished completions.

        Raises:
            RequestRefused: one of them cannot be answered; the others are canceled.
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

    def close(self) -> None:
        """End the child; unfinished requests raise EngineClosed. May be called again."""
        self._fail_pending(EngineClosed(f"The engine of {self.spec.gguf} was closed; open a new one."))
        with self._write_lock:
            _close_quietly(self._process.stdin)
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(
        self,
        command: dict[str, Any],
        on_delta: Callable[[Delta], None] | None = None,
        schema: dict[str, Any] | None = None,
    ) -> "Future[Any]":
        id, future = next(self._ids), Future[Any]()
        with self._lock:
            if self._exit_error:
                raise self._exit_error
            self._pending[id] = _PendingRequest(future, on_delta, schema)
        future.add_done_callback(lambda done: self._cancel(id) if done.cancelled() else None)
        self._write({**command, "id": id})
        return future

    def _cancel(self, id: int) -> None:
        with self._lock:
            pending = self._pending.pop(id, None)
        if pending:
            self._write({"op": "cancel", "id": id})

    def _write(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._write_lock:
            try:
                self._process.stdin.write(json.dumps(command) + "\n")
                self._process.stdin.flush()
            except (OSError, ValueError):  # the child is gone; the supervisor thread fails every future
                pass

    def _supervise(self, started: "Future[subprocess.Popen[str]]") -> None:
        """Start the child, receive its messages, and fail all pending requests when it exits."""
        try:
            process = start_child()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(process)
        stderr_reader = threading.Thread(target=self._read_stderr, args=(process.stderr,), daemon=True)
        stderr_reader.start()
        threading.Thread(target=self._kill_if_stuck, args=(process,), daemon=True).start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self._silent_seconds = 0.0
                self._receive(json.loads(line))
        except Exception as error:  # an unexpected line: fail all requests instead of waiting forever
            self._stderr.append(f"its output could not be read: {error!r}")
            process.kill()
        process.wait()
        self._exited.set()
        stderr_reader.join(1.0)
        if self._stuck:
            self._refuse_stuck_request()
        self._fail_pending(self._crash_error(process.returncode))
        _close_quietly(process.stdout)

    def _read_stderr(self, stderr: IO[str]) -> None:
        with stderr:
            for line in stderr:
                self._stderr.append(line.rstrip())

    def _kill_if_stuck(self, process: "subprocess.Popen[str]") -> None:
        """Kill the child when it has work and sends nothing; time in which this process is stopped does not count."""
        tick = min(1.0, self.spec.stuck_seconds / 5)
        while not self._exited.wait(tick):
            with self._lock:
                has_work = bool(self._pending) and LOAD_ID not in self._pending  # loading a large file takes minutes
            self._silent_seconds = self._silent_seconds + tick if has_work else 0.0
            if self._silent_seconds >= self.spec.stuck_seconds:
                # In a thread, because the pipe of a child that does not read may be full.
                threading.Thread(target=self._write, args=({"op": "current"},), daemon=True).start()
                with suppress(TimeoutError):
                    self._current.result(CURRENT_SECONDS)
                self._stuck = True
                process.kill()
                return

    def _refuse_stuck_request(self) -> None:
        """Refuse the request that the child was stuck in; if that is unknown, every request with a schema."""
        current = self._current.result() if self._current.done() else 0
        with self._lock:
            ids = [id for id, one in self._pending.items() if one.schema is not None and current in (0, id)]
            refused = [self._pending.pop(id) for id in ids]
        for one in refused:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(
                    RequestRefused(
                        f"The model made no progress for {self.spec.stuck_seconds:g} s while it answered with "
                        f"{_describe(one.schema or {})}, and its process was ended. Simplify this schema."
                    )
                )

    def _receive(self, message: dict[str, Any]) -> None:
        if "current" in message and not self._current.done():
            self._current.set_result(message["current"])
        if "id" not in message:  # a heartbeat
            return
        id, is_delta = message["id"], "delta" in message
        with self._lock:
            pending = self._pending.get(id) if is_delta else self._pending.pop(id, None)
        if "adapter" in message:  # even if its future was canceled too late
            adapter = message["adapter"]
            self.spec = self.spec.model_copy(update={"adapter": Path(adapter) if adapter else None})
        if pending is None:  # canceled
            return
        future = pending.future
        if is_delta:
            try:
                if pending.on_delta:
                    pending.on_delta(Delta.model_validate(message["delta"]))
            except Exception as error:  # the caller's fault: other requests are not affected
                self._cancel(id)
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
        elif future.set_running_or_notify_cancel():
            result = message.get("result")
            if "error" in message:
                future.set_exception(RAISED_BY_WORKER[message["error"]](message["message"]))
            elif isinstance(result, dict) and "token_ids" in result:
                future.set_result(Completion.model_validate(result))
            else:
                future.set_result(result)

    def _fail_pending(self, error: EngineError) -> None:
        with self._lock:
            self._exit_error = self._exit_error or error
            pending, self._pending = self._pending, {}
        for one in pending.values():
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(self._exit_error)

    def _crash_error(self, returncode: int) -> EngineCrashed:
        name = signal_name(returncode)
        if self._stuck:
            return EngineStuck(
                f"The process that ran {self.spec.gguf} had requests and made no progress for "
                f"{self.spec.stuck_seconds:g} s, so it was ended. Open the engine again. If one batch takes longer on "
                "this machine, raise stuck_seconds.",
                name,
            )
        how = f"was ended by {name}" if name else f"exited with status {returncode}"
        output = "\n".join(f"    {line}" for line in list(self._stderr)[-12:] if line) or "    (nothing)"
        advice = _ADVICE.get(name or "", "The lines above say why. Fix that, then open the engine again.")
        return EngineCrashed(
            f"The process that ran {self.spec.gguf} {how}. Its last output:\n{output}\n{advice}",
            name,
        )


def _describe(schema: dict[str, Any]) -> str:
    text = json.dumps(schema)
    title = schema.get("title") or schema.get("$id") or "without a title"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"the json_schema {str(title)[:100]!r} (sha256 {digest}, {len(text)} bytes: {text[:120]})"


def start_child() -> "subprocess.Popen[str]":
    """Start a worker that waits for its `load` command."""
    return subprocess.Popen(
        # -P: a file in the working directory must not shadow a module.
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
    """Return the environment for a child, with which it imports this package from any working directory."""
    package_root = str(Path(finetune_pipeline.__file__).resolve().parents[1])
    paths = [package_root, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "GGML_NO_BACKTRACE": "1",  # otherwise a failed assertion starts a debugger on its own process
    }


def signal_name(returncode: int) -> str | None:
    """Return the name of the signal that ended a process, or None if it exited."""
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
        pass  # the child that should have read its buffer is gone
