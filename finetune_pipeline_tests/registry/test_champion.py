"""Promotion, force, switch and rollback change the champion in one transaction and are recorded."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from finetune_pipeline import artifacts
from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import Database, connect
from finetune_pipeline.database.tables import model_versions
from finetune_pipeline.registry import model_versions as models_module
from finetune_pipeline.registry.champion import ChampionChangedError, champion, promote, resolve, rollback, switch
from finetune_pipeline.registry.comparisons import find_comparison
from finetune_pipeline.registry.deployment_history import list_deployments
from finetune_pipeline.registry.model_versions import (
    CandidateModel,
    ModelVersion,
    RegistryError,
    UnknownVersionError,
    list_models,
)
from finetune_pipeline_tests.registry.conftest import MakeCandidate, compared, promote_over


def serve(db: Database, candidate: CandidateModel) -> ModelVersion:
    """Promote a candidate over the current champion."""
    return promote_over(db, candidate)


def version(db: Database, loop: str = "aec") -> str | None:
    now = champion(db, loop)
    return now.version if now else None


def test_versions_follow_base_and_mode(db: Database, candidate: MakeCandidate) -> None:
    steps = [
        (candidate("a"), "v1.0.0"),
        (candidate("b"), "v1.0.1"),
        (candidate("c", mode="full"), "v1.1.0"),
        (candidate("d"), "v1.1.1"),
        (candidate("e", base="base-2"), "v2.0.0"),
        (candidate("b"), "v1.0.1"),
        (candidate("f", base="base-2"), "v2.0.1"),
        (candidate("g", base="base-1", mode="full"), "v3.0.0"),
    ]
    assert [serve(db, one).version for one, _ in steps] == [expected for _, expected in steps]
    assert [model.version for model in list_models(db, "aec")] == [
        "v3.0.0",
        "v2.0.1",
        "v2.0.0",
        "v1.1.1",
        "v1.1.0",
        "v1.0.1",
        "v1.0.0",
    ]
    assert serve(db, candidate("a", loop="notes")).name == "notes@v1.0.0"


def test_a_promotion_stores_all_fields(db: Database, candidate: MakeCandidate) -> None:
    assert champion(db, "aec") is None
    one = candidate("a")
    promoted = serve(db, one)
    assert champion(db, "aec") == promoted
    assert promoted.model_dump(include=set(type(one).model_fields)) == one.model_dump()
    [row] = list_deployments(db, "aec")
    assert (row.action, row.model_id, row.previous_id, row.actor, row.reason, row.comparison_id) == (
        "promote",
        one.id,
        None,
        "loop",
        "gain 6%",
        row.comparison_id,
    )
    assert find_comparison(db, "aec", row.comparison_id or "") is not None


def test_an_unexpected_champion_is_an_error_and_nothing_changes(db: Database, candidate: MakeCandidate) -> None:
    first = serve(db, candidate("a"))
    serve(db, candidate("b"))
    late = candidate("c")
    for expected, words in [(first.id, "expected aec@v1.0.0, found aec@v1.0.1;"), (None, "expected aec's base model")]:
        with pytest.raises(ChampionChangedError, match=words) as error:
            promote(db, late, expected, "loop", "gain 9%", "c2")
        assert "Evaluate again" in str(error.value)
    assert version(db) == "v1.0.1"
    assert len(list_models(db, "aec")) == len(list_deployments(db, "aec")) == 2


def test_a_retried_promotion_changes_nothing(db: Database, candidate: MakeCandidate) -> None:
    one = candidate("a")
    compared(db, one, "c1")
    first = promote(db, one, None, "loop", "gain 6%", "c1")
    assert promote(db, one, None, "loop", "gain 6%", "c1").version == first.version
    assert len(list_deployments(db, "aec")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("loop", "gain", None, "promote"), "needs the comparison"),
        (("loop", "gain", "", "promote"), "needs the comparison"),
        (("", "gain", "c1", "promote"), "promote needs actor"),
        (("ann", " ", None, "force"), "force needs reason"),
        ((" ", "", None, "force"), "force needs actor and reason"),
    ],
    ids=["no comparison", "empty comparison", "no actor", "no reason", "neither"],
)
def test_a_promotion_needs_comparison_actor_and_reason(
    db: Database, candidate: MakeCandidate, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(RegistryError, match=words):
        promote(db, candidate("a"), None, *arguments)
    assert champion(db, "aec") is None


def test_force_needs_no_comparison_and_is_recorded(db: Database, candidate: MakeCandidate) -> None:
    promote(db, candidate("a"), None, "ann", "the customer waits", None, "force")
    [row] = list_deployments(db, "aec")
    assert (row.action, row.actor, row.reason, row.comparison_id) == ("force", "ann", "the customer waits", None)


def test_rollback_ends_at_the_base_model(db: Database, candidate: MakeCandidate) -> None:
    for name in "abc":
        serve(db, candidate(name))
    seen = [rollback(db, "aec", "ann", "worse in practice") for _ in range(3)]
    assert [model.version if model else None for model in seen] == ["v1.0.1", "v1.0.0", None]
    assert champion(db, "aec") is None
    with pytest.raises(RegistryError, match=r"^loop aec serves .* nothing to roll back to"):  # no name is capitalized
        rollback(db, "aec", "ann", "again")
    assert [row.action for row in list_deployments(db, "aec")] == ["promote"] * 3 + ["rollback"] * 3
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        rollback(db, "never_heard_of", "ann", "why not")


def test_rollback_undoes_switches_and_promotions_after_rollbacks(db: Database, candidate: MakeCandidate) -> None:
    for name in "ab":
        serve(db, candidate(name))
    rollback(db, "aec", "ann", "r")
    serve(db, candidate("c"))
    assert version(db) == "v1.0.2"
    switch(db, "aec", "v1.0.1", "ann", "s")
    found = []
    for _ in range(3):
        model = rollback(db, "aec", "ann", "r")
        found.append(model.version if model else None)
    assert found == ["v1.0.2", "v1.0.0", None]


def deployment(db: Database) -> dict[str, str]:
    """Return for each version whether it serves, served before, or never served."""
    states = {}
    for model in list_models(db, "aec"):
        assert model.retired_at is None or (model.deployed_at is not None and model.retired_at >= model.deployed_at)
        serves = model.deployed_at is not None and model.retired_at is None
        states[model.version] = "serves" if serves else "served" if model.deployed_at else "never"
    return states


def test_every_deployment_updates_the_times_of_both_models(db: Database, candidate: MakeCandidate) -> None:
    first = serve(db, candidate("a"))
    assert first.deployed_at == list_deployments(db, "aec")[-1].created_at
    assert deployment(db) == {"v1.0.0": "serves"}
    promote(db, candidate("b"), first.id, "ann", "the customer waits", None, "force")
    assert deployment(db) == {"v1.0.0": "served", "v1.0.1": "serves"}
    switched = switch(db, "aec", "v1.0.0", "ann", "to try")
    assert switched == champion(db, "aec") and switched is not None
    assert switched.deployed_at == list_deployments(db, "aec")[-1].created_at > first.deployed_at
    assert deployment(db) == {"v1.0.0": "serves", "v1.0.1": "served"}
    back = rollback(db, "aec", "ann", "worse")
    assert back == champion(db, "aec")
    assert deployment(db) == {"v1.0.0": "served", "v1.0.1": "serves"}
    switch(db, "aec", "base", "ann", "all are bad")
    assert deployment(db) == {"v1.0.0": "served", "v1.0.1": "served"}


Deploy = Callable[[Database], object]
TO_THE_FIRST: list[Any] = [
    pytest.param(lambda db: switch(db, "aec", "v1.0.0", "ann", "s"), id="switch"),
    pytest.param(lambda db: rollback(db, "aec", "ann", "r"), id="rollback"),
]


@pytest.mark.parametrize("deploy", TO_THE_FIRST)
def test_a_rejected_deployment_updates_nothing(db: Database, candidate: MakeCandidate, deploy: Deploy) -> None:
    first = serve(db, candidate("a"))
    serve(db, candidate("b"))
    before = list_models(db, "aec")
    first.gguf_path.unlink()
    with pytest.raises(RegistryError):
        deploy(db)
    with pytest.raises(ChampionChangedError):
        promote(db, candidate("c"), first.id, "loop", "gain", "c1")
    assert list_models(db, "aec") == before


def test_switch_accepts_any_version_and_the_base(db: Database, candidate: MakeCandidate) -> None:
    for name in "ab":
        serve(db, candidate(name))
    for name, expected in [("v1.0.0", "v1.0.0"), ("aec@v1.0.1", "v1.0.1"), ("1.0.0", "v1.0.0"), ("base", None)]:
        switch(db, "aec", name, "ann", "to try")
        assert version(db) == expected
    before = len(list_deployments(db, "aec"))
    switch(db, "aec", "base", "ann", "already there")
    assert len(list_deployments(db, "aec")) == before
    assert rollback(db, "aec", "ann", "back") is not None
    assert version(db) == "v1.0.0"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("champion", "second"),
        ("aec@champion", "second"),
        ("previous", "first"),
        ("v1.0.0", "first"),
        ("aec@v1.0.1", "second"),
        ("base", None),
    ],
)
def test_names_are_resolved(db: Database, candidate: MakeCandidate, name: str, expected: str | None) -> None:
    names = {"first": serve(db, candidate("a")).name, "second": serve(db, candidate("b")).name, None: None}
    found = resolve(db, name, "aec")
    assert (found.name if found else None) == names[expected]
    assert resolve(db, "other@champion", "aec") is None


def test_an_unknown_version_lists_the_known_ones(db: Database, candidate: MakeCandidate) -> None:
    for name in "ab":
        serve(db, candidate(name))
    with pytest.raises(
        UnknownVersionError, match=r"no version 'v9\.0\.0'; there are: v1\.0\.1, v1\.0\.0, and the names"
    ):
        switch(db, "aec", "v9.0.0", "ann", "to try")
    with pytest.raises(UnknownVersionError, match="there are: none"):
        resolve(db, "v1.0.0", "notes")
    with pytest.raises(RegistryError, match="another loop"):
        switch(db, "notes", "aec@v1.0.0", "ann", "to try")


def test_a_missing_or_changed_file_is_rejected(db: Database, candidate: MakeCandidate) -> None:
    first = serve(db, candidate("a"))
    serve(db, candidate("b"))
    first.gguf_path.write_text("A")
    with pytest.raises(RegistryError, match=r"aec@v1\.0\.0 cannot serve: .* is damaged or was replaced"):
        switch(db, "aec", "v1.0.0", "ann", "to try")
    first.gguf_path.unlink()
    with pytest.raises(RegistryError, match=r"does not exist; materialize gguf_model again"):
        switch(db, "aec", "v1.0.0", "ann", "to try")
    with pytest.raises(RegistryError, match=r"does not exist; materialize gguf_model again"):
        rollback(db, "aec", "ann", "worse")
    assert version(db) == "v1.0.1"
    swapped = candidate("c")
    swapped.gguf_path.write_text("something else")
    with pytest.raises(RegistryError, match=r"the candidate .* is damaged or was replaced"):
        serve(db, swapped)


def test_switch_and_rollback_do_not_hash_files_again(
    db: Database, candidate: MakeCandidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = candidate("a")
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(artifacts, "hash_file", counted)
    serve(db, first)
    serve(db, candidate("b"))
    assert len(read) == 2
    switch(db, "aec", "v1.0.0", "ann", "to try")
    rollback(db, "aec", "ann", "worse")
    assert len(read) == 2
    serve(db, first)
    assert len(read) == 3


def test_the_home_can_move(
    db: Database, candidate: MakeCandidate, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(db, candidate("a"))
    moved = own_home.with_name("elsewhere")
    own_home.rename(moved)
    monkeypatch.setenv("FINETUNE_HOME", str(moved))
    model = champion(db, "aec")
    assert model is not None
    assert model.gguf_path == moved / "artifacts" / "aec" / "a" / "model.gguf"
    assert model.gguf_path.is_file()


@pytest.mark.parametrize("first", [True, False])
def test_exactly_one_of_concurrent_threads_promotes(db: Database, candidate: MakeCandidate, first: bool) -> None:
    expected = None if first else serve(db, candidate("start")).id
    contenders = [candidate(f"m{number}") for number in range(6)]
    ids = {one.id: compared(db, one, f"c-{one.id}") for one in contenders}
    start = threading.Barrier(len(contenders))
    outcomes: list[ModelVersion | ChampionChangedError] = []

    def run(one: CandidateModel) -> None:
        start.wait()
        try:
            outcomes.append(promote(db, one, expected, "loop", "gain", ids[one.id]))
        except ChampionChangedError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, ModelVersion)]
    assert len(outcomes) == 6
    assert winners == [champion(db, "aec")]
    assert len(list_models(db, "aec")) == len(list_deployments(db, "aec")) == (1 if first else 2)


def test_concurrent_rollbacks_go_one_step_each(db: Database, candidate: MakeCandidate) -> None:
    for name in "abcd":
        serve(db, candidate(name))
    start, refused = threading.Barrier(3), []

    def run() -> None:
        start.wait()
        try:
            rollback(db, "aec", "ann", "worse")
        except ChampionChangedError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = [row for row in list_deployments(db, "aec") if row.action == "rollback"]
    assert len(steps) == 3 - len(refused) >= 1
    assert version(db) == f"v1.0.{3 - len(steps)}"


SCRIPT = """
import os, pathlib, sys
from finetune_pipeline.database import connect
from finetune_pipeline.registry import champion
from finetune_pipeline.registry.model_versions import CandidateModel

