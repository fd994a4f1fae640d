"""The child process: `python -m finetune_pipeline.inference.worker PARENT_PID`, JSON lines in and out.

A thread reads the requests, the main loop decodes, two threads compile schemas. When its input ends, or its parent
dies, it exits at once: its results are of no use then. While it has work, the main loop reports to the parent several
times a second that it makes progress.
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
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from finetune_pipeline.inference.chat_template import ChatTemplate
from finetune_pipeline.inference.errors import EngineError, ModelNotLoaded, RequestRefused
from finetune_pipeline.inference.grammar import Grammars
from finetune_pipeline.inference.native import NativeModel
from finetune_pipeline.inference.protocol import LOAD_ID, Completion, GenerateRequest, ModelSpec
from finetune_pipeline.inference.scheduler import Outcome, Scheduler, Swap
from finetune_pipeline.subprocess_lifetime import die_with_parent

Order = dict[str, Any]

BEAT_SECONDS = 0.25
"""Time between two lines that only report progress."""


class Orders:
    """The parent's orders, in sequence; the thread that reads them answers `where` at once."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self.tell_where: Callable[[], None] = lambda: None

    def read(self, source: IO[str]) -> None:
        """Take every line of the input; exit when it ends."""
        for line in source:
            order = json.loads(line)
            if order["op"] == "where":
                self.tell_where()
            else:
                self.queue.put(order)
        os._exit(0)


class Worker:
    """One model and the requests to it."""

    def __init__(self, model: NativeModel, spec: ModelSpec, orders: Orders, output: IO[str]) -> None:
        self._model = model
        self._spec = spec
        self._orders = orders.queue
        self._output = output
        self._writing = threading.Lock()
        self._sent = 0.0
        self._grammars = Grammars(model, lambda: self._orders.put({"op": "wake"}))
        orders.tell_where = lambda: self.send({"at": self._scheduler.choosing_for})
        self._scheduler = Scheduler(model, spec.parallel, self._report)
        self._streamed: set[int] = set()

    def run(self) -> None:
        """Answer orders for ever; decode while there is something to decode."""
        self.send({"id": LOAD_ID, "result": self._model.info().model_dump(mode="json")})
        while True:
            while not self._scheduler.busy or not self._orders.empty():
                try:
                    self._take(self._orders.get(timeout=None if self._scheduler.empty else BEAT_SECONDS))
                except queue.Empty:  # every request waits for its schema
                    self._beat()
            self._scheduler.step()
            self._beat()

    def send(self, message: dict[str, Any]) -> None:
        """Write one line to the parent."""
        with self._writing:
            self._output.write(json.dumps(message) + "\n")
            self._output.flush()
            self._sent = time.monotonic()

    def _beat(self) -> None:
        if time.monotonic() - self._sent >= BEAT_SECONDS:
            self.send({"beat": True})

    def _take(self, order: Order) -> None:
        if order["op"] == "wake":  # a schema is compiled: the scheduler looks by itself
            return
        if order["op"] == "cancel":
            self._scheduler.cancel(order["id"])
            self._streamed.discard(order["id"])
            return
        try:
            self._carry_out(order)
        except EngineError as error:
            self.send({"id": order["id"], "error": type(error).__name__, "message": str(error)})

    def _carry_out(self, order: Order) -> None:
        match order["op"]:
            case "render":
                self.send({"id": order["id"], "result": self._chat.render(order["messages"]).text})
            case "encode":
                self.send({"id": order["id"], "result": self._chat.tokens(order["messages"])})
            case "tokenize":
                self.send({"id": order["id"], "result": self._model.tokenize(order["text"])})
            case "swap":
                self._scheduler.swap(order["id"], Path(order["adapter"]) if order["adapter"] else None)
            case "generate":
                request = GenerateRequest.model_validate(order["request"])
                if order["stream"]:
                    self._streamed.add(order["id"])
                matcher = self._grammars.matcher(request.json_schema) if request.json_schema is not None else None
                self._scheduler.add(order["id"], request, self._prompt(request), matcher)

    def _prompt(self, request: GenerateRequest) -> list[int]:
        texts = [request.prompt or "", *(message["content"] for message in request.messages or ())]
        size = sum(len(text.encode(errors="replace")) for text in texts)
        # llama.cpp's tokenizer takes minutes for two megabytes of one character, and all other requests wait for it.
        if size > self._model.max_prompt_bytes:
            raise RequestRefused(
                f"the prompt has {size} bytes, more than the context of {self._model.context} tokens can hold; shorten "
                "the prompt, or open the engine with a larger context (up to what the model was trained for)"
            )
        if request.messages is not None:
            return self._chat.tokens(request.messages)
        tokens = self._model.tokenize(request.prompt or "")
        bos = self._model.bos
        return [bos, *tokens] if bos is not None and self._model.adds_bos and tokens[:1] != [bos] else tokens

    @cached_property
    def _chat(self) -> ChatTemplate:
        source = self._model.chat_template()
        if source is None:
            raise RequestRefused(
                f"{self._spec.gguf} has no chat template (tokenizer.chat_template), so messages cannot be rendered; "
                "ask with a plain `prompt`, or put chat_template.jinja beside the tokenizer and convert again"
            )
        model = self._model
        variables = {"bos_token": model.token_text(model.bos), "eos_token": model.token_text(model.eos)}
        control, added = model.tokens_found_first()
        return ChatTemplate(source, variables, control, added, lambda texts: [model.tokenize(text) for text in texts])

    def _report(self, id: int, outcome: Outcome) -> None:
        if isinstance(outcome, str):
            if id in self._streamed:
                self.send({"id": id, "piece": outcome})
            return
        self._streamed.discard(id)
        if isinstance(outcome, Completion):
            self.send({"id": id, "result": outcome.model_dump(mode="json")})
        elif isinstance(outcome, Swap):
            self.send({"id": id, "result": None, "adapter": str(outcome.adapter.path) if outcome.adapter else None})
        else:
            self.send({"id": id, "error": type(outcome).__name__, "message": str(outcome)})


def main() -> None:
    """Load the model that the first line names, then answer until the input ends."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever native code prints must not get among the JSON lines
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    faulthandler.enable(all_threads=False)
    spec = ModelSpec.model_validate(json.loads(sys.stdin.readline())["spec"])
    orders = Orders()
    threading.Thread(target=orders.read, args=(sys.stdin,), daemon=True).start()
    try:
        model = NativeModel(spec)
    except ModelNotLoaded as error:
        print(json.dumps({"id": LOAD_ID, "error": "ModelNotLoaded", "message": str(error)}), file=output, flush=True)
        os._exit(0)
    Worker(model, spec, orders, output).run()


if __name__ == "__main__":
    main()
