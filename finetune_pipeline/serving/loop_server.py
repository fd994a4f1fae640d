"""The models of one loop: the champion, its fallback, and versions that requests name.

`LoopServer.follow` changes to the registry's champion. The new model is loaded while the old one serves, new requests
go to it, and the old one is drained. LoRA adapters over the same base model are swapped within the process, in
milliseconds. If the new model does not load, the old one stays in service.

With `serving.target` it asks a deployment target instead, for the release that is active there.
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
from finetune_pipeline.deployment.target_state import ActiveRelease, target_states
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.export.process import ExportError
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import (
    ContextExceeded,
    EngineClosed,
    EngineCrashed,
    EngineError,
    ModelNotLoaded,
    RequestRefused,
    UpstreamFailed,
)
from finetune_pipeline.inference.protocol import Completion, Delta, GenerateRequest, ModelSpec
from finetune_pipeline.inference.remote import RemoteModel
from finetune_pipeline.pipeline.challengers import find_trained
from finetune_pipeline.registry.champion import BASE, champion, resolve
from finetune_pipeline.registry.model_versions import CandidateModel, RegistryError, check_files
from finetune_pipeline.serving.errors import (
    ContextLengthExceeded,
    GenerationRefused,
    Overloaded,
    Unavailable,
    UnknownModel,
)
from finetune_pipeline.serving.loaded_model import LoadedModel, OnDelta
from finetune_pipeline.settings import LoopSettings, UpstreamSettings

Variant = Literal["champion", "fallback", "version"]

OnNamedDelta = Callable[[str, Delta], None]
"""Called with the name of the model that answers, and a delta of its answer."""

LOAD_SECONDS = 60.0
"""How long a request waits for a model that is loaded for it; loading continues when it stops waiting."""

RETRY_SECONDS = 30.0
"""Time until a model that did not load is tried again."""

CRASHES, CRASH_SECONDS = 3, 60.0
"""A model that crashes so often within this time is not restarted."""

_NOT_LOADABLE = (EngineError, RegistryError, ExportError, ArtifactError, OSError)
_MODEL_FAILED = (EngineCrashed, EngineClosed, ModelNotLoaded, UpstreamFailed)
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RoutedCompletion:
    """A completion, the model that generated it, and how that model was chosen."""

    completion: Completion
    model: str
    variant: Variant


class LoopServer:
    """Answers requests for one loop and hot-swaps its models.

    Args:
        gateway_id: sent to other servers, so that the gateway detects requests to itself.

    Attributes:
        current: the champion, or the base model while there is none; None if it could not be loaded.
        last_error: why the champion does not serve; None if it does.
    """

    def __init__(self, loop: LoopSettings, database: Database, gateway_id: str) -> None:
        self.loop = loop
        self.last_error: str | None = None
        self.swaps = 0
        self.failed_swaps = 0
        self.fallbacks = 0
        self.current: LoadedModel | None = None
        self._database = database
        self._gateway_id = gateway_id
        self._change_lock = asyncio.Lock()  # held while `current` changes
        self._no_swap = asyncio.Event()  # cleared while an adapter is swapped
        self._no_swap.set()
        self._waiting_for_swap = 0
        self._fallback: LoadedModel | None = None
        self._versions: OrderedDict[str, LoadedModel] = OrderedDict()  # least recently used first
        self._open_lock = asyncio.Lock()  # held while a fallback or version is loaded
        self._not_loaded: tuple[str | None, float] | None = None  # version id, and when to try it again
        self._active: ActiveRelease | None = None  # on serving.target
        self._warned_of_empty_answers = False
        self._crashes: deque[float] = deque(maxlen=CRASHES)
        self._tasks: set[asyncio.Task[Any]] = set()

    # ---- state

    @property
    def capacity(self) -> int:
        """Number of requests that one model of this loop may have, running and waiting."""
        return self.loop.serving.parallel + self.loop.serving.queue

    @property
    def loaded(self) -> list[LoadedModel]:
        """All models that are loaded for this loop."""
        return [model for model in (self.current, self._fallback, *self._versions.values()) if model is not None]

    @property
    def serving(self) -> str | None:
        """Name of the model that answers now: the champion or the fallback."""
        return next((model.name for model in (self.current, self._fallback) if model and model.alive), None)

    @property
    def problem(self) -> str | None:
        """What /healthz reports; None if all is well."""
        if self.last_error is not None:
            return self.last_error
        if self.current is not None and not self.current.alive and isinstance(self.current.runner, Engine):
            return f"{self.current.name} ended and is being replaced: {self.current.runner.exit_error}"
        return self._empty_answers()

    def _empty_answers(self) -> str | None:
        found = (model.empty_answers(self.loop.serving.empty_limit) for model in self.loaded)
        return next((description for description in found if description), None)

    # ---- answering

    async def answer(self, request: GenerateRequest, on_delta: OnNamedDelta | None) -> RoutedCompletion:
        """Answer with the champion, or with the fallback if the champion fails.

        Raises:
            Overloaded, Unavailable, GenerationRefused: there is no answer.
        """
        await self._wait_for_swap()
        deltas = _NamedDeltas(on_delta)
        while True:
            current = self.current
            problem = self.last_error or "no model is loaded"
            if current is not None:
                try:
                    completion = await _generate(current, request, deltas.of(current))
                except _MODEL_FAILED as error:
                    problem = str(error)
                    if current.is_remote:  # it cannot be restarted from here, and the next request may succeed
                        self.last_error = f"{current.name}: {problem}"
                    else:
                        self._in_background(self._restart(current, problem))
                    if deltas.sent:
                        message = f"{current.name} failed in the middle of the answer"
                        raise Unavailable(message, detail=problem) from error
                else:
                    if current.is_remote and self.last_error is not None:
                        self.last_error = None
                        self._drain_fallback()
                    return RoutedCompletion(completion, current.name, "champion")
            fallback = await self._fallback_model(problem)
            try:
                completion = await _generate(fallback, request, deltas.of(fallback))
            except _MODEL_FAILED as error:
                if isinstance(error, EngineClosed) and self.current is not current and not deltas.sent:
                    continue  # the champion is back, and the fallback was drained before it got this request
                raise Unavailable(
                    f"Neither {self.loop.name}'s champion nor {fallback.name} can answer",
                    detail=f"{problem}; {error}",
                    retry_after=2,
                ) from error
            self.fallbacks += 1
            return RoutedCompletion(completion, fallback.name, "fallback")

    async def answer_with(
        self, version: str, request: GenerateRequest, on_delta: OnNamedDelta | None
    ) -> RoutedCompletion:
        """Answer with a version or challenger that the request names.

        Raises:
            UnknownModel: there is no such version.
            Overloaded, Unavailable, GenerationRefused: there is no answer.
        """
        try:
            wanted = await asyncio.to_thread(find_trained, self._database, version, self.loop.name)
        except RegistryError as error:
            raise UnknownModel(str(error), param="model") from error
        except ArtifactError as error:
            raise Unavailable(f"{self.loop.name}@{version} does not load", detail=error) from error
        await self._wait_for_swap()
        variant: Variant = "version"
        version_id = wanted.id if wanted else None
        current = self.current
        named = current is not None and (not current.is_remote or self._active is not None)  # not an upstream's model
        if named and current is not None and current.version_id == version_id:
            model, variant = current, "champion"
        elif not self.loop.serving.versions:
            raise Unavailable(f"{self.loop.name} serves only its champion, because serving.versions is 0 in its YAML.")
        else:
            model = await self._wait_until_loaded(self._open_version(wanted))
        try:
            completion = await _generate(model, request, _NamedDeltas(on_delta).of(model))
        except _MODEL_FAILED as error:
            raise Unavailable(f"{model.name} cannot answer", detail=error, retry_after=2) from error
        return RoutedCompletion(completion, model.name, variant)

    async def _wait_for_swap(self) -> None:
        """Wait while an adapter is swapped, because later requests are for the new one."""
        if self._no_swap.is_set():
            return
        if self._waiting_for_swap >= self.capacity:
            raise Overloaded(
                f"{self.loop.name} changes its model, and {self._waiting_for_swap} requests wait for it. Try again in "
                "a second.",
                retry_after=1,
            )
        self._waiting_for_swap += 1
        try:
            await self._no_swap.wait()
        finally:
            self._waiting_for_swap -= 1

    # ---- changing the champion

    async def follow(self, version_id: str | None) -> None:
        """Check the health of all models, and change to the champion with this id unless it serves already."""
        empty = self._empty_answers()
        if empty and not self._warned_of_empty_answers:
            _log.warning(empty)
        self._warned_of_empty_answers = bool(empty)
        async with self._change_lock:
            if self.loop.serving.target is not None:
                await self._follow_target(self.loop.serving.target)
                return
            if self.loop.serving.upstream is not None and self.current is not None:
                return
            await self._drain_damaged()
            if self.current is not None and self.current.version_id == version_id and self.current.alive:
                self._not_loaded = self.last_error = None  # the pointer moved back to the model that serves
                self._drain_fallback()
                return
            if self._not_loaded is not None:
                failed, retry_at = self._not_loaded
                if failed == version_id and time.monotonic() < retry_at:
                    return
            await self._load_champion()

    async def reload(self) -> bool:
        """Load the champion again and change to it; return False if it does not load."""
        async with self._change_lock:
            if self.loop.serving.target is not None:
                self._active = None
                await self._follow_target(self.loop.serving.target)
                return self.last_error is None
            return await self._load_champion()

    async def close(self) -> None:
        """Close all models; running requests fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for model in self.loaded:
            await model.close()

    async def _load_champion(self) -> bool:
        version = await asyncio.to_thread(champion, self._database, self.loop.name)
        try:
            new = await self._open_or_swap(version)
        except _NOT_LOADABLE as error:
            self._not_loaded = (version.id if version else None, time.monotonic() + RETRY_SECONDS)
            state = f"{self.serving} stays in service" if self.serving else "no other model is in service"
            self.last_error = f"{self._name_of(version)} does not load; {state}: {error}"
            self.failed_swaps += 1
            _log.error(self.last_error)
            if self.current is None:
                with suppress(Unavailable):  # requests will get this error
                    await self._fallback_model(self.last_error)
            return False
        old, self.current = self.current, new
        self._not_loaded = self.last_error = None
        self.swaps += old is not None
        _log.info("%s is in service%s", new.name, f", replacing {old.name}" if old else "")
        if old is not None and old.runner is not new.runner:
            self._in_background(old.drain())
        self._drain_fallback()
        return True

    async def _follow_target(self, target: str) -> None:
        """Ask the release that is active on a deployment target from now on, if another one was."""
        states = await asyncio.to_thread(target_states, self._database, self.loop.name)
        active = states[target].active if target in states else None
        if active is None:
            if self.current is None:
                self.last_error = f"nothing was deployed to {target} yet; see `finetune deploy status`"
            return
        if active == self._active:
            return
        try:
            version = await asyncio.to_thread(resolve, self._database, active.label, self.loop.name)
            new = self._open_remote(active.upstream, version, active)
        except (EngineError, RegistryError) as error:
            self.last_error = f"{self.loop.name}@{active.label} cannot be asked at {target}: {error}"
            return
        old, self.current, self._active, self.last_error = self.current, new, active, None
        self.swaps += old is not None
        _log.info("%s is in service at %s%s", new.name, target, f", replacing {old.name}" if old else "")
        if old is not None:
            self._in_background(old.drain())
        self._drain_fallback()

    async def _open_or_swap(self, version: CandidateModel | None) -> LoadedModel:
        """Load a version, or swap only the adapter if the current process has the same base model."""
        upstream = self.loop.serving.upstream
        if upstream is not None:
            return self._open_remote(upstream)
        spec, files = await asyncio.to_thread(self._find_files, version)
        now = self.current
        if now is None or not now.alive or now.spec is None or now.spec.gguf != spec.gguf or now.spec == spec:
            return await self._open(version, spec, files)
        assert isinstance(now.runner, Engine)
        self._no_swap.clear()
        try:
            await asyncio.wrap_future(now.runner.swap_adapter(spec.adapter))
        finally:
            # Waiting requests continue in a later turn of the event loop, when `current` has its new name.
            asyncio.get_running_loop().call_later(0, self._no_swap.set)
        return self._loaded_model(version, now.runner, spec, files)

    async def _drain_damaged(self) -> None:
        """Take models out of service whose files were damaged while they served."""
        for model in self.loaded:
            try:
                await asyncio.to_thread(model.check_files)
            except (ArtifactError, OSError) as error:
                _log.error("%s is taken out of service: %s", model.name, error)
                if model is self.current:
                    self.current, self.last_error = None, f"{model.name} was taken out of service: {error}"
                elif model is self._fallback:
                    self._fallback = None
                else:
                    self._versions = OrderedDict((k, v) for k, v in self._versions.items() if v is not model)
                self._in_background(model.drain())

    async def _restart(self, crashed: LoadedModel, problem: str) -> None:
        """Load a crashed model again, unless it crashes all the time."""
        if crashed is not self.current or crashed.alive or self._change_lock.locked():
            return
        now = time.monotonic()
        self._crashes.append(now)
        if len(self._crashes) == CRASHES and now - self._crashes[0] < CRASH_SECONDS:
            self.last_error = f"{crashed.name} crashed {CRASHES} times within a minute and is not restarted: {problem}"
            self._not_loaded = (crashed.version_id, now + RETRY_SECONDS)
            _log.error(self.last_error)
            return
        await self.reload()

    # ---- fallback and versions

    async def _fallback_model(self, problem: str) -> LoadedModel:
        wanted = self.loop.serving.fallback
        serves_base = self.current is not None and not self.current.is_remote and self.current.version_id is None
        if wanted is None or (wanted == BASE and serves_base):
            raise Unavailable(f"{self.loop.name} cannot answer now", detail=problem, retry_after=2)
        return await self._wait_until_loaded(self._open_fallback(wanted, problem))

    async def _open_fallback(self, wanted: Literal["base"] | UpstreamSettings, problem: str) -> LoadedModel:
        async with self._open_lock:
            if self._fallback is not None and self._fallback.alive:
                return self._fallback
            try:
                if isinstance(wanted, UpstreamSettings):
                    self._fallback = self._open_remote(wanted)
                else:
                    self._fallback = await self._open(None, *await asyncio.to_thread(self._find_files, None))
            except _NOT_LOADABLE as error:
                raise Unavailable(
                    f"{self.loop.name} cannot answer, and neither can its fallback",
                    detail=f"{problem}; {error}",
                    retry_after=10,
                ) from error
            _log.warning("%s is the fallback for %s: %s", self._fallback.name, self.loop.name, problem)
            return self._fallback

    def _drain_fallback(self) -> None:
        if self._fallback is not None and not self._open_lock.locked():
            fallback, self._fallback = self._fallback, None
            self._in_background(fallback.drain())

    async def _open_version(self, version: CandidateModel | None) -> LoadedModel:
        """Return a model that requests name; load it if necessary, and drain the least recently used one."""
        name = self._name_of(version)
        async with self._open_lock:
            model = self._versions.pop(name, None)
            if model is None or not model.alive:
                try:
                    model = await self._open(version, *await asyncio.to_thread(self._find_files, version))
                except _NOT_LOADABLE as error:
                    raise Unavailable(f"{name} does not load", detail=error) from error
            self._versions[name] = model
            while len(self._versions) > self.loop.serving.versions:
                _, least_recent = self._versions.popitem(last=False)
                self._in_background(least_recent.drain())
            return model

    # ---- loading

    def _find_files(self, version: CandidateModel | None) -> tuple[ModelSpec, dict[Path, str]]:
        """Return what to load for a version, and its files with their SHA-256; None is the base model.

        A GGUF of the base model that is missing or damaged is exported here, which takes minutes for a large model.
        `finetune serve` does that before it starts if the loop has no champion; requests wait at most LOAD_SECONDS.
        """
        serving = self.loop.serving
        limits = {"context": self.loop.context, "parallel": serving.parallel, "stuck_seconds": serving.stuck_seconds}
        if version is None:
            gguf = base_gguf(self.loop, _log.info)
            return ModelSpec(gguf=gguf, **limits), {gguf: hash_file_cached(gguf)}
        check_files(version, again=False)
        return ModelSpec(gguf=version.gguf_path, adapter=version.adapter_path, **limits), version.files

    async def _open(self, version: CandidateModel | None, spec: ModelSpec, files: dict[Path, str]) -> LoadedModel:
        """Start an engine without blocking the event loop; if this is canceled, close the engine once it is open."""
        opening = asyncio.create_task(asyncio.to_thread(Engine, spec))
        try:
            engine = await asyncio.shield(opening)
        except asyncio.CancelledError:

            def close(opening: "asyncio.Task[Engine]") -> None:
                if not opening.cancelled() and opening.exception() is None:
                    threading.Thread(target=opening.result().close).start()

            opening.add_done_callback(close)
            raise
        return self._loaded_model(version, engine, spec, files)

    def _open_remote(
        self, upstream: UpstreamSettings, version: CandidateModel | None = None, active: ActiveRelease | None = None
    ) -> LoadedModel:
        """Return a client of another server, which has this version if it is a deployment target."""
        name = f"{self.loop.name}@{active.label if active else upstream.model}"
        named_by = "deploy.targets" if active else "serving.upstream"
        vocabulary = Path(active.vocabulary) if active and active.vocabulary else None
        remote = RemoteModel(upstream, self._gateway_id, named_by, vocabulary)
        return LoadedModel(name, version.id if version else None, remote, self.capacity, None)

    def _loaded_model(
        self, version: CandidateModel | None, engine: Engine, spec: ModelSpec, files: dict[Path, str]
    ) -> LoadedModel:
        version_id = version.id if version else None
        return LoadedModel(self._name_of(version), version_id, engine, self.capacity, spec, files)

    def _name_of(self, version: CandidateModel | None) -> str:
        return version.name if version else f"{self.loop.name}@base"

    async def _wait_until_loaded(self, work: Coroutine[Any, Any, LoadedModel]) -> LoadedModel:
        """Load a model in a task that continues when the client disconnects or has waited LOAD_SECONDS."""
        task = self._in_background(work)
        done, _ = await asyncio.wait({task}, timeout=LOAD_SECONDS)
        if not done:
            raise Unavailable(
                f"{self.loop.name} is still loading the model for this request; try again in a few seconds.",
                retry_after=10,
            )
        return task.result()

    def _in_background(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def done(task: "asyncio.Task[T]") -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # mark it as retrieved; nobody may be waiting for it

        task.add_done_callback(done)
        return task


class _NamedDeltas:
    """Forwards text deltas with the model's name.

    Attributes:
        sent: whether any delta was forwarded, so that another model can no longer answer.
    """

    def __init__(self, on_delta: OnNamedDelta | None) -> None:
        self.sent = False
        self._on_delta = on_delta

    def of(self, model: LoadedModel) -> OnDelta | None:
        """Return the callback for this model; None if nobody wants deltas."""
        return partial(self._forward, self._on_delta, model.name) if self._on_delta else None

    def _forward(self, on_delta: OnNamedDelta, name: str, delta: Delta) -> None:
        self.sent = True
        on_delta(name, delta)


async def _generate(model: LoadedModel, request: GenerateRequest, on_delta: OnDelta | None) -> Completion:
    try:
        return await model.generate(request, on_delta)
    except ContextExceeded as error:
        raise ContextLengthExceeded(str(error)) from error
    except RequestRefused as error:
        raise GenerationRefused(str(error)) from error
