"""Which model answers for a loop, and how it is changed while it does.

`LoopServer` follows the registry's pointer: the new model is loaded beside the old, takes over between two requests,
and the old one goes when its last answer is given. Pairs of base and adapter change in place: the same process, another
adapter, in milliseconds. A model that does not load leaves the old one in service.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune_pipeline.artifacts import ArtifactError, hash_file_cached
from finetune_pipeline.database import Database
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import (
    EngineClosed,
    EngineCrashed,
    EngineError,
    ModelNotLoaded,
    RequestRefused,
    UpstreamFailed,
)
from finetune_pipeline.inference.protocol import Completion, GenerateRequest, ModelSpec
from finetune_pipeline.registry.champion import BASE, champion, resolve
from finetune_pipeline.registry.model_versions import ModelVersion, RegistryError, check_files
from finetune_pipeline.serving.backends import LocalModel, OnDelta, Served, Upstream
from finetune_pipeline.serving.errors import Busy, Refused, Unavailable, UnknownModel
from finetune_pipeline.settings import LoopSettings, UpstreamSettings

Variant = Literal["champion", "fallback", "version"]

OnNamedDelta = Callable[[str, str], None]
"""Called with the name of the model that answers, and a piece of its answer."""

RETRY_SECONDS = 30.0
CRASHES, CRASH_SECONDS = 3, 60.0
_NOT_LOADABLE = (EngineError, RegistryError, ExportError, ArtifactError, OSError)
_BROKEN = (EngineCrashed, EngineClosed, ModelNotLoaded, UpstreamFailed)
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Answered:
    """An answer, and who gave it."""

    completion: Completion
    model: str
    variant: Variant


class LoopServer:
    """Answers for one loop, with the champion of the moment.

    Args:
        via: the gateway's id, by which it knows a question of its own that comes back to it.
    """

    def __init__(self, loop: LoopSettings, database: Database, via: str) -> None:
        self.loop = loop
        self.trouble: str | None = None
        self.swaps = 0
        self.failed_swaps = 0
        self.fallbacks = 0
        self.current: Served | None = None
        self._database = database
        self._via = via
        self._moving = asyncio.Lock()
        self._gate = asyncio.Event()
        self._gate.set()
        self._at_gate = 0
        self._fallback: Served | None = None
        self._versions: OrderedDict[str, Served] = OrderedDict()
        self._opening_others = asyncio.Lock()
        self._refused: tuple[str | None, float] | None = None
        self._warned = False
        self._crashes: deque[float] = deque(maxlen=CRASHES)
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def capacity(self) -> int:
        """Requests that a model of this loop takes at once."""
        return self.loop.serving.parallel + self.loop.serving.queue

    @property
    def served(self) -> list[Served]:
        """Every model that is loaded for this loop."""
        return [one for one in (self.current, self._fallback, *self._versions.values()) if one is not None]

    @property
    def problem(self) -> str | None:
        """The problem that /healthz reports; None if there is none."""
        return self.trouble or self._ended() or self._empty_answers()

    def _ended(self) -> str | None:
        if self.current is None or self.current.alive or not isinstance(self.current.backend, LocalModel):
            return None
        return f"{self.current.name} ended and is being replaced: {self.current.backend.engine.exit_error}"

    def _empty_answers(self) -> str | None:
        found = (one.empty_answers(self.loop.serving.empty_limit) for one in self.served)
        return next((problem for problem in found if problem), None)

    @property
    def answering(self) -> str | None:
        """The name of what answers now: the champion, or what stands in for it."""
        return next((one.name for one in (self.current, self._fallback) if one is not None and one.alive), None)

    async def follow(self, wanted: str | None) -> None:
        """Make the champion of this id the one that answers, if it is not already and can be loaded."""
        empty = self._empty_answers()
        if empty and not self._warned:
            _log.warning(empty)
        self._warned = bool(empty)
        async with self._moving:
            if self.loop.serving.upstream is not None and self.current is not None:
                return
            await self._discard_damaged()
            if self.current is not None and self.current.identity == wanted and self.current.alive:
                self._refused = self.trouble = None  # moved back to what still serves
                self._dismiss_fallback()
                return
            if self._refused is not None and self._refused[0] == wanted and time.monotonic() < self._refused[1]:
                return
            await self._change()

    async def reload(self) -> bool:
        """Load the champion beside what answers now, and change over; False if it does not load."""
        async with self._moving:
            return await self._change()

    async def _change(self) -> bool:
        model = await asyncio.to_thread(champion, self._database, self.loop.name)
        try:
            new = await self._open_or_swap(model)
        except _NOT_LOADABLE as error:
            await self._stay(model, error)
            return False
        old, self.current = self.current, new
        self._refused = self.trouble = None
        self.swaps += old is not None
        _log.info("%s serves now%s", new.name, f", instead of {old.name}" if old else "")
        if old is not None and old.backend is not new.backend:
            self._later(old.retire())
        self._dismiss_fallback()
        return True

    async def _discard_damaged(self) -> None:
        """Take models out of service whose files were damaged while they served."""
        for served in self.served:
            try:
                await asyncio.to_thread(served.check_files)
            except (ArtifactError, OSError) as error:
                _log.error("%s is taken out of service: %s", served.name, error)
                if served is self.current:
                    self.current, self.trouble = None, f"{served.name} was taken out of service: {error}"
                elif served is self._fallback:
                    self._fallback = None
                else:
                    self._versions = OrderedDict((k, v) for k, v in self._versions.items() if v is not served)
                self._later(served.retire())

    def _dismiss_fallback(self) -> None:
        if self._fallback is not None and not self._opening_others.locked():
            gone, self._fallback = self._fallback, None
            self._later(gone.retire())

    async def _stay(self, model: ModelVersion | None, error: Exception) -> None:
        self._refused = (model.id if model else None, time.monotonic() + RETRY_SECONDS)
        name = model.name if model else f"{self.loop.name}@base"
        serving = f"{self.answering} goes on serving" if self.answering else "nothing served before it"
        self.trouble = f"{name} does not load; {serving}: {error}"
        self.failed_swaps += 1
        _log.error(self.trouble)
        if self.current is None:
            with suppress(Unavailable):  # the questions will be told so
                await self._fallback_model(self.trouble)

    async def answer(self, request: GenerateRequest, on_delta: OnNamedDelta | None) -> Answered:
        """Answer with the champion, or with what takes over when it cannot.

        Raises:
            Busy, Unavailable, Refused: see there.
        """
        await self._pass_gate()
        told = _Told(on_delta)
        while True:
            served = self.current
            problem = self.trouble or "no model is loaded"
            if served is not None:
                try:
                    completion = await _asked(served, request, told.by(served))
                except _BROKEN as error:
                    problem = str(error)
                    self._broke(served, problem)
                    if told.anything:
                        message = f"{served.name} broke off in the middle of the answer"
                        raise Unavailable(message, detail=problem) from error
                else:
                    self._works(served)
                    return Answered(completion, served.name, "champion")
            fallback = await self._fallback_model(problem)
            try:
                completion = await _asked(fallback, request, told.by(fallback))
            except _BROKEN as error:
                if isinstance(error, EngineClosed) and self.current is not served and not told.anything:
                    continue  # the champion came back, and who stood in was dismissed before it was asked
                raise Unavailable(
                    f"neither {self.loop.name}'s champion nor {fallback.name} can answer",
                    detail=f"{problem}; {error}",
                    retry_after=2,
                ) from error
            else:
                self.fallbacks += 1
                return Answered(completion, fallback.name, "fallback")

    async def answer_by(self, version: str, request: GenerateRequest, on_delta: OnNamedDelta | None) -> Answered:
        """Answer with a version that was asked for by name.

        Raises:
            UnknownModel: there is none of this name.
            Busy, Unavailable, Refused: see there.
        """
        try:
            model = await asyncio.to_thread(resolve, self._database, version, self.loop.name)
        except RegistryError as error:
            raise UnknownModel(str(error), param="model") from error
        identity = model.id if model else None
        await self._pass_gate()
        if self.current is not None and self.current.spec is not None and self.current.identity == identity:
            served, variant = self.current, "champion"
        else:
            served, variant = await self._version(model), "version"
        try:
            completion = await _asked(served, request, _Told(on_delta).by(served))
        except _BROKEN as error:
            raise Unavailable(f"{served.name} cannot answer", detail=error, retry_after=2) from error
        return Answered(completion, served.name, "champion" if variant == "champion" else "version")

    async def close(self) -> None:
        """End every model; answers that are being given are lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self.served:
            await one.backend.close()

    async def _pass_gate(self) -> None:
        """Wait while an adapter is being changed: what comes now is for the new one."""
        if self._gate.is_set():
            return
        if self._at_gate >= self.capacity:
            raise Busy(f"{self.loop.name} changes its model, and {self._at_gate} requests wait for that", retry_after=1)
        self._at_gate += 1
        try:
            await self._gate.wait()
        finally:
            self._at_gate -= 1

    def _broke(self, served: Served, problem: str) -> None:
        if served.spec is None:  # another server: nothing here can start it again, and the next answer may work
            self.trouble = f"{served.name}: {problem}"
        else:
            self._later(self._revive(served, problem))

    def _works(self, served: Served) -> None:
        if served.spec is None and self.trouble is not None:
            self.trouble = None
            self._dismiss_fallback()

    async def _open_or_swap(self, model: ModelVersion | None) -> Served:
        upstream = self.loop.serving.upstream
        if upstream is not None:
            return self._remote(upstream)
        (spec, files), now = await asyncio.to_thread(self._spec, model), self.current
        name, identity = (model.name, model.id) if model else (f"{self.loop.name}@base", None)
        in_place = now is not None and now.spec is not None and now.alive and now.spec.gguf == spec.gguf
        if in_place and now is not None and now.spec != spec and isinstance(now.backend, LocalModel):
            await self._swap_adapter(now.backend.engine, spec)
            return Served(name, identity, now.backend, self.capacity, spec, files)
        return Served(name, identity, LocalModel(await _engine(spec)), self.capacity, spec, files)

    async def _swap_adapter(self, engine: Engine, spec: ModelSpec) -> None:
        self._gate.clear()
        try:
            await asyncio.wrap_future(engine.swap_adapter(spec.adapter))
        finally:
            # Whoever waits goes on in a later turn of the event loop, when `current` has its new name.
            asyncio.get_running_loop().call_later(0, self._gate.set)

    def _spec(self, model: ModelVersion | None) -> tuple[ModelSpec, dict[Path, str]]:
        """Return what to load, and its files with their SHA-256."""
        serving = self.loop.serving
        limits = {"context": self.loop.context, "parallel": serving.parallel, "stuck_seconds": serving.stuck_seconds}
        if model is None:
            gguf = base_gguf(self.loop, _log.info)
            return ModelSpec(gguf=gguf, **limits), {gguf: hash_file_cached(gguf)}
        check_files(model, again=False)
        return ModelSpec(gguf=model.gguf_path, adapter=model.adapter_path, **limits), model.files

    def _remote(self, upstream: UpstreamSettings) -> Served:
        return Served(f"{self.loop.name}@{upstream.model}", None, Upstream(upstream, self._via), self.capacity, None)

    async def _fallback_model(self, problem: str) -> Served:
        wanted = self.loop.serving.fallback
        serving_base = self.current is not None and self.current.spec is not None and self.current.identity is None
        if wanted is None or (wanted == BASE and serving_base):
            raise Unavailable(f"{self.loop.name} cannot answer now", detail=problem, retry_after=2)
        return await self._whoever_waits(self._open_fallback(wanted, problem))

    async def _open_fallback(self, wanted: Literal["base"] | UpstreamSettings, problem: str) -> Served:
        async with self._opening_others:
            if self._fallback is not None and self._fallback.alive:
                return self._fallback
            try:
                self._fallback = (
                    self._remote(wanted) if isinstance(wanted, UpstreamSettings) else await self._open_base()
                )
            except _NOT_LOADABLE as error:
                raise Unavailable(
                    f"{self.loop.name} cannot answer, nor can its fallback",
                    detail=f"{problem}; {error}",
                    retry_after=10,
                ) from error
            _log.warning("%s takes over for %s: %s", self._fallback.name, self.loop.name, problem)
            return self._fallback

    async def _open_base(self) -> Served:
        spec, files = await asyncio.to_thread(self._spec, None)
        return Served(f"{self.loop.name}@base", None, LocalModel(await _engine(spec)), self.capacity, spec, files)

    async def _version(self, model: ModelVersion | None) -> Served:
        if not self.loop.serving.versions:
            raise Unavailable(f"{self.loop.name} serves its champion only (serving.versions is 0)")
        return await self._whoever_waits(self._open_version(model))

    async def _open_version(self, model: ModelVersion | None) -> Served:
        name = model.name if model else f"{self.loop.name}@base"
        async with self._opening_others:
            known = self._versions.pop(name, None)
            if known is None or not known.alive:
                try:
                    spec, files = await asyncio.to_thread(self._spec, model)
                    engine = await _engine(spec)
                except _NOT_LOADABLE as error:
                    raise Unavailable(f"{name} does not load", detail=error) from error
                known = Served(name, model.id if model else None, LocalModel(engine), self.capacity, spec, files)
            self._versions[name] = known
            while len(self._versions) > self.loop.serving.versions:
                _, least_used = self._versions.popitem(last=False)
                self._later(least_used.retire())
            return known

    async def _revive(self, broken: Served, problem: str) -> None:
        """Start a crashed model again, unless it crashes all the time."""
        if broken is not self.current or broken.alive or self._moving.locked():
            return
        now = time.monotonic()
        self._crashes.append(now)
        if len(self._crashes) == CRASHES and now - self._crashes[0] < CRASH_SECONDS:
            self.trouble = f"{broken.name} crashed {CRASHES} times within a minute and is left alone: {problem}"
            self._refused = (broken.identity, now + RETRY_SECONDS)
            _log.error(self.trouble)
            return
        await self.reload()

    async def _whoever_waits(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it to its end, though the client that asked for it may go away: what is loaded belongs to the loop."""
        return await asyncio.shield(self._later(work))

    def _later(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody else needs to hear of it


async def _engine(spec: ModelSpec) -> Engine:
    """Load a model without holding up the event loop; one that nobody waits for any more is closed again."""
    opening = asyncio.create_task(asyncio.to_thread(Engine, spec))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(opening: "asyncio.Task[Engine]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        threading.Thread(target=opening.result().close).start()


class _Told:
    """Passes pieces on and remembers whether there were any."""

    def __init__(self, on_delta: OnNamedDelta | None) -> None:
        self.anything = False
        self._on_piece = on_delta

    def by(self, served: Served) -> OnDelta | None:
        """What to give to this model; None where nobody listens."""
        return partial(self._take, served.name) if self._on_piece else None

    def _take(self, name: str, piece: str) -> None:
        self.anything = True
        if self._on_piece:
            self._on_piece(name, piece)


async def _asked(served: Served, request: GenerateRequest, on_delta: OnDelta | None) -> Completion:
    try:
        return await served.answer(request, on_delta)
    except RequestRefused as error:
        raise Refused(str(error)) from error
