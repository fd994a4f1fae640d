"""A challenger that the gate accepted waits for a person, and everything that makes the approval void.

Every test starts from a copy of one home, with a challenger that passed its checks and whose report promotes it.
"""

import os
import pickle
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import dagster as dg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from finetune_pipeline import artifacts
from finetune_pipeline.artifacts import get_latest, stage_folder
from finetune_pipeline.cli import options
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.database.tables import approvals
from finetune_pipeline.evaluation.report import JSON
from finetune_pipeline.feedback.store import find_interaction
from finetune_pipeline.manifests import (
    AdapterManifest,
    DatasetManifest,
    GgufManifest,
    PromotionManifest,
    ReportManifest,
)
from finetune_pipeline.orchestration.alerts import alert_of_run
from finetune_pipeline.orchestration.automation import FIRST_ATTEMPT_TAG, next_run
from finetune_pipeline.orchestration.checks import APPROVED
from finetune_pipeline.orchestration.history import history_sensor
from finetune_pipeline.orchestration.resources import resources
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.pipeline.approval import ask_for_approval, pending_approval, reject_challenger
from finetune_pipeline.pipeline.ask import generate_answers
from finetune_pipeline.pipeline.challengers import find_challenger, find_trained, list_challengers
from finetune_pipeline.pipeline.export import model_spec
from finetune_pipeline.pipeline.promote import approve_challenger, force_challenger, promote_accepted
from finetune_pipeline.pipeline.required_checks import RequiredChecksError
from finetune_pipeline.pipeline.status import loop_status
from finetune_pipeline.pipeline.summary import run_summary
from finetune_pipeline.registry.approvals import ApprovalError, find_approval, newest_approval
from finetune_pipeline.registry.champion import champion, promote, rollback
from finetune_pipeline.registry.check_outcomes import record_outcomes
from finetune_pipeline.registry.deployment_history import list_deployments, list_history
from finetune_pipeline.registry.garbage_collection import plan_deletion
from finetune_pipeline.registry.model_versions import RegistryError, UnknownVersionError
from finetune_pipeline.settings import InvalidSettings
from finetune_pipeline_tests.deployment.shelf import Shelf, shelf
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions, write_events
from finetune_pipeline_tests.orchestration.test_adapter_form import flip_last_byte, run
from finetune_pipeline_tests.orchestration.test_gate_bypass import (  # noqa: F401
    IMPOSSIBLE,
    benchmark,
    better,
    copied,
    forge,
    loop,
    run_softly,
    served,
    settled,
    template,
)
from finetune_pipeline_tests.waiting import wait_until

pytestmark = pytest.mark.slow

APPROVAL = {"approval": "required"}


@pytest.fixture
def waiting(loop, settled, instance):  # noqa: F811
    """Return the loop with `approval: required`, whose challenger waits."""
    strict = settled(**APPROVAL)
    assert run(strict, instance, "promoted_model").success
    return strict


def only_challenger():
    [challenger] = list_challengers(connect(), "notes")
    return challenger


def approve(loop, reason="looks good", actor="ann"):  # noqa: F811
    return approve_challenger(loop, only_challenger(), actor, reason, print)


def state():
    return newest_approval(connect(), "notes").state


def check_of(result, name=APPROVED):
    [check] = [one for one in result.get_asset_check_evaluations() if one.check_name == name]
    return check


def test_a_challenger_waits_without_a_worker_and_is_promoted_by_its_approval(loop, settled, instance):  # noqa: F811
    strict = settled(**APPROVAL)
    result = run(strict, instance, "promoted_model")
    assert result.success and result.dagster_run.status == dg.DagsterRunStatus.SUCCESS
    assert not result.get_asset_materialization_events() and served() is None
    check = check_of(result)
    assert not check.passed and check.severity == dg.AssetCheckSeverity.WARN
    assert check.description.startswith(f"waiting for approval: {only_challenger().name} waits for approval since ")
    command = f'finetune model approve {only_challenger().name} --reason "..."'
    assert check.metadata["approve with"].value.startswith(command)

    promoted = approve(strict, "asked it ten questions")
    assert served() == promoted.model and promoted.model.version == "v1.0.0"
    [row] = list_history(connect(), "notes")
    assert (row.action, row.actor) == ("approve", "ann") and row.reason.startswith("asked it ten questions; ")
    assert row.comparison_id == get_latest(ReportManifest, "notes").manifest.comparison_id
    assert pending_approval(strict, connect()) is None and list_challengers(connect(), "notes") == []
    again = run(strict, instance, "promoted_model")
    assert check_of(again).passed and check_of(again).description.endswith("approved by ann: asked it ten questions")
    assert len(list_history(connect(), "notes")) == 1


