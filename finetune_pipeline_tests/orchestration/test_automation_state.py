"""What `finetune status` says about sensors, schedules and the daemon, read from a real Dagster home."""

import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._daemon.types import DaemonHeartbeat

from finetune_pipeline.artifacts import ArtifactError
from finetune_pipeline.cli.dagster_home import environment
from finetune_pipeline.database import connect
from finetune_pipeline.orchestration.automation import automation_state


@pytest.fixture
def dagster_home(own_home):
    return environment()["DAGSTER_HOME"]


def switch(dagster_home, name, location, status):
    origin = ManagedGrpcPythonEnvCodeLocationOrigin(LoadableTargetOrigin(module_name="any"), location)
    repository = RemoteRepositoryOrigin(origin, "__repository__")
    state = InstigatorState(RemoteInstigatorOrigin(repository, name), InstigatorType.SENSOR, status)
    with dg.DagsterInstance.from_config(dagster_home) as instance:
        instance.add_instigator_state(state)


def on(loop, dagster_home):
    state = automation_state(loop, connect(), dagster_home)
    return [name for name, switched_on in state.switched_on.items() if switched_on]


def test_without_a_switch_the_settings_decide(make_loop, dagster_home):
    assert on(make_loop(), dagster_home) == []
    running = make_loop(trigger={"running": True})
    assert on(running, dagster_home) == ["notes_new_examples", "notes_nightly", "notes_yearly"]


@pytest.mark.parametrize(
    ("location", "name", "expected"),
    [
        ("finetune_pipeline", "notes_new_examples", ["notes_new_examples"]),
        ("other", "notes_new_examples", ["notes_new_examples (code location other)"]),
        ("finetune_pipeline", "mails_new_examples", []),
    ],
)
def test_a_switch_counts_in_its_code_location(make_loop, dagster_home, location, name, expected):
    switch(dagster_home, name, location, InstigatorStatus.RUNNING)
    assert on(make_loop(), dagster_home) == expected


def test_what_is_switched_off_is_off_whatever_the_settings_say(make_loop, dagster_home):
    switch(dagster_home, "notes_new_examples", "finetune_pipeline", InstigatorStatus.STOPPED)
    assert on(make_loop(trigger={"running": True}), dagster_home) == ["notes_nightly", "notes_yearly"]


@pytest.mark.parametrize(("seconds", "alive"), [(30, True), (600, False)])
def test_a_daemon_that_ended_does_not_run(make_loop, dagster_home, seconds, alive):
    with dg.DagsterInstance.from_config(dagster_home) as instance:
        for kind in ("SENSOR", "SCHEDULER"):
            instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds, kind, "id"))
    assert automation_state(make_loop(), connect(), dagster_home).daemon is alive


def test_no_daemon_ever_ran(make_loop, dagster_home):
    state = automation_state(make_loop(), connect(), dagster_home)
    assert (state.daemon, state.waits_for) == (False, "0 new high-reward examples, 10 needed")


def test_a_damaged_storage_of_dagster_is_a_sentence(make_loop, dagster_home):
    (Path(dagster_home) / "schedules" / "schedules.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ArtifactError, match=r"Dagster's storage in .* cannot be read or written \(file is not a dat"):
        automation_state(make_loop(), connect(), dagster_home)
