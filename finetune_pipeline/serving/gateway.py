"""The gateway without HTTP: its loops, their models, the recorder, and what keeps them up to date."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from uuid import uuid4

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.write_ahead_log import Outcome, Recorder, take_over_orphans
from finetune_pipeline.records import Feedback, Interaction
from finetune_pipeline.registry.champion import champion_ids
from finetune_pipeline.serving.access import Access
from finetune_pipeline.serving.errors import BadRequest, NotFound, Unavailable
from finetune_pipeline.serving.metrics import Metrics
from finetune_pipeline.serving.models import LoopServer
from finetune_pipeline.serving.routing import names_of
from finetune_pipeline.settings import LoopSettings, load_loop, survives_power_cut

LOOK_SECONDS = 0.5
"""Time between two looks at the registry: a promotion, switch or rollback is seen within it."""

_log = logging.getLogger(__name__)


class Gateway:
    """Everything that the routes need; `start` and `stop` belong to an event loop.

    Args:
        loops: what is served.
        database: store and registry.
        loopback: it can be reached from this machine only.
        tell: gets a line when something is done that takes a while.

    Raises:
        SettingsError: two loops claim one name.
    """

    def __init__(
        self,
        loops: Sequence[LoopSettings],
        database: Database,
        *,
        loopback: bool = True,
        tell: Callable[[str], None] = _log.info,
    ) -> None:
        self.id = str(uuid4())
        self.loops = {loop.name: loop for loop in loops}
        self.names = names_of(loops)
        self.database = database
        self.loopback = loopback
        self.access = Access(database, loopback=loopback)
        self.metrics = Metrics()
        self.servers: Mapping[str, LoopServer] = {}
        self._rewards = {loop.name: reward_function(loop.feedback) for loop in loops}
        self._tell = tell
        self._watching: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take over what a killed gateway left, load every loop's model, and begin to follow the registry."""
        left = await asyncio.to_thread(take_over_orphans, self.database, self._reward_of)
        if left:
            self._tell(f"{left} events that a killed gateway had acknowledged were taken over from its journal")
        self.recorder = Recorder(self.database, self._reward_of)
        self._flush_each = survives_power_cut()
        self.servers = {name: LoopServer(loop, self.database, self.id) for name, loop in self.loops.items()}
        self.metrics.watch(self.servers, lambda: self.recorder.pending)
        for name, server in self.servers.items():
            await server.reload()
            self._tell(f"{name}: {server.trouble or f'{server.answering} serves'}")
        # Apart, since neither a revoked key nor another loop should wait until a large model is loaded.
        looks: list[Callable[[], Awaitable[None]]] = [
            self._read_keys,
            *(partial(self.follow, name) for name in self.servers),
        ]
        self._watching = [asyncio.create_task(_watch(look)) for look in looks]

    async def stop(self) -> None:
        """Bring what was recorded into the store, and end every model."""
        for loop in self._watching:
            loop.cancel()
        await asyncio.gather(*(server.close() for server in self.servers.values()))
        await asyncio.to_thread(self.recorder.close)

    async def record(self, event: Interaction | Feedback) -> "Future[Outcome]":
        """Record an event so that a kill loses nothing; its future says when it is in the store, and as what.

        Raises:
            Unavailable: the disk is full.
        """
        try:
            if self._flush_each:  # milliseconds of disk: not in the event loop
                return await asyncio.to_thread(self.recorder.add, event)
            return self.recorder.add(event)
        except ArtifactError as error:
            raise Unavailable("this cannot be recorded, so it is not answered", detail=error, retry_after=30) from error

    def loop_named(self, name: str | None) -> LoopSettings:
        """The loop of this name, or the only one.

        Raises:
            NotFound: there is none of this name.
            BadRequest: no name was given, and there are several.
        """
        if name is None:
            if len(self.loops) == 1:
                return next(iter(self.loops.values()))
            raise BadRequest(f"several loops are served; name one of {', '.join(self.loops)}", param="loop")
        if name not in self.names:
            raise NotFound(f"no loop {name[:100]!r} is served; there are: {', '.join(self.loops)}", param="loop")
        return self.loops[self.names[name]]

    async def follow(self, name: str) -> None:
        """Look at the registry once, and change to the model that it names for this loop."""
        pointers = await asyncio.to_thread(champion_ids, self.database)
        await self.servers[name].follow(pointers.get(name))

    async def _read_keys(self) -> None:
        await asyncio.to_thread(self.access.refresh)

    def _reward_of(self, loop: str) -> RewardFunction:
        if loop not in self._rewards:  # of another gateway's journal
            self._rewards[loop] = reward_function(load_loop(loop).feedback)
        return self._rewards[loop]


async def _watch(look: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            await look()
        except Exception:  # the database may be away for a while: what serves goes on serving
            _log.exception("the database could not be read; what serves goes on serving")