def test_a_run_that_waits_says_so_everywhere(loop, settled, instance):  # noqa: F811
    strict = settled(**APPROVAL, approval_days=7)
    result = run(strict, instance, "eval_report", "promoted_model")
    name = only_challenger().name
    pending = loop_status(strict, connect()).approval
    assert pending.summary.startswith(f"{name} waits for approval since ") and ", until " in pending.summary
    lines = list(run_summary(strict, result.run_id, succeeded=True))
    assert any(line.startswith(f"approval  {name} waits for approval") for line in lines)
    alert = alert_of_run(strict, instance, instance.get_run_by_id(result.run_id))
    assert (alert.kind, alert.title) == ("approval", f"{name} waits for approval")
    approve(strict)
    assert loop_status(strict, connect()).approval is None


def test_a_waiting_challenger_does_not_start_the_sensor_again(waiting, instance):
    answer = next_run(waiting, connect(), instance, datetime.now(UTC))
    assert FIRST_ATTEMPT_TAG not in getattr(answer, "tags", {})  # it may read the files of the copied home again
    write_events(waiting.drop_folder / "more.jsonl", *corrected(f"other{n}" for n in range(3)))
    run(waiting, instance, "raw_logs")
    answer = next_run(waiting, connect(), instance, datetime.now(UTC))
    assert FIRST_ATTEMPT_TAG not in getattr(answer, "tags", {})


KILLED = """
import os, pickle, signal, sys
from finetune_pipeline.database import connect
from finetune_pipeline.pipeline import promote
from finetune_pipeline.pipeline.challengers import list_challengers
loop = pickle.load(sys.stdin.buffer)
where = sys.argv[1]
original = getattr(promote, where)
def killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "_record":
    setattr(promote, where, killed)
elif where == "decide":
    def after(*arguments):
        original(*arguments)
        killed()
    promote.decide = after
else:
    setattr(promote, where, killed)
[challenger] = list_challengers(connect(), "notes")
promote.approve_challenger(loop, challenger, "ann", "looks good", print)
"""


@pytest.mark.parametrize(
    ("where", "left"),
    [("ask_for_approval", "waiting"), ("decide", "approved"), ("promote", "approved"), ("_record", "approved")],
)
@pytest.mark.parametrize("then", ["the asset", "the command"])
def test_a_kill_in_the_middle_of_an_approval_is_finished_by_whoever_comes_next(waiting, instance, where, left, then):
    process = subprocess.run([sys.executable, "-c", KILLED, where], input=pickle.dumps(waiting))
    assert process.returncode == -signal.SIGKILL
    assert state() == left
    assert (served() is not None) == (where == "_record")
    pending = pending_approval(waiting, connect())
    if where in {"decide", "promote"}:
        assert pending.state == "approved by ann"
    if left == "waiting":
        approve(waiting)
    elif then == "the asset" or where == "_record":
        assert check_of(run(waiting, instance, "promoted_model")).passed
    else:
        approve(waiting, "and so do I", "bob")
    [row] = list_history(connect(), "notes")
    assert (row.action, row.actor) == ("approve", "ann")
    assert get_latest(PromotionManifest, "notes") is None or served().version == "v1.0.0"
    assert pending_approval(waiting, connect()) is None


