"""Bringing targets to the champion: idempotence, retries, rejections, drift, kills, and several processes at once."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from finetune_pipeline.alerts import list_alerts
from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import connect
from finetune_pipeline.database.tables import deployment_targets
from finetune_pipeline.deployment.target_state import take_lease
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.pipeline.deploy import deployment_states, due_targets, reconcile, release_of
from finetune_pipeline.pipeline.deploy_parity import ParityError
from finetune_pipeline.registry.champion import champion, rollback, switch
from finetune_pipeline.registry.deployment_history import list_deployments
from finetune_pipeline.settings import home
from finetune_pipeline_tests.deployment.shelf import MODEL_COMMAND, RECONCILE, Shelf, shelf
from finetune_pipeline_tests.pipeline.test_full_disk import small_disk
from finetune_pipeline_tests.registry.conftest import STARTER
from finetune_pipeline_tests.waiting import wait_until


@pytest.fixture
def with_shelves(make_loop, tmp_path, monkeypatch):
    """Return a function that makes a loop whose targets are shelves with these names."""
    monkeypatch.setattr(deploy, "open_target", Shelf)

    def make(*names, **fields):
        targets = [shelf(**{"name": name, "path": str(tmp_path / name), **fields}) for name in names or ["shelf"]]
        return make_loop(deploy={"targets": targets, "retry_seconds": 60})

    return make


@pytest.fixture
def one(with_shelves, tmp_path):
    """A loop with one shelf, in the folder `shelf`."""
    return with_shelves()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shelf"


def settings_of(loop):
    return loop.deploy.targets[0]


def calls(folder, step):
    path = folder / f"calls-{step}"
    return len(path.read_text()) if path.exists() else 0


def make_due(loop, **values):
    """Move the times of the loop's targets into the past."""
    before = datetime.now(UTC) - timedelta(days=1)
    values = values or {"next_try_at": before, "observed_at": before}
    with connect().write() as connection:
        connection.execute(sa.update(deployment_targets).values(**values))


def alerts():
    return [alert.title for alert in list_alerts(connect(), "notes")]


def brought(loop, **options):
    """Reconcile and return the state of the only target, with the log."""
    lines = []
    [state] = reconcile(loop, lines.append, **options)
    return state, "\n".join(lines)


def test_a_target_is_brought_to_the_champion_once(one, folder, promoted):
    model = promoted("one")
    state, log = brought(one)
    assert (state.state, state.wanted, state.observed, state.tries) == ("active", "v1.0.0", "v1.0.0", 0)
    assert (state.wanted_sha256, state.digest) == (model.sha256, model.gguf_sha256)
    assert (folder / "current").read_text() == "v1.0.0" and hash_file(folder / "v1.0.0.gguf") == model.sha256
    assert "shelf: serves an empty shelf; stage v1.0.0" in log and "shelf: v1.0.0 is active" in log
    again, log = brought(one, force=True)
    assert (again.state, log) == ("active", "")
    assert (calls(folder, "stage"), calls(folder, "activate"), calls(folder, "observe")) == (1, 1, 3)


def test_each_champion_is_followed_and_old_releases_are_removed(with_shelves, folder, promoted):
    loop = with_shelves(keep=2)
    for content in ("one", "two", "three"):
        promoted(content)
        state, log = brought(loop)
        assert (state.state, state.observed) == ("active", champion(connect(), "notes").version)
    assert "removed v1.0.0" in log
    assert sorted(path.stem for path in folder.glob("*.gguf")) == ["v1.1.0", "v1.2.0"]
    rollback(connect(), "notes", "me", "worse")
    state, _ = brought(loop)
    assert (state.observed, (folder / "current").read_text()) == ("v1.1.0", "v1.1.0")
    assert Shelf(settings_of(loop), "notes").uploads == 3  # it was still there