url, candidate, expected, wait, comparison = sys.argv[1:]
if wait == "kill":
    champion.record_deployment_in = lambda *a, **k: os.kill(os.getpid(), 9)
db = connect(url)
print("ready", flush=True)
sys.stdin.readline()
try:
    model = champion.promote(
        db, CandidateModel.model_validate_json(candidate), expected or None, "loop", "gain", comparison
    )
    print(model.version)
except champion.ChampionChangedError:
    print("changed")
"""


def process(url: str, one: CandidateModel, expected: str, wait: str = "") -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        url,
        one.model_dump_json(),
        expected,
        wait,
        compared(connect(url), one, f"p-{one.id}"),
    ]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_exactly_one_of_concurrent_processes_promotes(db: Database, url: str, candidate: MakeCandidate) -> None:
    expected = serve(db, candidate("start")).id
    processes = [process(url, candidate(name), expected) for name in ("x", "y")]
    for one in processes:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    outcomes = [one.communicate("\n", timeout=60)[0].strip() for one in _started_together(processes)]
    assert sorted(outcomes) == ["changed", "v1.0.1"]
    assert version(db) == "v1.0.1"


def _started_together(processes: "list[subprocess.Popen[str]]") -> "list[subprocess.Popen[str]]":
    for one in processes:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    return processes


def test_a_kill_during_a_promotion_leaves_the_old_champion(db: Database, url: str, candidate: MakeCandidate) -> None:
    old = serve(db, candidate("old"))
    killed = process(url, candidate("new"), old.id, "kill")
    killed.communicate("\n", timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert champion(db, "aec") == old
    assert [model.id for model in list_models(db, "aec")] == [old.id]
    assert len(list_deployments(db, "aec")) == 1
    assert serve(db, candidate("new")).version == "v1.0.1"


KILLED_CHANGE = """
import os, sys
from finetune_pipeline.database import connect
from finetune_pipeline.registry import champion