DEPLOYING = """
import pickle, sys
from finetune_pipeline.cli import model, options
from finetune_pipeline.deployment import target_state
from finetune_pipeline.pipeline import deploy
from finetune_pipeline_tests.deployment.shelf import Shelf
deploy.open_target = Shelf
target_state.LEASE_SECONDS = 1.0
loop = pickle.load(sys.stdin.buffer)
options.the_loop = options.load_loop = lambda name: loop
model.model(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("action", "arguments"), [("approve", ["approve"]), ("force", ["promote", "--force"])], ids=["approve", "force"]
)
def test_a_kill_while_the_promoted_model_is_deployed_changes_nothing_in_the_registry(
    waiting,
    settled,  # noqa: F811
    tmp_path,
    monkeypatch,
    action,
    arguments,
):
    declared = settled(deploy={"targets": [shelf(name="shelf", path=str(tmp_path / "shelf"))]})
    deploying = waiting.model_copy(update={"deploy": declared.deploy})
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "pause-stage").touch()
    command = [sys.executable, "-c", DEPLOYING, *arguments, only_challenger().name, "--reason", "it is needed"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        process.stdin.write(pickle.dumps(deploying))
        process.stdin.close()
        wait_until(lambda: (tmp_path / "shelf" / "paused-stage").exists() or process.poll() is not None)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    [row] = list_history(connect(), "notes")
    assert (row.action, served().version) == (action, "v1.0.0")
    (tmp_path / "shelf" / "pause-stage").unlink()
    monkeypatch.setattr(deploy, "open_target", Shelf)
    wait_until(lambda: [one.state for one in deploy.reconcile(deploying, print, force=True)] == ["active"])
    assert (tmp_path / "shelf" / "current").read_text() == "v1.0.0"
    assert len(list_history(connect(), "notes")) == 1


def test_two_approvals_at_once_promote_once(waiting, tmp_path):
    script = KILLED.split("where =")[0] + (
        "from finetune_pipeline.pipeline.challengers import find_challenger\n"
        "import time, pathlib\n"
        "challenger = find_challenger(connect(), sys.argv[2], 'notes')\n"
        "print('ready', flush=True)\n"
        "while not pathlib.Path(sys.argv[3]).exists(): time.sleep(0.001)\n"
        "print(promote.approve_challenger(loop, challenger, sys.argv[1], 'looks good', print).model.version)\n"
    )
    name, go = only_challenger().name, tmp_path / "go"
    processes = []
    for actor in ("ann", "bob"):
        one = subprocess.Popen(
            [sys.executable, "-c", script, actor, name, str(go)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        one.stdin.write(pickle.dumps(waiting))
        one.stdin.close()
        processes.append(one)
    for one in processes:
        assert one.stdout.readline() == b"ready\n"
    go.touch()
    assert [one.stdout.read().splitlines()[-1:] for one in processes] == [[b"v1.0.0"]] * 2
    assert [one.wait() for one in processes] == [0, 0]
    [row] = list_history(connect(), "notes")
    approval = newest_approval(connect(), "notes")
    assert (approval.state, approval.actor) == ("approved", row.actor) and row.actor in {"ann", "bob"}


def edit_report(loop, _instance):  # noqa: F811
    forge(get_latest(ReportManifest, "notes"), JSON, better)


def tamper_with_gguf(loop, _instance):  # noqa: F811
    gguf = get_latest(GgufManifest, "notes")
    flip_last_byte(gguf.path / gguf.manifest.gguf)


def edit_adapter(loop, _instance):  # noqa: F811
    adapter = get_latest(AdapterManifest, "notes")
    flip_last_byte(max(adapter.path.rglob("*.safetensors"), key=lambda path: path.stat().st_size))


def delete_dataset(loop, _instance):  # noqa: F811
    dataset = get_latest(DatasetManifest, "notes")
    dataset.path.rename(dataset.path.with_name("gone"))


def change_benchmark(loop, _instance):  # noqa: F811
    with Path(loop.evaluation.benchmark).open("a") as file:
        file.write('{"id": "q9", "slice": "notes", "prompt": "golden question nine", "expected": "nine"}\n')


def another_champion(loop, _instance):  # noqa: F811
    force_challenger(loop, only_challenger(), "bob", "to see it")
    rollback(connect(), "notes", "bob", "seen")


def expire(loop, _instance):  # noqa: F811
    with connect().write() as connection:
        connection.execute(sa.update(approvals).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))


VOIDED = [
    (edit_report, "the report"),
    (tamper_with_gguf, "the GGUF"),
    (edit_adapter, "changed since it was requested: adapter"),
    (delete_dataset, "changed since it was requested: dataset"),
    (change_benchmark, "changed since: base model, benchmark"),
    (another_champion, r"the champion changed \(rollback by bob"),
    (expire, "it expired on"),
]


@pytest.mark.parametrize(("change", "words"), VOIDED, ids=[change.__name__ for change, _ in VOIDED])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_change_makes_an_approval_void(waiting, instance, change, words, when, monkeypatch):
    challenger = only_challenger()
    if when == "after":  # killed between the approval and the promotion
        from finetune_pipeline.pipeline import promote as promote_module

        with monkeypatch.context() as patch:
            patch.setattr(promote_module, "promote", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                approve(waiting)
        assert state() == "approved"
    change(waiting, instance)
    if change is not another_champion:  # which was this challenger, so that nothing waits any more
        assert pending_approval(waiting, connect()).summary.startswith(f"the approval of {challenger.name} is void: ")
    if when == "after":
        run_softly(waiting, instance, "promoted_model")
        assert served() is None
    for _ in range(2):  # it stays void
        with pytest.raises(ApprovalError, match=f"is void: (.|\n)*{words}" if _ == 0 else "is void"):
            approve_challenger(waiting, challenger, "ann", "looks good", print)
        assert state() == "void" and served() is None
    assert "approve" not in {row.action for row in list_history(connect(), "notes")}


def test_a_changed_setting_makes_it_void_and_the_status_says_so(waiting, settled):  # noqa: F811
    easier = settled(**APPROVAL, gate={"min_gain": 0.01})
    assert pending_approval(easier, connect()).summary.startswith(
        f"the approval of {only_challenger().name} is void: changed since it was requested: settings; "
    )
    with pytest.raises(ApprovalError, match="gate settings"):
        approve(easier)
    with pytest.raises(ApprovalError, match="is void"):  # also after the setting is back
        approve(waiting)
    assert served() is None


def test_a_new_evaluation_asks_for_a_new_approval(waiting, instance):
    expire(waiting, instance)
    assert "it expired on" in pending_approval(waiting, connect()).summary
    first = newest_approval(connect(), "notes").comparison_id
    run(waiting, instance, "eval_report", "promoted_model")
    assert newest_approval(connect(), "notes").comparison_id != first and state() == "waiting"
    assert find_approval(connect(), "notes", first).reason.startswith("replaced by the newer challenger notes@")
    assert approve(waiting).model.version == "v1.0.0"


def test_the_actor_and_the_reason_are_needed(waiting):
    for actor, reason in (("", "good"), ("ann", " ")):
        with pytest.raises(ApprovalError, match="needs a name and a reason"):
            approve(waiting, reason, actor)
    assert state() == "waiting"


def test_a_person_can_reject_a_challenger(waiting, instance):
    reject_challenger(connect(), waiting, only_challenger(), "ann", "too curt")
    assert pending_approval(waiting, connect()) is None
    [row] = list_history(connect(), "notes")
    assert (row.action, row.actor, row.reason) == ("reject", "ann", "too curt")
    assert list_deployments(connect(), "notes") == []
    with pytest.raises(ApprovalError, match="was rejected by ann: too curt"):
        approve(waiting)
    check = check_of(run(waiting, instance, "promoted_model"))
    assert not check.passed and check.description.endswith("rejected by ann: too curt")
    with pytest.raises(ApprovalError, match="does not wait for approval"):
        reject_challenger(connect(), waiting, only_challenger(), "ann", "again")
    assert force_challenger(waiting, only_challenger(), "bob", "we need it").version == "v1.0.0"


def test_the_registry_promotes_nothing_as_approved_that_nobody_approved(waiting):
    challenger = only_challenger()
    candidate = find_trained(connect(), challenger.name, "notes")
    with pytest.raises(ApprovalError, match="nobody approved"):
        promote(connect(), candidate, None, "ann", "r", challenger.comparison.id, "approve")
    assert served() is None


# ---- challengers that the gate did not accept


@pytest.fixture
def rejected(loop, settled, instance):  # noqa: F811
    """Return the loop with a challenger that the gate rejected."""
    strict = settled(gate=IMPOSSIBLE, **APPROVAL)
    assert not run_softly(strict, instance, "eval_report", "promoted_model").success
    return strict


def test_a_rejected_challenger_cannot_be_approved_and_can_be_forced(rejected):
    assert newest_approval(connect(), "notes") is None
    name = only_challenger().name
    with pytest.raises(ApprovalError, match=f"rejected by the gate .*finetune model promote {name} --force"):
        approve(rejected)
    with pytest.raises(RegistryError, match="force needs a name and a reason"):
        force_challenger(rejected, only_challenger(), "ann", " ")
    model = force_challenger(rejected, only_challenger(), "ann", "the customer waits")
    assert served() == model and model.name == "notes@v1.0.0" and model.accuracy is not None
    [row] = list_history(connect(), "notes")
    assert (row.action, row.actor, row.reason) == ("force", "ann", "the customer waits")


@pytest.mark.parametrize("kind", [DatasetManifest, GgufManifest])
def test_force_never_overrules_a_failed_blocking_check(rejected, kind):
    artifact = get_latest(kind, "notes")
    name = kind.blocking_checks[-1]
    record_outcomes(connect(), artifact, {**dict.fromkeys(kind.blocking_checks, True), name: False}, "run-1")
    with pytest.raises(RequiredChecksError, match=f"did not pass its blocking checks: {name} failed"):
        force_challenger(rejected, only_challenger(), "ann", "the customer waits")
    assert served() is None


def test_a_rejected_challenger_answers_by_its_hash(rejected, monkeypatch):
    challenger, prompt = only_challenger(), "golden question birch"
    monkeypatch.setattr(options, "the_loop", lambda name: rejected)
    expected = generate_answers(rejected, model_spec(challenger.gguf), prompt)
    for name in (challenger.name, challenger.sha256[:6]):
        result = CliRunner().invoke(finetune, ["ask", prompt, "--model", name])
        assert (result.exit_code, result.stdout) == (0, f"{expected[0]}\n"), (result.output, result.exception)
        with connect().read() as connection:
            id = UUID(result.stderr.rsplit("recorded as ", 1)[1].strip())
            logged = find_interaction(connection, id).interaction
        assert (logged.model, logged.variant) == (challenger.name, "ask")


def test_force_refuses_an_edited_file_and_an_unevaluated_model(rejected, loop, instance):  # noqa: F811
    gguf = get_latest(GgufManifest, "notes")
    copied(gguf, "e" * 16, other_bytes=gguf.manifest.gguf)
    [unevaluated] = [one for one in list_challengers(connect(), "notes") if one.verdict == "not evaluated"]
    with pytest.raises(RegistryError, match="was not evaluated"):
        force_challenger(rejected, unevaluated, "ann", "r")
    challenger = find_challenger(connect(), get_latest(ReportManifest, "notes").manifest.challenger_sha256, "notes")
    flip_last_byte(gguf.path / gguf.manifest.gguf)
    with pytest.raises(artifacts.ArtifactError, match="is damaged or was replaced"):
        force_challenger(rejected, challenger, "ann", "r")
    assert served() is None


def test_an_open_approval_is_void_after_a_forced_promotion(waiting, instance):
    challenger = only_challenger()
    gguf = get_latest(GgufManifest, "notes")
    other = copied(gguf, "e" * 16, other_bytes=gguf.manifest.gguf)
    record_outcomes(connect(), other, dict.fromkeys(GgufManifest.blocking_checks, True), "run-1")
    report = get_latest(ReportManifest, "notes")
    forced = find_trained(connect(), f"notes@{artifacts.hash_file(other.path / gguf.manifest.gguf)[:12]}", "notes")
    promote(connect(), forced, None, "bob", "urgent", None, "force")
    with pytest.raises(ApprovalError, match="the champion"):
        approve_challenger(waiting, challenger, "ann", "looks good", print)
    assert served().id == forced.id and find_approval(connect(), "notes", report.manifest.version).state == "void"


def test_a_name_is_the_beginning_of_a_hash(rejected):
    challenger = only_challenger()
    for name in (challenger.sha256, challenger.name, challenger.sha256[:6], f"notes@{challenger.sha256[:8]}"):
        found = find_trained(connect(), name, "notes")
        assert found.sha256 == challenger.sha256 and found.name == challenger.name
    for name in ("ffffff0", "notes@ffffff0"):
        with pytest.raises(UnknownVersionError, match=f"there are: {challenger.name}"):
            find_trained(connect(), name, "notes")
        with pytest.raises(UnknownVersionError, match="has no challenger"):
            find_challenger(connect(), name, "notes")
    with pytest.raises(UnknownVersionError):
        find_trained(connect(), challenger.sha256[:5], "notes")  # too short


def test_garbage_collection_keeps_a_waiting_challenger(waiting):
    [decision] = [one for one in plan_deletion(connect(), waiting, "b", 1) if not one.folder.is_base]
    newest = stage_folder("notes", "runs") / "latest" / "gguf_model.json"
    newest.unlink()
    [decision] = [one for one in plan_deletion(connect(), waiting, "b", 1) if not one.folder.is_base]
    assert (decision.keep, decision.reason) == (True, "a challenger that waits for approval")


# ---- what Dagster and the terminal show


def evaluate_history(loop, instance, cursor=None):  # noqa: F811
    repository = definitions(loop).get_repository_def()
    with dg.build_sensor_context(
        instance=instance, cursor=cursor, repository_def=repository, resources=resources()
    ) as context:
        return history_sensor(loop).evaluate_tick(context)


def test_dagster_shows_what_people_decided(waiting, instance):
    reject_challenger(connect(), waiting, only_challenger(), "ann", "too curt")
    force_challenger(waiting, only_challenger(), "bob", "we need it")
    rollback(connect(), "notes", "cy", "worse")
    tick = evaluate_history(waiting, instance)
    kinds = [type(event).__name__ for event in tick.asset_events]
    assert kinds == ["AssetObservation", "AssetCheckEvaluation", "AssetMaterialization", "AssetObservation"]
    texts = [event.description for event in tick.asset_events]
    assert texts[2:] == ["notes@v1.0.0: force by bob: we need it", "notes@base: rollback by cy: worse"]
    for event in tick.asset_events:
        instance.report_runless_asset_event(event)
    key = dg.AssetKey(["notes", "promoted_model"])
    assert instance.get_latest_materialization_event(key).asset_materialization.metadata["actor"].value == "bob"
    later = evaluate_history(waiting, instance, tick.cursor)
    assert not later.asset_events and later.cursor == tick.cursor


def test_dagster_has_its_own_promotions_already(loop, instance):  # noqa: F811
    run(loop, instance, "promoted_model")
    tick = evaluate_history(loop, instance)
    assert not tick.asset_events and tick.cursor == str(list_history(connect(), "notes")[-1].id)


def test_without_the_setting_nobody_is_asked(loop, instance):  # noqa: F811
    graph = definitions(loop).resolve_asset_graph()
    assert APPROVED not in {key.name for key in graph.asset_check_keys}
    assert isinstance(promote_accepted(loop, only_challenger(), "ann", print).model.version, str)
    assert newest_approval(connect(), "notes") is None
    assert [(row.action, row.actor) for row in list_history(connect(), "notes")] == [("promote", "ann")]


@pytest.mark.parametrize("value", [True, "off", "yes"])
def test_the_setting_has_two_values(make_loop, value):
    with pytest.raises(InvalidSettings, match="approval"):
        make_loop(approval=value)


def command(monkeypatch, loop, *arguments, code=0):  # noqa: F811
    monkeypatch.setattr(options, "load_loop", lambda name: loop)
    monkeypatch.setattr(options, "the_loop", lambda name: loop)
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    result = CliRunner().invoke(finetune, ["model", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(f"{result.output} {result.exception if code else ''}".split())


def test_the_commands(waiting, monkeypatch):
    name = only_challenger().name

    def model(*arguments, code=0):
        return command(monkeypatch, waiting, *arguments, code=code)

    assert f"{name} " in model("list") and "waiting for approval" in model("list")
    assert "accepted by the gate" in model("show", name)
    assert "needs an approval" in model("promote", name, code=1)
    assert "Missing option '--reason'" in model("approve", name, code=2)
    assert "notes@v1.0.0 is the champion now" in model("approve", name[6:14], "--reason", "looks good")
    assert served().version == "v1.0.0"
    assert "approve notes@v1.0.0 ann looks good" in model("history")
    assert model("rollback") == "notes@base is the champion again"
    assert "is archived" in model("archive", "v1.0.0", "--reason", "worse")
    assert "v1.0.0" not in model("list") and "archived" in model("list", "--all")
    assert "archive notes@v1.0.0 ann worse" in model("history")
    assert "is not archived any more" in model("unarchive", "v1.0.0", "--reason", "not so bad")
    assert "v1.0.0" in model("list")


def test_the_command_forces_a_rejected_challenger(rejected, monkeypatch):
    name = only_challenger().name
    assert name not in command(monkeypatch, rejected, "list")
    assert "rejected by the gate" in command(monkeypatch, rejected, "list", "--all")
    assert "--force" in command(monkeypatch, rejected, "promote", name, code=1)
    assert "force needs a name and a reason" in command(monkeypatch, rejected, "promote", name, "--force", code=1)
    output = command(monkeypatch, rejected, "promote", name, "--force", "--reason", "the customer waits")
    assert "notes@v1.0.0 is the champion now" in output
    assert (os.environ.get("FINETUNE_HOME") or "") and champion(connect(), "notes").version == "v1.0.0"


def test_a_newer_challenger_replaces_an_older_one(waiting, instance):
    first = newest_approval(connect(), "notes")
    run(waiting, instance, "eval_report")
    report, gguf = get_latest(ReportManifest, "notes"), get_latest(GgufManifest, "notes")
    asked = ask_for_approval(waiting, report, gguf)
    assert (asked.comparison_id, asked.state) == (report.manifest.comparison_id, "waiting")
    assert find_approval(connect(), "notes", first.comparison_id).state == "void"
