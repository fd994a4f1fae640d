"""Client of Dagster's GraphQL API: launches, finds and terminates runs, without importing Dagster."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import yaml

from finetune_pipeline.wording import first_line

CODE_LOCATION = "finetune_pipeline"
"""The name in workspace.yaml."""

REPOSITORY = "__repository__"
"""The name that Dagster gives to the one repository of a code location."""

_UNREACHABLE = "DagsterUserCodeUnreachableError"
"""In the messages of Dagster if its code server was killed; the webserver takes it for loaded until it is reloaded."""

FINISHED = frozenset({"SUCCESS", "FAILURE", "CANCELED"})
"""Statuses in which a run stays."""

_LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on Error { message }
  }
}
"""

_CHECK = """
query ($location: String!, $job: PipelineSelector!) {
  workspaceLocationEntryOrError(name: $location) {
    __typename
    ... on WorkspaceLocationEntry { locationOrLoadError { __typename ... on PythonError { message } } }
    ... on Error { message }
  }
  pipelineOrError(params: $job) { __typename }
}
"""

_RUNS = """
query ($filter: RunsFilter!) {
  runsOrError(filter: $filter) {
    __typename
    ... on Runs {
      results {
        runId status creationTime startTime endTime runConfigYaml tags { key value } assetSelection { path }
      }
    }
    ... on Error { message }
  }
}
"""

_TERMINATE = """
mutation ($run: String!) {
  terminateRun(runId: $run) {
    __typename
    ... on TerminateRunFailure { message }
    ... on Error { message }
  }
}
"""


_AUTOMATION = """
query ($repository: RepositorySelector!) {
  instance { daemonHealth { allDaemonStatuses { daemonType lastHeartbeatTime } } }
  sensorsOrError(repositorySelector: $repository) {
    __typename
    ... on Sensors { results { name sensorState { status } } }
    ... on Error { message }
  }
  schedulesOrError(repositorySelector: $repository) {
    __typename
    ... on Schedules { results { name scheduleState { status } } }
    ... on Error { message }
  }
}
"""

HEARTBEAT_SECONDS = 120
"""A daemon that has not reported for so long has ended; it reports every 30 seconds. Dagster calls it healthy for half
an hour."""


class OrchestratorError(RuntimeError):
    """Dagster rejects a request; the message has its answer."""


class OrchestratorDown(OrchestratorError):
    """Dagster's webserver, or the code server behind it, does not answer; the message says how to start it."""


@dataclass(frozen=True)
class DagsterRun:
    """A run as Dagster records it.

    Attributes:
        status: NOT_STARTED, QUEUED, STARTING, STARTED, CANCELING, SUCCESS, FAILURE or CANCELED.
        created_at: when it was launched.
        started_at: when its process began; None before.
        ended_at: when it ended; None before.
        assets: keys of the selected assets, as their parts; None for all of the job.
    """

    id: str
    status: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    tags: Mapping[str, str]
    assets: frozenset[tuple[str, ...]] | None
    config: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return self.status in FINISHED


@dataclass(frozen=True)
class Automation:
    """What starts runs by itself.

    Attributes:
        daemon: Dagster's daemon, which evaluates sensors and schedules, is running.
        switched_on: name of each sensor and schedule -> whether it is on.
    """

    daemon: bool
    switched_on: Mapping[str, bool]


class RunReader(Protocol):
    """Finds runs of Dagster, through its webserver or in its storage."""

    def runs(self, tags: Mapping[str, str]) -> list[DagsterRun]:
        """Return the runs with these tags, newest first."""

    def run(self, id: str) -> DagsterRun | None:
        """Return a run; None if Dagster has none with this id."""


def dagster_url(home: Path) -> str:
    """Return the address of Dagster's webserver: `FINETUNE_DAGSTER_URL`, or that of `finetune ui` for this home.

    Args:
        home: FINETUNE_HOME, in which `finetune ui` notes its address.
    """
    given = os.environ.get("FINETUNE_DAGSTER_URL")
    if given:
        return given.rstrip("/")
    note = Path(os.environ.get("DAGSTER_HOME") or home / "dagster") / "ui.lock"
    noted = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    return noted or "http://127.0.0.1:3000"


