"""A model in service: a local engine or another server, with a limit on concurrent requests."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from finetune_pipeline.artifacts import check_content
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import Completion, Delta, GenerateRequest, ModelSpec
from finetune_pipeline.inference.remote import RemoteModel
from finetune_pipeline.serving.errors import Overloaded

OnDelta = Callable[[Delta], None]

RECENT, ENOUGH = 50, 20
"""Number of recent answers that are checked for being empty, and the number from which they are conclusive."""


class LoadedModel:
    """A model that answers under one name.

    Attributes:
        name: `loop@v1.2.0`, `loop@base`, `loop@` and the id of a challenger, or `loop@` and the name at another server.
        version_id: id of the model in the registry; None for the base model, and for other servers unless they are
            deployment targets.
        runner: what generates: an engine with a child process, or a client of another server.
        capacity: number of requests that may run or wait.
        spec: what the engine loaded; None for another server.
        files: the files that were loaded with their SHA-256; none for another server.
    """

    def __init__(
        self,
        name: str,
        version_id: str | None,
        runner: Engine | RemoteModel,
        capacity: int,
        spec: ModelSpec | None,
        files: Mapping[Path, str] | None = None,
    ) -> None:
        self.name = name
        self.version_id = version_id
        self.runner = runner
        self.capacity = capacity
        self.spec = spec
        self.files = files or {}
        self.in_flight = 0
        self._stats = {path: _stat(path) for path in self.files}
        self._empty: deque[bool] = deque(maxlen=RECENT)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_remote(self) -> bool:
        """Return whether another server runs the model."""
        return isinstance(self.runner, RemoteModel)

    @property
    def alive(self) -> bool:
        """Return whether it can take requests."""
        return isinstance(self.runner, RemoteModel) or self.runner.alive

    async def generate(self, request: GenerateRequest, on_delta: OnDelta | None) -> Completion:
        """Return the completion of one request; canceling it stops the request.

        Args:
            on_delta: called in this event loop with each text delta.

        Raises:
            Overloaded: the queue is full.
        """
        if self.in_flight >= self.capacity:
            raise Overloaded(
                f"{self.name} has {self.in_flight} requests and takes no more. Try again in a second, or raise "
                "serving.queue or serving.parallel in the loop's YAML.",
                retry_after=1,
            )
        self.in_flight += 1
        self._idle.clear()
        try:
            if isinstance(self.runner, RemoteModel):
                completion = await self.runner.generate(request, on_delta)
            else:
                event_loop = asyncio.get_running_loop()

                def forward(delta: Delta) -> None:  # runs in the engine's thread
                    with suppress(RuntimeError):  # the event loop is closed, so nobody reads the answer
                        event_loop.call_soon_threadsafe(on_delta, delta)  # type: ignore[arg-type]

                completion = await asyncio.wrap_future(self.runner.submit(request, forward if on_delta else None))
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()
        # An empty answer to a request with stop texts, or to one that scores a prompt, says nothing about the model.
        if completion.text.strip() or not (request.stop or request.score_prompt):
            self._empty.append(not completion.text.strip())
        return completion

    def empty_answers(self, limit: float) -> str | None:
        """Return a description if more than this fraction of the recent answers is empty, else None."""
        empty, answers = sum(self._empty), len(self._empty)
        if answers < ENOUGH or empty <= limit * answers:
            return None
        return (
            f"{empty} of the last {answers} answers of {self.name} are empty, more than serving.empty_limit "
            f"({limit:.0%}) allows. Look at these interactions, then roll back, or fix the upstream server."
        )

    def check_files(self) -> None:
        """Check the content of files that were written after they were loaded, because llama.cpp has them mapped.

        If a file was deleted or replaced by another, the process that has it open still has the old content.

        Raises:
            ArtifactError: the content changed.
        """
        for path, sha256 in self.files.items():
            now, loaded = _stat(path), self._stats[path]
            if now is not None and loaded is not None and now != loaded and now[0] == loaded[0]:
                check_content(path, sha256, "restore the file, or choose another version")
                self._stats[path] = now

    async def drain(self) -> None:
        """Close it after its last answer, or at once if this is canceled."""
        try:
            await self._idle.wait()
        finally:
            await self.close()

    async def close(self) -> None:
        """End the child process, or the connections to the other server."""
        if isinstance(self.runner, RemoteModel):
            await self.runner.close()
        else:
            await asyncio.to_thread(self.runner.close)


def _stat(path: Path) -> tuple[int, int, int, int] | None:
    """Return the stat fields that change when a file is written, inode first; None if the file does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