champion.record_deployment_in = lambda *a, **k: os.kill(os.getpid(), 9)
if sys.argv[2] == "switch":
    champion.switch(connect(sys.argv[1]), "aec", "v1.0.0", "ann", "to try")
else:
    champion.rollback(connect(sys.argv[1]), "aec", "ann", "worse")
"""


@pytest.mark.parametrize("action", ["switch", "rollback"])
def test_a_kill_during_a_switch_or_rollback_leaves_the_champion(
    db: Database, url: str, candidate: MakeCandidate, action: str
) -> None:
    first, second = (serve(db, candidate(name)) for name in ("a", "b"))
    killed = subprocess.run([sys.executable, "-c", KILLED_CHANGE, url, action], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert champion(db, "aec") == second and len(list_deployments(db, "aec")) == 2
    assert rollback(db, "aec", "ann", "worse") is not None and version(db) == first.version


def by_hand(db: Database, one: CandidateModel, number: int, **columns: object) -> None:
    """Insert a version that was never promoted."""
    row = {**models_module._to_row(one), "major": number, "minor": 0, "patch": 0, "created_at": datetime.now(UTC)}
    with db.write() as connection:
        connection.execute(sa.insert(model_versions).values({**row, **columns}))


@pytest.mark.parametrize("version_of_it", ["v7.0.0", "aec@v7.0.0", "v8.0.0"])
def test_switch_rejects_a_version_that_was_never_promoted(
    db: Database, candidate: MakeCandidate, version_of_it: str
) -> None:
    first = serve(db, candidate("a"))
    by_hand(db, candidate("x"), 7)
    by_hand(db, candidate("y"), 8, id=f"{0:016x}")  # under an id that is not its file's
    with pytest.raises(RegistryError, match=r"has no promotion of this model|has the id"):
        switch(db, "aec", version_of_it, "ann", "to try")
    assert champion(db, "aec") == first and len(list_deployments(db, "aec")) == 1


@pytest.mark.parametrize("deploy", TO_THE_FIRST)
def test_switch_rejects_a_version_whose_file_was_replaced_in_its_row(
    db: Database, candidate: MakeCandidate, deploy: Deploy
) -> None:
    first, other = serve(db, candidate("a")), candidate("x")
    serve(db, candidate("b"))
    changed = {"gguf_path": str(other.gguf_path), "gguf_sha256": other.gguf_sha256}
    with db.write() as connection:
        connection.execute(sa.update(model_versions).where(model_versions.c.id == first.id).values(changed))
    with pytest.raises(RegistryError):
        deploy(db)
    assert version(db) == "v1.0.1"


def test_switch_accepts_forced_versions_and_the_base(db: Database, candidate: MakeCandidate) -> None:
    promote(db, candidate("a"), None, "ann", "the customer waits", None, "force")
    serve(db, candidate("b"))
    for name in ("v1.0.0", "base", "v1.0.1"):
        switch(db, "aec", name, "ann", "to try")
    assert rollback(db, "aec", "ann", "r") is None
    assert version(db) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decision": "reject"}, "rejects its challenger"),
        ({"decision": "inconclusive"}, "is inconclusive"),
        ({"challenger_sha256": "e" * 64}, "is about another model"),
        ({"loop": "notes"}, "is not in the database"),
        ({"after_deployment": None}, "the champion changed"),
        ({"after_deployment": 99}, "the champion changed"),
    ],
)
def test_a_comparison_that_does_not_justify_it_promotes_nothing(
    db: Database, candidate: MakeCandidate, changes: dict[str, object], words: str
) -> None:
    one = candidate("a")
    compared(db, one, "c1", **changes)
    with pytest.raises(RegistryError, match=words):
        promote(db, one, None, "loop", "gain 6%", "c1")
    assert champion(db, "aec") is None and list_models(db, "aec") == []


@pytest.mark.parametrize("change", ["rollback", "switch away and back", "another promotion undone"])
def test_a_comparison_before_the_last_deployment_promotes_nothing(
    db: Database, candidate: MakeCandidate, change: str
) -> None:
    first, late = serve(db, candidate("a")), candidate("b")
    for id in ("used", "unused"):
        compared(db, late, id)
    promote(db, late, first.id, "loop", "gain 6%", "used")
    rollback(db, "aec", "ann", "worse in practice")
    if change == "switch away and back":
        switch(db, "aec", "base", "ann", "s")
        switch(db, "aec", "v1.0.0", "ann", "s")
    elif change == "another promotion undone":
        serve(db, candidate("c"))
        rollback(db, "aec", "ann", "r")
    assert version(db) == "v1.0.0"
    for id in ("used", "unused"):
        with pytest.raises(ChampionChangedError, match=f"since comparison {id} was made"):
            promote(db, late, first.id, "loop", "gain 6%", id)
    assert version(db) == "v1.0.0"
    compared(db, late, "again")
    assert promote(db, late, first.id, "loop", "gain 6%", "again").version == "v1.0.1"


def test_the_history_records_the_config_of_each_deployment(db, candidate):
    promote_over(db, candidate("one"))
    switch(db, "aec", "base", "ann", "try", {"temperature": 0.2})
    rollback(db, "aec", "ann", "back", {})
    assert [row.config for row in list_deployments(db, "aec")] == [None, {"temperature": 0.2}, None]
