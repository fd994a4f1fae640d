"""A model behind another OpenAI-compatible server, with the interface of `Engine`: requests in, futures out."""

import asyncio
from concurrent.futures import Future
from threading import Thread
from types import TracebackType

from finetune_pipeline.inference.protocol import Completion, GenerateRequest
from finetune_pipeline.inference.remote import RemoteModel
from finetune_pipeline.settings import UpstreamSettings


class RemoteEngine:
    """Sends requests to another server from a thread with an event loop; a context manager.

    Args:
        parallel: requests in progress at the same time.
        named_by: the setting or argument that names the server, for errors.
    """

    def __init__(self, settings: UpstreamSettings, parallel: int, named_by: str) -> None:
        self._settings = settings
        self._parallel = parallel
        self._named_by = named_by

    def __enter__(self) -> "RemoteEngine":
        self._model = RemoteModel(self._settings, named_by=self._named_by)
        self._slots = asyncio.Semaphore(self._parallel)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="remote-engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._model.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, request: GenerateRequest) -> "Future[Completion]":
        """Start to generate an answer."""
        return asyncio.run_coroutine_threadsafe(self._generate(request), self._loop)

    async def _generate(self, request: GenerateRequest) -> Completion:
        async with self._slots:
            return await self._model.generate(request)