def test_a_target_that_is_down_is_tried_again_later_and_later(one, folder, promoted):
    promoted("one")
    Shelf(settings_of(one), "notes")
    (folder / "fail-observe").write_text("it does not answer")
    for tries, wait in [(1, 60), (2, 120), (3, 240)]:
        before = datetime.now(UTC)
        state, log = brought(one)
        assert (state.state, state.tries, state.last_error) == ("failed", tries, "it does not answer")
        assert before + timedelta(seconds=wait) <= state.next_try_at <= datetime.now(UTC) + timedelta(seconds=wait)
        assert f"failed (try {tries}, again in" in log
        assert due_targets(one, connect()) == []
        assert brought(one)[1] == ""  # not before its time
        make_due(one)
        assert due_targets(one, connect()) == ["shelf"]
    assert alerts() == ["notes: shelf could not be brought to notes@v1.0.0"]
    make_due(one, tries=40, next_try_at=None)
    assert brought(one)[0].next_try_at <= datetime.now(UTC) + timedelta(hours=1)
    (folder / "fail-observe").unlink()
    state, _ = brought(one, force=True)
    assert (state.state, state.tries, state.last_error, state.next_try_at) == ("active", 0, "", None)


def test_people_are_told_when_a_target_fails_and_again_after_it_worked(one, folder, promoted):
    promoted("one")
    Shelf(settings_of(one), "notes")
    for text in ("it answered 'Call Ann at noon'", "it is down"):
        (folder / "fail-observe").write_text(text)
        brought(one, force=True)
        brought(one, force=True)
        (folder / "fail-observe").unlink()
        brought(one, force=True)
    later, first = list_alerts(connect(), "notes")
    assert (first.kind, first.title) == ("deployment", "notes: shelf could not be brought to notes@v1.0.0")
    assert first.text.split("\n") == [
        "it answered '...'",
        "next: it is tried again by itself; `finetune deploy status --loop notes` shows where it stands",
    ]
    assert later.text.startswith("it is down\n")


@pytest.mark.parametrize("step", ["observe", "stage", "activate"])
def test_a_failing_target_changes_neither_registry_nor_other_targets(with_shelves, tmp_path, promoted, step):
    loop = with_shelves("first", "second")
    promoted("one")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / f"fail-{step}").write_text("reset")
    first, second = reconcile(loop, print)
    assert (first.state, second.state, second.observed) == ("failed", "active", "v1.0.0")
    assert champion(connect(), "notes").version == "v1.0.0"


def test_a_bug_of_a_target_is_reported_and_tried_again(one, folder, promoted, caplog):
    promoted("one")
    Shelf(settings_of(one), "notes")
    (folder / "crash-stage").touch()
    state, _ = brought(one)
    assert (state.state, state.last_error) == ("failed", "unexpected error, a bug: AssertionError: a bug of the target")
    assert "Traceback" in caplog.text


def test_a_target_that_says_it_switched_and_did_not_has_failed(one, folder, promoted):
    promoted("one")
    brought(one)
    promoted("two")
    (folder / "ignore-activate").touch()
    state, _ = brought(one)
    assert (state.state, state.observed) == ("failed", "v1.0.0")
    assert "was activated without an error, but the target serves v1.0.0" in state.last_error


def test_a_rejected_release_is_tried_again_only_after_a_change(one, with_shelves, folder, promoted):
    promoted("one")
    Shelf(settings_of(one), "notes")
    (folder / "refuse-stage").write_text("adapters are refused")
    for _ in range(3):
        state, _ = brought(one)
        assert (state.state, state.last_error, state.next_try_at) == ("rejected", "adapters are refused", None)
        assert due_targets(one, connect()) == []
        make_due(one, observed_at=datetime.now(UTC) - timedelta(days=1))
        assert due_targets(one, connect()) == ["shelf"]
    assert (calls(folder, "stage"), alerts()) == (1, ["notes: shelf was not switched to notes@v1.0.0"])
    brought(one, force=True)
    assert calls(folder, "stage") == 2
    brought(with_shelves(keep=3))  # other settings
    assert calls(folder, "stage") == 3
    (folder / "refuse-stage").unlink()
    promoted("two")
    assert brought(one)[0].state == "active"


