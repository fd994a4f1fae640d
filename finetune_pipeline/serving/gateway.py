"""The gateway without HTTP: loops, their models, the recorder of events, and background refreshes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from uuid import UUID, uuid4

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import find_interaction
from finetune_pipeline.feedback.write_ahead_log import Outcome, Recorder, recover_orphans
from finetune_pipeline.orchestrator import Orchestrator, dagster_url
from finetune_pipeline.pipeline.jobs import sync_all
from finetune_pipeline.pipeline.loop_files import constraint
from finetune_pipeline.records import Feedback, Interaction
from finetune_pipeline.registry.champion import champion_ids
from finetune_pipeline.serving.access import Access
from finetune_pipeline.serving.comparer import COMPARE_SECONDS, compare_next
from finetune_pipeline.serving.deployer import DEPLOY_SECONDS, deploy_due
from finetune_pipeline.serving.errors import BadRequest, NotFound, Unavailable
from finetune_pipeline.serving.loop_server import LoopServer
from finetune_pipeline.serving.metrics import Metrics
from finetune_pipeline.serving.routing import loops_by_name
from finetune_pipeline.settings import LoopSettings, home, load_loop, survives_power_cut
from finetune_pipeline.wording import counted

REFRESH_SECONDS = 0.5
"""Interval at which the registry and the API keys are read."""

SYNC_SECONDS = 5.0
"""Interval at which the training jobs in progress are compared with their runs."""

IGNORED_NAMES = 1_000
"""Most names of unknown fields that are logged; clients can send any number of them."""

_log = logging.getLogger(__name__)


class Gateway:
    """The state that all routes share; `start` and `stop` run in the event loop that serves.

    Args:
        loops: the loops to serve.
        database: with store and registry.
        loopback: the address can be reached only from this machine.
        allow_origins: origins whose web pages may use the gateway, in addition to those of this machine.
        progress: called with a line for each step that takes long.

    Attributes:
        constraints: the JSON Schema to which each loop's answers are constrained, or None, by the loop's name.
        answering: requests in progress whose client chose the id: the hash of the request, and when it has ended.

    Raises:
        SettingsError: two loops have the same name or alias.
        SchemaError: the output schema of a loop cannot be read or enforced.
    """

    def __init__(
        self,
        loops: Sequence[LoopSettings],
        database: Database,
        *,
        loopback: bool = True,
        allow_origins: Collection[str] = (),
        progress: Callable[[str], None] = _log.info,
    ) -> None:
        self.id = str(uuid4())
        self.loops = {loop.name: loop for loop in loops}
        self.names = loops_by_name(loops)
        self.constraints = {loop.name: constraint(loop) for loop in loops}
        self.database = database
        self.loopback = loopback
        self.access = Access(database, loopback=loopback, allow_origins=allow_origins)
        self.metrics = Metrics()
        self.servers: Mapping[str, LoopServer] = {}
        self._rewards = {loop.name: reward_function(loop.feedback) for loop in loops}
        self.answering: dict[UUID, tuple[str, asyncio.Event]] = {}
        self._ignored: set[str] = set()
        self._progress = progress
        self._refreshing: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Recover the events of killed gateways, load all models, and start to follow the registry."""
        recovered = await asyncio.to_thread(recover_orphans, self.database, self._reward_of)
        if recovered:
            self._progress(f"recovered {counted(recovered, 'event')} of a killed gateway from its write-ahead log")
        self.recorder = Recorder(self.database, self._reward_of)
        self._flush_each = survives_power_cut()
        self.servers = {name: LoopServer(loop, self.database, self.id) for name, loop in self.loops.items()}
        self.metrics.collect_from(self.servers, lambda: self.recorder.pending)
        for name, server in self.servers.items():
            await server.reload()
            if server.last_error:
                self._progress(f"{name}: {server.last_error}")
        # One task each: while a large model loads, a revoked key and the other loops must not wait.
        refreshes: list[Callable[[], Awaitable[None]]] = [partial(asyncio.to_thread, self.access.refresh)]
        refreshes += [partial(self.follow_champion, name) for name in self.servers]
        self._refreshing = [asyncio.create_task(_repeat(refresh)) for refresh in refreshes]
        compare = partial(compare_next, self.loops, self.database)
        self._refreshing.append(asyncio.create_task(_repeat(compare, COMPARE_SECONDS)))
        for loop in self.loops.values():
            if loop.deploy.followers:
                deploy = partial(deploy_due, loop, self.database)
                self._refreshing.append(asyncio.create_task(_repeat(deploy, DEPLOY_SECONDS)))

        sync = partial(asyncio.to_thread, self._sync_jobs)
        self._refreshing.append(asyncio.create_task(_repeat(sync, SYNC_SECONDS)))

    async def stop(self) -> None:
        """Close all models and write the remaining events to the store."""
        for task in self._refreshing:
            task.cancel()
        await asyncio.gather(*self._refreshing, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self.servers.values()))
        await asyncio.to_thread(self.recorder.close)

    async def find(self, id: UUID) -> Interaction | None:
        """Return an interaction of any loop, also while it is only in the write-ahead log."""

        def read() -> Interaction | None:
            pending = self.recorder.find_pending(id)
            if pending is not None:
                return pending
            with self.database.read() as connection:
                found = find_interaction(connection, id)
            return found.interaction if found is not None else None

        return await asyncio.to_thread(read)

    def log_ignored(self, fields: Iterable[str]) -> None:
        """Log unknown fields of requests, each once."""
        for name in (field[:200] for field in fields):
            if name not in self._ignored and len(self._ignored) < IGNORED_NAMES:
                self._ignored.add(name)
                _log.warning("requests have the unknown field %r, which is ignored", name)

    async def record(self, event: Interaction | Feedback) -> "Future[Outcome]":
        """Append an event to the write-ahead log; the future is done when it is in the store.

        Raises:
            Unavailable: the disk is full.
        """
        try:
            if self._flush_each:  # takes milliseconds of disk, so not in the event loop
                return await asyncio.to_thread(self.recorder.add, event)
            return self.recorder.add(event)
        except ArtifactError as error:
            raise Unavailable(
                "The event cannot be recorded, so it is not accepted", detail=error, retry_after=30
            ) from error

    def loop_named(self, name: str | None) -> LoopSettings:
        """Return the loop with this name or alias; without a name, the only loop.

        Raises:
            NotFound: there is no loop with this name.
            BadRequest: there is no name, and there are several loops.
        """
        if name is None:
            if len(self.loops) == 1:
                return next(iter(self.loops.values()))
            raise BadRequest(f"Several loops are served; name one of {', '.join(self.loops)}.", param="loop")
        if name not in self.names:
            raise NotFound(f"No loop {name[:100]!r} is served; there are: {', '.join(self.loops)}.", param="loop")
        return self.loops[self.names[name]]

    async def follow_champion(self, name: str) -> None:
        """Read the registry's champion of a loop and change to it."""
        pointers = await asyncio.to_thread(champion_ids, self.database)
        await self.servers[name].follow(pointers.get(name))

    def orchestrator(self) -> Orchestrator:
        """Return the client of the Dagster that runs the training jobs; `finetune ui` may have moved it meanwhile."""
        return Orchestrator(dagster_url(home()))

    def _sync_jobs(self) -> None:
        sync_all(self.database, self.orchestrator(), self.loops)

    def _reward_of(self, loop: str) -> RewardFunction:
        if loop not in self._rewards:  # of another gateway's write-ahead log
            self._rewards[loop] = reward_function(load_loop(loop).feedback)
        return self._rewards[loop]


async def _repeat(refresh: Callable[[], Awaitable[None]], seconds: float = REFRESH_SECONDS) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await refresh()
        except Exception:  # the database may be away for a while
            _log.exception("the database could not be read; the loaded models stay in service")
