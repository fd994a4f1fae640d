"""What runs a model for the gateway, and a model in service: so many requests at once, then no more."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from finetune_pipeline.artifacts import check_content
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import Completion, GenerateRequest, ModelSpec
from finetune_pipeline.inference.remote import RemoteModel
from finetune_pipeline.serving.errors import Busy
from finetune_pipeline.settings import UpstreamSettings

OnDelta = Callable[[str], None]


class Backend(Protocol):
    """What runs a model."""

    async def answer(self, request: GenerateRequest, on_delta: OnDelta | None) -> Completion:
        """Answer one request; cancelling it frees its place."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


class LocalModel:
    """llama.cpp in a child process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def answer(self, request: GenerateRequest, on_delta: OnDelta | None) -> Completion:
        """Answer one request; pieces arrive in this event loop."""
        loop = asyncio.get_running_loop()
        tell: OnDelta | None = None
        if on_delta is not None:
            there: OnDelta = on_delta
            tell = lambda piece: _call_soon(loop, there, piece)  # noqa: E731
        return await asyncio.wrap_future(self.engine.submit(request, tell))

    async def close(self) -> None:
        """End the child process."""
        await asyncio.to_thread(self.engine.close)


class Upstream:
    """Another OpenAI-compatible server."""

    def __init__(self, settings: UpstreamSettings, via: str = "") -> None:
        self._model = RemoteModel(settings, via)

    async def answer(self, request: GenerateRequest, on_delta: OnDelta | None) -> Completion:
        """Answer one request."""
        return await self._model.generate(request, on_delta)

    async def close(self) -> None:
        """End the connections."""
        await self._model.close()


REMEMBERED, ENOUGH = 50, 20
"""Number of latest answers that are checked for being empty, and the number from which they are conclusive."""


class Served:
    """A model in service, under one name.

    Attributes:
        name: `loop@v1.2.0`, `loop@base`, or `loop@` and the model's name at the other server.
        identity: the registry's id; None is the base model.
        capacity: requests that may be in it, waiting ones included.
        files: the files that it was loaded from, with their SHA-256; none for an upstream.
    """

    def __init__(
        self,
        name: str,
        identity: str | None,
        backend: Backend,
        capacity: int,
        spec: ModelSpec | None,
        files: Mapping[Path, str] | None = None,
    ) -> None:
        self.name = name
        self.identity = identity
        self.backend = backend
        self.capacity = capacity
        self.spec = spec
        self.files = files or {}
        self.in_flight = 0
        self._stamps = {path: _stamp(path) for path in self.files}
        self._empty: deque[bool] = deque(maxlen=REMEMBERED)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not isinstance(self.backend, LocalModel) or self.backend.engine.alive

    async def answer(self, request: GenerateRequest, on_delta: OnDelta | None) -> Completion:
        """Answer one request.

        Raises:
            Busy: as many requests are in it as may be.
        """
        if self.in_flight >= self.capacity:
            raise Busy(
                f"{self.name} has {self.in_flight} requests and takes no more; ask again in a second, or raise "
                "serving.queue or serving.parallel in the loop's YAML",
                retry_after=1,
            )
        self.in_flight += 1
        self._idle.clear()
        try:
            completion = await self.backend.answer(request, on_delta)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()
        # An answer that a stop text cut off at its start says nothing about the model.
        if completion.text.strip() or not request.stop:
            self._empty.append(not completion.text.strip())
        return completion

    def empty_answers(self, limit: float) -> str | None:
        """Return a description if more than this fraction of the latest answers is empty, else None."""
        empty, answers = sum(self._empty), len(self._empty)
        if answers < ENOUGH or empty <= limit * answers:
            return None
        return (
            f"{empty} of the last {answers} answers of {self.name} are empty, more than serving.empty_limit "
            f"({limit:.0%}) allows; look at these interactions, then roll back, or fix the upstream server"
        )

    def check_files(self) -> None:
        """Refuse a model whose file was overwritten after it was loaded: llama.cpp has it memory-mapped.

        If a file was deleted or replaced by another, the process that has it open still has the old content.

        Raises:
            ArtifactError: its content changed.
        """
        for path, expected in self.files.items():
            now, loaded = _stamp(path), self._stamps[path]
            if now is not None and loaded is not None and now != loaded and now[0] == loaded[0]:
                check_content(path, expected, "restore the file, or choose another version")
                self._stamps[path] = now

    async def retire(self) -> None:
        """End it when its last answer is given, or at once when this is cancelled."""
        try:
            await self._idle.wait()
        finally:
            await self.backend.close()


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    """Return the stat fields that change when a file is written, inode first; None if the file does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _call_soon(loop: asyncio.AbstractEventLoop, call: OnDelta, piece: str) -> None:
    with suppress(RuntimeError):  # the gateway is going down: nobody reads on
        loop.call_soon_threadsafe(call, piece)