class Orchestrator:
    """Dagster behind its webserver.

    Args:
        url: of the webserver, without /graphql.
        timeout_seconds: longest wait for one answer.
    """

    def __init__(self, url: str, timeout_seconds: float = 30) -> None:
        self.url = url
        self._timeout = timeout_seconds

    def check(self, job: str) -> None:
        """Check that Dagster can launch runs of a job.

        Raises:
            OrchestratorError: it does not know the job.
            OrchestratorDown: it does not answer, or it has not loaded the loops.
        """
        found = self._ask(_CHECK, location=CODE_LOCATION, job=_selector(job))
        location = found["workspaceLocationEntryOrError"]
        loaded = location.get("locationOrLoadError") or location
        if loaded["__typename"] != "RepositoryLocation":
            raise self._not_loaded(loaded.get("message", "it still loads them"))
        if found["pipelineOrError"]["__typename"] != "Pipeline":
            raise OrchestratorError(
                f"Dagster at {self.url} has no job {job}; it was started before the loop was written, or with other "
                "loops. Reload its code location, or end `finetune ui` and start it again"
            )

    def _not_loaded(self, reason: str) -> OrchestratorDown:
        return OrchestratorDown(
            f"Dagster at {self.url} answers, but its code server, which loads the loops, does not "
            f"({first_line(reason)}). End `finetune ui` and start it again"
        )

    def launch(
        self, job: str, assets: Sequence[Sequence[str]], run_config: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        """Launch a run of some assets of a job with their checks, and return its id.

        Args:
            job: name of the job.
            assets: keys of the assets, as lists of their parts.
            run_config: of the run, such as {"ops": {...}}.
            tags: of the run, in addition to the job's.

        Raises:
            OrchestratorError: Dagster rejects it.
            OrchestratorDown: Dagster or its code server does not answer.
        """
        params = {
            "selector": {**_selector(job), "assetSelection": [{"path": list(key)} for key in assets]},
            "runConfigData": dict(run_config),
            "mode": "default",
            "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
        }
        answer = self._ask(_LAUNCH, params=params)["launchRun"]
        if answer["__typename"] != "LaunchRunSuccess":
            found = "; ".join(error["message"] for error in answer.get("errors", [])) or answer.get("message", "")
            if _UNREACHABLE in found:
                raise self._not_loaded(found)
            raise OrchestratorError(f"Dagster did not launch {job} ({answer['__typename']}): {found}")
        return str(answer["run"]["runId"])

    def runs(self, tags: Mapping[str, str]) -> list[DagsterRun]:
        """Return the runs with these tags, newest first."""
        return self._runs({"tags": [{"key": key, "value": value} for key, value in tags.items()]})

    def run(self, id: str) -> DagsterRun | None:
        """Return a run; None if Dagster has none with this id."""
        found = self._runs({"runIds": [id]})
        return found[0] if found else None

    def terminate(self, id: str) -> None:
        """Ask Dagster to terminate a run, which ends its steps and their child processes; it may take seconds.

        A run that has ended or is unknown stays as it is.
        """
        answer = self._ask(_TERMINATE, run=id)["terminateRun"]
        if answer["__typename"] in {"TerminateRunSuccess", "RunNotFoundError"}:
            return
        run = self.run(id)
        if run is not None and not run.finished and run.status != "CANCELING":
            raise OrchestratorError(f"Dagster did not terminate the run {id}: {answer.get('message', '')}")

    def automation(self) -> Automation:
        """Return whether Dagster's daemon runs, and which sensors and schedules are on.

        Raises:
            OrchestratorDown: Dagster does not answer.
            OrchestratorError: the code location is not loaded.
        """
        selector = {"repositoryLocationName": CODE_LOCATION, "repositoryName": REPOSITORY}
        answer = self._ask(_AUTOMATION, repository=selector)
        switched_on: dict[str, bool] = {}
        for field, state in (("sensorsOrError", "sensorState"), ("schedulesOrError", "scheduleState")):
            if "results" not in answer[field]:
                raise OrchestratorError(f"Dagster did not list {field}: {answer[field].get('message', '')}")
            switched_on |= {one["name"]: one[state]["status"] == "RUNNING" for one in answer[field]["results"]}
        beats = {
            one["daemonType"]: one["lastHeartbeatTime"] or 0.0
            for one in answer["instance"]["daemonHealth"]["allDaemonStatuses"]
        }
        alive = all(time.time() - beats.get(kind, 0.0) < HEARTBEAT_SECONDS for kind in ("SENSOR", "SCHEDULER"))
        return Automation(alive, switched_on)

    def _runs(self, filter: dict[str, Any]) -> list[DagsterRun]:
        answer = self._ask(_RUNS, filter=filter)["runsOrError"]
        if answer["__typename"] != "Runs":
            raise OrchestratorError(f"Dagster did not list runs: {answer.get('message', '')}")
        return [
            DagsterRun(
                id=run["runId"],
                status=run["status"],
                created_at=datetime.fromtimestamp(run["creationTime"], UTC),
                started_at=_time(run["startTime"]),
                ended_at=_time(run["endTime"]),
                tags={tag["key"]: tag["value"] for tag in run["tags"]},
                assets=None
                if run["assetSelection"] is None
                else frozenset(tuple(key["path"]) for key in run["assetSelection"]),
                config=yaml.safe_load(run["runConfigYaml"]) or {},
            )
            for run in answer["results"]
        ]

    def _ask(self, query: str, **variables: Any) -> dict[str, Any]:
        import httpx

        try:
            response = httpx.post(
                f"{self.url}/graphql", json={"query": query, "variables": variables}, timeout=self._timeout
            )
            response.raise_for_status()
            body = response.json()
        except (httpx.HTTPError, ValueError) as error:
            found = f"{type(error).__name__}: {first_line(str(error))}"
            raise OrchestratorDown(
                f"Dagster does not answer at {self.url} ({found}). Start it with `finetune ui`, or set "
                "FINETUNE_DAGSTER_URL to where its webserver runs"
            ) from error
        if body.get("errors"):
            raise OrchestratorError("Dagster: " + "; ".join(error["message"] for error in body["errors"]))
        return dict(body["data"])


def _selector(job: str) -> dict[str, str]:
    return {"repositoryLocationName": CODE_LOCATION, "repositoryName": REPOSITORY, "pipelineName": job}


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