def test_a_release_that_differs_from_the_judged_model_never_becomes_active(one, folder, promoted, monkeypatch):
    promoted("one")
    brought(one)

    def differs(*_):
        raise ParityError("other tokens", {"reads_control_tokens": True})

    with monkeypatch.context() as patch:
        patch.setattr(deploy, "check_parity", differs)
        promoted("two")
        state, _ = brought(one)
    assert (state.state, state.observed, state.last_error) == ("rejected", "v1.0.0", "other tokens")
    assert state.facts["reads_control_tokens"] is True
    assert (folder / "current").read_text() == "v1.0.0"


@pytest.fixture
def comparisons(monkeypatch):
    """The labels of the releases that are compared with the judged model."""
    found = []

    def compare(loop, release, target, endpoint, log):
        found.append(release.label)
        return {"reads_control_tokens": None, "answers_in": f"{release.label} {len(found)}"}

    monkeypatch.setattr(deploy, "check_parity", compare)
    return found


def test_a_release_is_compared_once_while_nothing_changes(one, folder, promoted, comparisons, monkeypatch):
    promoted("one")
    brought(one)
    promoted("two")
    (folder / "fail-activate").write_text("reset")
    assert brought(one)[0].state == "failed"
    (folder / "fail-activate").unlink()
    make_due(one)
    state, log = brought(one)
    assert state.state == "active" and "v1.1.0 was compared with the judged model before" in log
    rollback(connect(), "notes", "me", "worse")
    state, log = brought(one)
    assert (state.observed, comparisons) == ("v1.0.0", ["v1.0.0", "v1.1.0"])
    assert state.facts["answers_in"] == "v1.0.0 1"  # shown as when it was compared
    monkeypatch.setattr(deploy, "PARITY_VERSION", 0)  # another version of the comparison
    switch(connect(), "notes", "v1.1.0", "me", "better")
    brought(one)
    assert comparisons == ["v1.0.0", "v1.1.0", "v1.1.0"]


def test_a_release_is_compared_again_after_a_change(one, with_shelves, folder, promoted, comparisons):
    promoted("one")
    brought(one)
    (folder / "current").write_text("v9.9.9")  # somebody changed what it serves
    (folder / "v9.9.9.gguf").write_text("by hand")
    make_due(one)
    assert brought(one)[0].state == "active" and comparisons == ["v1.0.0"] * 2
    brought(with_shelves(keep=3))  # other settings
    assert comparisons == ["v1.0.0"] * 3


@pytest.mark.parametrize("found", ["v9.9.9", "v1.0.0"])
def test_drift_is_shown_and_brought_back(one, folder, promoted, found):
    promoted("one")
    brought(one)
    assert due_targets(one, connect()) == []
    (folder / "v9.9.9.gguf").write_text("by hand")
    (folder / "current").write_text(found)
    if found == "v1.0.0":  # the same name with another content
        (folder / "v1.0.0.gguf").write_text("by hand")
    make_due(one)
    assert due_targets(one, connect()) == ["shelf"]
    state, log = brought(one)
    assert alerts() == ["notes: somebody changed what shelf serves"]
    assert f"shelf: serves {found}" in log and "instead of v1.0.0, which was active; it is brought back" in log
    assert (state.state, state.observed, state.facts["drift"]["found"].split()[0]) == ("active", "v1.0.0", found)
    assert (folder / "v1.0.0.gguf").read_text() == "one"


def test_a_target_that_was_away_for_a_while_is_not_staged_again(one, folder, promoted):
    promoted("one")
    brought(one)
    (folder / "fail-observe").write_text("down")
    assert brought(one, force=True)[0].state == "failed"
    (folder / "fail-observe").unlink()
    assert brought(one, force=True)[0].state == "active"
    assert calls(folder, "stage") == 1


def test_old_releases_that_cannot_be_removed_are_a_warning(one, folder, promoted):
    promoted("one")
    Shelf(settings_of(one), "notes")
    (folder / "fail-remove_old").write_text("busy")
    state, _ = brought(one)
    assert (state.state, state.facts["warning"]) == ("active", "old releases could not be removed: busy")


