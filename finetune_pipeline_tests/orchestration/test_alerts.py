"""Alerts about runs: which run gives which alert, by the sensor and by `finetune run`, on a real Dagster instance."""

import time
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from finetune_pipeline.alerts import list_alerts
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import PromotionManifest, ReportManifest
from finetune_pipeline.orchestration.alerts import OVERLAP_SECONDS, alert_of_run, alert_sensor
from finetune_pipeline.orchestration.resources import HOME, FinetuneHome
from finetune_pipeline.pipeline.jobs import LOOP_TAG
from finetune_pipeline.settings import home
from finetune_pipeline_tests.pipeline.test_summary import made
from finetune_pipeline_tests.receiver import receiving

REASON = "challenger 2 of 4, champion 2 of 4: gain 0.0%, 5% needed\nmost answers are invalid"


@pytest.fixture
def run(instance):
    """Run small assets with the loop's keys; the argument says what happens in them."""

    def execute(happens, prefix="notes", **reports):
        gate = dg.AssetCheckSpec("gain", asset=[prefix, "eval_report"], blocking=True)

        @dg.asset(key_prefix=prefix)
        def lora_adapter():
            if happens == "bug":
                raise KeyError("a prompt of Ann")
            if happens == "library":
                raise RuntimeError("out of memory\n[parameters: 'Call Ann at noon']")

        @dg.asset(key_prefix=prefix, deps=[lora_adapter])
        def eval_report(context):
            if reports:
                made(context.run.run_id, ReportManifest, loop=prefix, **reports)

        @dg.multi_asset_check(name=f"{prefix}__eval_report_checks", specs=[gate])
        def checks():
            passed = happens not in ("rejected", "inconclusive")
            yield dg.AssetCheckResult(check_name="gain", passed=passed, description=f"reject: {REASON}")

        @dg.asset(key_prefix=prefix, deps=[eval_report])
        def promoted_model(context):
            if happens.startswith("promoted"):
                made(context.run.run_id, PromotionManifest, loop=prefix)
            if happens == "promoted, then a bug":
                raise KeyError("target")
            if happens == "refused":
                raise dg.Failure(f"not promoted: {REASON}", allow_retries=False)

        assets = [lora_adapter, eval_report, promoted_model]
        job = dg.Definitions(assets=assets, asset_checks=[checks]).resolve_implicit_global_asset_job_def()
        selection = [asset.key for asset in assets] if happens != "refused" else [promoted_model.key]
        result = job.execute_in_process(instance=instance, raise_on_error=False, asset_selection=selection)
        return instance.get_run_by_id(result.run_id)

    return execute


def evaluate(loop, instance, cursor=None):
    """Evaluate the sensor as the daemon does; return what it says, and its cursor."""
    resources = {HOME: FinetuneHome(path=str(home()))}
    with dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources) as context:
        answer = alert_sensor(loop)(context)
        return answer.skip_message, context.cursor


def titles(loop="notes"):
    return [alert.title for alert in list_alerts(connect(), loop)]


@pytest.mark.parametrize(
    ("decision", "title", "todo"),
    [
        ("reject", "notes: the challenger was evaluated and not promoted", "see the answers in the report"),
        ("inconclusive", "notes: the comparison is inconclusive", "add questions to the benchmark"),
    ],
)
def test_a_rejection_is_a_result_and_not_a_fault(loop, instance, run, decision, title, todo):
    ended = run("rejected", decision=decision, reason=REASON)
    assert ended.status == dg.DagsterRunStatus.FAILURE
    alert = alert_of_run(loop, instance, ended)
    assert (alert.kind, alert.title) == ("rejection", title)
    assert alert.text.startswith(f"{REASON}\nnext: the champion stays; ") and todo in alert.text
    assert alert.link.endswith("/report.html")
    assert "fail" not in alert.title + alert.text and "error" not in alert.text


def test_a_rejection_that_keeps_the_champion_and_lets_the_run_succeed_is_told_too(loop, instance, run):
    ended = run("kept", decision="reject", reason=REASON)
    assert ended.status == dg.DagsterRunStatus.SUCCESS
    assert alert_of_run(loop, instance, ended).kind == "rejection"


def test_promoted_model_alone_that_the_gate_refuses_again_is_a_rejection(loop, instance, run):
    made("before", ReportManifest, decision="reject", reason=REASON)
    alert = alert_of_run(loop, instance, run("refused"))
    assert (alert.kind, alert.text.partition("\nnext")[0]) == ("rejection", REASON)


