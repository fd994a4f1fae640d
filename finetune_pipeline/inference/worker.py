"""The child process of an engine: `python -m finetune_pipeline.inference.worker PARENT_PID`, JSON lines in and out.

One thread reads commands, the main thread decodes, and two threads compile schemas. The process exits at once when its
input ends or its parent dies, because nobody can use its results then. While it has work, it sends a heartbeat several
times a second.
"""

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from finetune_pipeline.inference.errors import EngineError, ModelNotLoaded
from finetune_pipeline.inference.grammar import GrammarCompiler
from finetune_pipeline.inference.native import NativeModel
from finetune_pipeline.inference.protocol import LOAD_ID, Completion, Delta, GenerateRequest, ModelSpec
from finetune_pipeline.inference.scheduler import AdapterSwap, Output, Scheduler, context_exceeded
from finetune_pipeline.subprocess_lifetime import die_with_parent

HEARTBEAT_SECONDS = 0.25


class CommandReader:
    """Reads the parent's commands in a separate thread, from before the model is loaded.

    Attributes:
        report_current: tells the parent for which request a token is being sampled.
    """

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.report_current: Callable[[], None] = lambda: None

    def read(self, source: IO[str]) -> None:
        """Queue every command; exit the process when the input ends."""
        for line in source:
            command = json.loads(line)
            if command["op"] == "current":  # handled in this thread, because the main thread may be stuck
                self.report_current()
            else:
                self.queue.put(command)
        os._exit(0)


class Worker:
    """One loaded model, its commands and its scheduler."""

    def __init__(self, model: NativeModel, spec: ModelSpec, commands: CommandReader, output: IO[str]) -> None:
        self._model = model
        self._spec = spec
        self._commands = commands.queue
        self._output = output
        self._write_lock = threading.Lock()
        self._last_sent = 0.0
        self._grammars = GrammarCompiler(model, lambda: self._commands.put({"op": "wake"}))
        self._scheduler = Scheduler(model, spec.parallel, self._report)
        commands.report_current = lambda: self._send({"current": self._scheduler.sampling_for})

    def run(self) -> None:
        """Process commands forever, and decode while there is something to decode."""
        self._send({"id": LOAD_ID, "result": self._model.info().model_dump(mode="json")})
        while True:
            while not self._scheduler.busy or not self._commands.empty():
                try:
                    self._process(self._commands.get(timeout=None if self._scheduler.empty else HEARTBEAT_SECONDS))
                except queue.Empty:  # every request waits for its schema
                    self._send_heartbeat()
            self._scheduler.step()
            self._send_heartbeat()

    def _send(self, message: dict[str, Any]) -> None:
        with self._write_lock:
            self._output.write(json.dumps(message) + "\n")
            self._output.flush()
            self._last_sent = time.monotonic()

    def _send_heartbeat(self) -> None:
        if time.monotonic() - self._last_sent >= HEARTBEAT_SECONDS:
            self._send({"heartbeat": True})

    def _process(self, command: dict[str, Any]) -> None:
        if command["op"] == "wake":  # a schema is compiled; the scheduler will see that itself
            return
        id = command["id"]
        try:
            match command["op"]:
                case "cancel":
                    self._scheduler.cancel(id)
                case "render":
                    self._send({"id": id, "result": self._model.template.render(command["messages"]).text})
                case "encode":
                    self._send({"id": id, "result": self._model.template.tokens(command["messages"])})
                case "tokenize":
                    self._send({"id": id, "result": self._model.tokenize(command["text"])})
                case "swap":
                    self._scheduler.swap(id, Path(command["adapter"]) if command["adapter"] else None)
                case "generate":
                    request = GenerateRequest.model_validate(command["request"])
                    schema = request.json_schema
                    matcher = self._grammars.matcher(schema) if schema is not None else None
                    self._scheduler.add(id, request, self._prompt_tokens(request), matcher, stream=command["stream"])
        except EngineError as error:
            self._send({"id": id, "error": type(error).__name__, "message": str(error)})

    def _prompt_tokens(self, request: GenerateRequest) -> list[int]:
        texts = [request.prompt or "", *(message["content"] for message in request.messages or ()), request.prefill]
        if request.chat_template_kwargs:
            texts.append(json.dumps(request.chat_template_kwargs))
        size = sum(len(text.encode(errors="replace")) for text in texts)
        # llama.cpp's tokenizer takes minutes for two megabytes of one character, and all other requests wait for it.
        if size > self._model.max_prompt_bytes:
            raise context_exceeded(self._model.context, f"{size} bytes")
        if request.messages is not None:
            if len(request.messages) > self._model.context:  # each has a token at least, even an empty one
                raise context_exceeded(self._model.context, f"{len(request.messages)} messages")
            return self._model.template.tokens(
                request.messages, prefill=request.prefill, variables=request.chat_template_kwargs
            )
        tokens = self._model.tokenize((request.prompt or "") + request.prefill)
        bos = self._model.bos
        return [bos, *tokens] if bos is not None and self._model.adds_bos and tokens[:1] != [bos] else tokens

    def _report(self, id: int, output: Output) -> None:
        if isinstance(output, Delta):
            self._send({"id": id, "delta": output.model_dump(mode="json", exclude_defaults=True)})
        elif isinstance(output, Completion):
            self._send({"id": id, "result": output.model_dump(mode="json")})
        elif isinstance(output, AdapterSwap):
            self._send({"id": id, "result": None, "adapter": str(output.adapter.path) if output.adapter else None})
        else:
            self._send({"id": id, "error": type(output).__name__, "message": str(output)})


def main() -> None:
    """Load the model that the first line names, then process commands until the input ends."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native code prints to stdout must not get between the JSON lines
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    faulthandler.enable(all_threads=False)
    spec = ModelSpec.model_validate(json.loads(sys.stdin.readline())["spec"])
    commands = CommandReader()
    threading.Thread(target=commands.read, args=(sys.stdin,), daemon=True).start()
    try:
        model = NativeModel(spec)
    except ModelNotLoaded as error:
        print(json.dumps({"id": LOAD_ID, "error": "ModelNotLoaded", "message": str(error)}), file=output, flush=True)
        os._exit(0)
    Worker(model, spec, commands, output).run()


if __name__ == "__main__":
    main()