def test_a_tampered_model_is_not_sent(one, folder, promoted):
    model = promoted("one")
    model.gguf_path.write_text("other")
    state, _ = brought(one)
    assert state.state == "failed" and "is damaged or was replaced" in state.last_error
    assert not list(folder.glob("*.gguf"))


def test_the_states_follow_the_champion_before_anything_was_done(with_shelves, promoted):
    loop = with_shelves("first", "second")
    assert [(one.wanted, one.state) for one in deployment_states(loop, connect())] == [("base", "pending")] * 2
    promoted("one")
    reconcile(loop, print, ["first"])
    first, second = deployment_states(loop, connect())
    assert (first.state, second.state, second.wanted) == ("active", "pending", "v1.0.0")
    assert due_targets(loop, connect()) == ["second"]
    promoted("two")
    first, second = deployment_states(loop, connect())
    assert (first.wanted, first.observed, first.state) == ("v1.1.0", "v1.0.0", "pending")
    assert due_targets(loop, connect()) == ["first", "second"]


def test_a_disk_that_fills_during_an_upload_leaves_the_old_release(with_shelves, promoted):
    with small_disk("disk") as leave:
        loop = with_shelves("shelf", path=str(home() / "disk"))
        promoted("one")
        brought(loop)
        promoted("two", size=2**20)
        leave(2**18)
        state, _ = brought(loop)
        assert (state.state, state.observed) == ("failed", "v1.0.0") and "No space left on device" in state.last_error
        assert sorted(path.stem for path in (home() / "disk").glob("*.gguf")) == ["v1.0.0"]
        leave(2**22)
        assert brought(loop, force=True)[0].observed == "v1.1.0"


def test_a_target_is_brought_to_the_champion_with_postgresql(one, promoted, monkeypatch, url):
    monkeypatch.setenv("FINETUNE_DATABASE_URL", url)
    promoted("one")
    state, _ = brought(one)
    assert (state.state, state.observed, brought(one, force=True)[1]) == ("active", "v1.0.0", "")