def test_a_promotion_names_the_champion_its_numbers_and_how_to_undo_it(loop, instance, run):
    alert = alert_of_run(loop, instance, run("promoted", decision="promote", reason="gain 50.0%, 5% needed"))
    assert (alert.kind, alert.title) == ("promotion", "notes@v1.0.0 is the champion now")
    assert alert.text.startswith("gain 50.0%, 5% needed\n") and "`finetune model rollback --loop notes`" in alert.text


@pytest.mark.parametrize(("happens", "cause"), [("bug", "KeyError: '...'"), ("library", "RuntimeError: out of memory")])
def test_a_failure_names_step_cause_and_what_to_do_without_the_text_of_examples(loop, instance, run, happens, cause):
    ended = run(happens)
    alert = alert_of_run(loop, instance, ended)
    assert (alert.kind, alert.title) == ("failure", "notes: the run failed in lora_adapter")
    assert alert.text.split("\n") == [
        cause,
        "next: fix the cause, then `finetune run --loop notes`; finished work is reused",
        f"run {ended.run_id} in Dagster's UI has the details",
    ]
    assert "Ann" not in str(alert)


def test_a_run_that_failed_after_its_promotion_says_so(loop, instance, run):
    alert = alert_of_run(loop, instance, run("promoted, then a bug", decision="promote"))
    assert (alert.kind, alert.title) == ("failure", "notes: the run failed in promoted_model")
    assert "\nnotes@v1.0.0 had been promoted before that, and stays the champion\n" in alert.text


def test_a_failed_check_of_the_gate_without_a_rejection_is_a_failure(loop, instance, run):
    alert = alert_of_run(loop, instance, run("rejected", decision="promote", reason=REASON))
    assert (alert.kind, alert.title) == ("failure", "notes: the run failed in eval_report")
    assert alert.text.startswith("check gain: reject: challenger 2 of 4")


def test_a_run_that_the_daemon_ended_is_told_once(loop, instance):
    """The monitoring of runs reports a run as failed whose process did not start or was killed."""
    told, cursor = evaluate(loop, instance)
    assert told == "no run ended since that there is an alert about"
    run = instance.create_run_for_job(dg.define_asset_job("notes_loop").resolve(asset_graph=graph()), tags=TAGS)
    instance.report_run_failed(run, "This run was terminated by the run monitoring daemon.")
    told, cursor = evaluate(loop, instance, cursor)
    assert told == "sent: notes: the run failed"
    (alert,) = list_alerts(connect(), "notes")
    assert alert.text.startswith("This run was terminated by the run monitoring daemon.\n")
    assert evaluate(loop, instance, cursor)[0] == "no run ended since that there is an alert about"


TAGS = {LOOP_TAG: "notes"}


def graph():
    @dg.asset(key_prefix="notes")
    def raw_logs():
        pass

    return dg.Definitions(assets=[raw_logs]).resolve_asset_graph()


def test_the_sensor_tells_of_this_loop_only_and_catches_up_after_a_pause(loop, instance, run, monkeypatch):
    run("bug", prefix="mails")
    run("bug")
    run("promoted", decision="promote")
    long_ago = datetime.now(UTC) - timedelta(days=3)
    told, _ = evaluate(loop, instance, str(long_ago.timestamp()))
    assert told == "sent: notes: the run failed in lora_adapter; notes@v1.0.0 is the champion now"
    assert len(titles()) == 2 and titles("mails") == []


def test_a_run_that_ended_long_before_the_last_evaluation_is_not_told(loop, instance, run):
    run("bug")
    since = time.time() + OVERLAP_SECONDS + 60
    assert evaluate(loop, instance, str(since))[0] == "no run ended since that there is an alert about"


def test_a_canceled_run_is_not_told(loop, instance):
    run = instance.create_run_for_job(dg.define_asset_job("notes_loop").resolve(asset_graph=graph()), tags=TAGS)
    instance.report_run_canceled(run)
    assert alert_of_run(loop, instance, instance.get_run_by_id(run.run_id)) is None
    assert evaluate(loop, instance)[0] == "no run ended since that there is an alert about"


def test_a_receiver_that_is_down_does_not_stop_the_sensor(make_loop, instance, run, monkeypatch):
    with receiving(status=500) as receiver:
        monkeypatch.setenv("HOOK_URL", receiver.url)
        run("bug")
        told, cursor = evaluate(make_loop(alerts={"webhook_env": "HOOK_URL"}), instance)
    assert told == "sent: notes: the run failed in lora_adapter" and cursor
    assert [body["kind"] for body in receiver.got] == ["failure"]