# ------------------------------------------------------------------------------------- kills, and several processes


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that reconciles in another process; its lease holds this many seconds."""
    started = []

    def start(seconds=600.0, script=RECONCILE, arguments=()):
        path = tmp_path / "defs" / "notes" / "defs.yaml"
        command = [sys.executable, "-c", script, str(path), str(seconds), *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def paused(folder, step, process):
    """Wait until a process has reached the middle of a step."""
    wait_until(lambda: (folder / f"paused-{step}").exists() or process.poll() is not None)
    assert process.poll() is None, process.stdout.read()


@pytest.mark.parametrize("step", ["stage", "activate", "activated", "remove_old"])
def test_another_process_finishes_after_a_kill(one, folder, promoted, start, step):
    promoted("one")
    brought(one)
    promoted("two")
    (folder / f"pause-{step}").touch()
    process = start(seconds=1)
    paused(folder, step, process)
    assert brought(one)[1] == "shelf: another process works on it now; left to it"
    served = "v1.0.0" if step in {"stage", "activate"} else "v1.1.0"
    assert (folder / "current").read_text() == served
    process.kill()
    process.wait()
    (folder / f"pause-{step}").unlink()

    def active():
        state, _ = brought(one, force=True)
        return state.state == "active" and state.locked_by is None and state.observed == "v1.1.0"

    wait_until(active)
    assert (folder / "current").read_text() == "v1.1.0" and (folder / "v1.1.0.gguf").read_text() == "two"
    assert champion(connect(), "notes").version == "v1.1.0"


@pytest.mark.parametrize("step", ["stage", "activate", "activated"])
@pytest.mark.parametrize("arguments", [["rollback"], ["switch", "v1.0.0"]], ids=["rollback", "switch"])
def test_a_change_that_is_killed_while_it_deploys_is_done_all_the_same(one, folder, promoted, start, arguments, step):
    promoted("one")
    promoted("two")
    brought(one)
    (folder / f"pause-{step}").touch()
    process = start(seconds=1, script=MODEL_COMMAND, arguments=arguments)
    paused(folder, step, process)
    process.kill()
    process.wait()
    assert [deployment.action for deployment in list_deployments(connect(), "notes")] == [
        "promote",
        "promote",
        arguments[0],
    ]
    assert champion(connect(), "notes").version == "v1.0.0"
    assert (folder / "current").read_text() == ("v1.0.0" if step == "activated" else "v1.1.0")
    (folder / f"pause-{step}").unlink()

    def is_active():
        state, _ = brought(one, force=True)
        return state.state == "active" and state.observed == "v1.0.0"

    wait_until(is_active)
    assert (folder / "current").read_text() == "v1.0.0" and (folder / "v1.0.0.gguf").read_text() == "one"


def test_a_promotion_during_a_deployment_is_deployed_by_the_same_process(one, folder, promoted, start):
    promoted("one")
    Shelf(settings_of(one), "notes")
    (folder / "pause-stage").touch()
    process = start()
    paused(folder, "stage", process)
    promoted("two")
    assert brought(one)[1] == "shelf: another process works on it now; left to it"
    (folder / "pause-stage").unlink()
    output = process.communicate(timeout=300)[0]
    assert "shelf: the champion changed meanwhile" in output and "active v1.1.0" in output
    assert calls(folder, "activate") == 1  # the older one never became active


def test_two_processes_bring_a_target_once(one, folder, promoted, start):
    promoted("one")
    outputs = [process.communicate(timeout=300)[0] for process in [start(), start()]]
    assert brought(one)[0].state == "active"
    assert (calls(folder, "stage"), calls(folder, "activate")) == (1, 1), outputs


@pytest.mark.parametrize("step", ["stage", "observe"])
def test_the_start_command_is_known_although_the_server_was_not_started(one, folder, promoted, monkeypatch, step):
    promoted("one")
    Shelf(settings_of(one), "notes")
    (folder / f"fail-{step}").write_text("start the server again")
    monkeypatch.setattr(Shelf, "start_command", lambda self, release: f"serve {release.label}")
    assert brought(one)[0].facts["start_command"] == "serve v1.0.0"


def test_a_process_that_lost_its_lease_activates_nothing(one, folder, promoted, monkeypatch):
    promoted("one")
    stage = Shelf.stage

    def suspended(self, release):
        """Stage while another process takes the lease, as after a suspended process has woken up."""
        stage(self, release)
        make_due(one, locked_until=datetime.now(UTC) - timedelta(days=1))
        with take_lease(connect(), "notes", "shelf") as successor:
            assert successor is not None

    compared = []
    monkeypatch.setattr(Shelf, "stage", suspended)
    monkeypatch.setattr(deploy, "check_parity", lambda *arguments: compared.append(arguments) or {})
    state, log = brought(one)
    assert "another process works on the target shelf now; left to it" in log
    assert (state.state, calls(folder, "activate"), compared) == ("pending", 0, [])


# ----------------------------------------------------------------------------------------------------- the release


def test_a_release_names_files_base_and_settings(make_loop, promoted):
    loop = make_loop(system_prompt="Note it.", deploy={"config": {"temperature": 0}}, serving={"max_tokens": 7})
    model = promoted("one")
    release = release_of(loop, model)
    assert (release.name, release.label, release.sha256) == ("notes@v1.0.0", "v1.0.0", model.sha256)
    assert (release.gguf, release.adapter_gguf, release.adapter_folder) == (model.gguf_path, None, None)
    assert (release.base_folder, release.base_name) == (STARTER, "starter_model")
    assert (release.context, release.max_tokens, release.system_prompt) == (192, 7, "Note it.")
    assert release.config == {"temperature": 0} and "# notes@v1.0.0" in release.model_card


def test_a_model_of_another_base_is_not_released(make_loop, promoted):
    model = promoted("one").model_copy(update={"base_hash": "0" * 64})
    with pytest.raises(deploy.ArtifactError, match="which is not there any more or was changed"):
        release_of(make_loop(), model)
