"""Attempts to bypass the gate by editing files of the artifacts or selecting assets.

Every test starts from a copy of one home, with a challenger that passed its checks and whose report promotes it.
"""

import json
import shutil

import dagster as dg
import pytest
import sqlalchemy as sa

from finetune_pipeline.artifacts import (
    ArtifactError,
    draft,
    get_latest,
    hash_file,
    publish,
    read,
    set_latest,
    stage_folder,
)
from finetune_pipeline.curation.dataset_files import PROMPT_COMPLETION
from finetune_pipeline.database import connect
from finetune_pipeline.database.tables import budget_tests, check_outcomes, comparisons
from finetune_pipeline.evaluation.report import JSON
from finetune_pipeline.evaluation.run import ANSWERS, BenchmarkRunManifest
from finetune_pipeline.export.base import base_hash, resolve_base_model
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, GgufManifest, ReportManifest
from finetune_pipeline.pipeline import incremental
from finetune_pipeline.pipeline.promote import ReportMismatchError
from finetune_pipeline.pipeline.required_checks import RequiredChecksError
from finetune_pipeline.registry.champion import ChampionChangedError, champion, promote, rollback, switch
from finetune_pipeline.registry.check_outcomes import outcomes_of, record_outcomes
from finetune_pipeline.registry.comparisons import find_comparison, judged_watermark, list_comparisons
from finetune_pipeline.registry.deployment_history import list_deployments
from finetune_pipeline.registry.model_versions import CandidateModel, RegistryError
from finetune_pipeline_tests.orchestration.conftest import ATTRIBUTES, corrected, definitions, write_events
from finetune_pipeline_tests.orchestration.test_adapter_form import (
    ask_for_what_it_answers,
    flip_last_byte,
    make_adapter,
    run,
)

pytestmark = pytest.mark.slow  # together they take some minutes

STAGES = {kind.stage: kind for kind in (DatasetManifest, AdapterManifest, GgufManifest, ReportManifest)}
IMPOSSIBLE = {"min_gain": 1.0, "mode": "points"}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return the folder of the home with the passing challenger and of its benchmark, whose path is a setting."""
    return tmp_path_factory.mktemp("template")


@pytest.fixture
def benchmark(template):
    """Return the benchmark, whose expected answers are the challenger's own."""
    path = template / "benchmark.jsonl"
    if (template / "original.jsonl").exists():
        shutil.copy(template / "original.jsonl", path)
    return path


@pytest.fixture
def settled(make_loop, benchmark, tmp_path):
    """Make the loop with changes to its attributes."""

    def make(**changes):
        made = make_loop(export={"quantization": "F16"}, **changes)
        if not benchmark.exists():
            shutil.copy(tmp_path / "benchmark.jsonl", benchmark)
        evaluation = made.evaluation.model_copy(update={"benchmark": str(benchmark)})
        return made.model_copy(update={"evaluation": evaluation})

    return make


@pytest.fixture
def loop(settled, own_home, template, instance):
    """Return the loop with a challenger that passed everything and is not promoted yet, in this test's own home."""
    made = settled()
    if (template / "home").exists():
        shutil.copytree(template / "home", own_home, symlinks=True, dirs_exist_ok=True)
        return made
    write_events(made.drop_folder / "log.jsonl", *corrected(f"person{n}" for n in range(10)))
    run(made, instance, "raw_logs", "curated_dataset")
    make_adapter(made, 0)
    run(made, instance, "gguf_model")
    ask_for_what_it_answers(made, template)
    run(made, instance, "eval_report")
    shutil.copy(template / "benchmark.jsonl", template / "original.jsonl")
    connect().engine.dispose()
    shutil.copytree(own_home, template / "home", symlinks=True)
    return made


def served():
    return champion(connect(), "notes")


def edit(path, change):
    """Rewrite a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def forge(artifact, name, change, **claims):
    """Rewrite a file of an artifact and adapt its manifest, so that both are consistent."""
    path = artifact.path / name
    edit(path, change)

    def rehash(manifest):
        manifest["files"][name] = {"sha256": hash_file(path), "size": path.stat().st_size}
        manifest.update(claims)

    edit(artifact.path / "manifest.json", rehash)


def better(report):
    """Write metrics that pass any gate into a report."""
    report["verdict"] |= {"champion_correct": 0, "challenger_correct": report["verdict"]["total"]}
    report["verdict"]["decision"] = "promote"
    report["quality_floor"] |= {"constant_correct": 0}


def test_unaltered_artifacts_are_promoted(loop, instance):
    assert run(loop, instance, "promoted_model").success
    assert served().version == "v1.0.0"
    report = get_latest(ReportManifest, "notes")
    assert find_comparison(connect(), "notes", report.manifest.version).report_sha256 == report.sha256


@pytest.mark.parametrize("claims", [{}, {"decision": "promote"}, {"decision": "promote", "reason": "it is good"}])
def test_a_rejected_report_that_was_rewritten_promotes_nothing(loop, settled, instance, claims):
    strict = settled(gate=IMPOSSIBLE)
    assert not run_softly(strict, instance, "eval_report", "promoted_model").success
    forge(get_latest(ReportManifest, "notes"), JSON, better, **claims)
    with pytest.raises(ArtifactError, match="is not what a run wrote"):
        run(strict, instance, "promoted_model")
    assert served() is None


@pytest.mark.parametrize("stage", ["gguf_model", "eval_report"])
def test_an_edited_input_of_the_promotion_is_refused(loop, instance, stage):
    artifact = get_latest(STAGES[stage], "notes")
    flip_last_byte(max((path for path in artifact.path.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size))
    with pytest.raises(ArtifactError, match="is damaged or was replaced"):
        run(loop, instance, "promoted_model")
    assert served() is None


def test_a_report_under_another_version_or_from_another_loop_is_refused(loop, instance):
    passing = get_latest(ReportManifest, "notes")
    other = stage_folder("notes", "eval_report") / "0123456789abcdef"
    shutil.copytree(passing.path, other)
    foreign = stage_folder("other", "eval_report") / passing.manifest.version
    shutil.copytree(passing.path, foreign)
    edit(foreign / "manifest.json", lambda manifest: manifest.update(loop="notes"))
    for copy in (other, foreign):
        assert read(ReportManifest, copy).manifest.promote
    edit(stage_folder("notes", "runs") / "latest" / "eval_report.json", lambda d: d.update(version=other.name))
    with pytest.raises(ArtifactError, match="is not what a run wrote"):
        run(loop, instance, "promoted_model")
    assert served() is None


def test_forged_benchmark_answers_are_generated_again(loop, instance, benchmark):
    rows = [{**json.loads(line), "expected": f"number {n}"} for n, line in enumerate(benchmark.open())]
    benchmark.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not run_softly(loop, instance, "eval_report").success
    reason = list_comparisons(connect(), "notes")[0].reason
    right = {row["id"]: row["expected"] for row in rows}
    identity = list_comparisons(connect(), "notes")[0].challenger_sha256
    forged = 0
    for folder in stage_folder("notes", "benchmark_run").glob("[!.]*"):
        run_of = read(BenchmarkRunManifest, folder)
        if run_of.manifest.model_sha256 == identity:
            answers = [json.loads(line) for line in (folder / ANSWERS).open()]
            answers = [{**answer, "text": right[answer["id"]]} for answer in answers]
            (folder / ANSWERS).write_text("".join(json.dumps(answer) + "\n" for answer in answers))
            file = {"sha256": hash_file(folder / ANSWERS), "size": (folder / ANSWERS).stat().st_size}
            edit(folder / "manifest.json", lambda manifest, file=file: manifest["files"].update({ANSWERS: file}))
            forged += 1
    assert forged
    assert not run_softly(loop, instance, "eval_report", "promoted_model").success
    assert list_comparisons(connect(), "notes")[0].reason == reason
    assert served() is None


def run_softly(loop, instance, *stages):
    """Run like `run`, but return failures instead of raising them."""
    job = definitions(loop).resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(["notes", one]) for one in stages]
    return job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False)


BLOCKING = [(kind.stage, name) for kind in (DatasetManifest, GgufManifest) for name in kind.blocking_checks]


@pytest.mark.parametrize(("stage", "name"), BLOCKING)
@pytest.mark.parametrize("how", ["failed", "was not run"])
def test_a_model_that_failed_a_blocking_check_is_not_promoted(loop, instance, stage, name, how):
    artifact = get_latest(STAGES[stage], "notes")
    assert outcomes_of(connect(), "notes", STAGES[stage], artifact.manifest.version, artifact.sha256)[name].passed
    if how == "failed":
        passed = dict.fromkeys(STAGES[stage].blocking_checks, True)
        record_outcomes(connect(), artifact, {**passed, name: False}, "run-1")
    else:
        with connect().write() as connection:
            connection.execute(sa.delete(check_outcomes).where(check_outcomes.c.name == name))
    reports = list_comparisons(connect(), "notes")
    for selected in (["promoted_model"], ["eval_report", "promoted_model"]):
        with pytest.raises(RequiredChecksError, match=f"{stage} .* did not pass its blocking checks: {name} {how}"):
            run(loop, instance, *selected)
    assert served() is None and list_comparisons(connect(), "notes") == reports


def test_a_failed_check_counts_in_later_runs(loop, settled, instance):
    few = settled(curation={"min_examples": 50, "validation_fraction": 0.2})
    assert not run_softly(few, instance, "curated_dataset").success
    make_adapter(few, 3)
    run(few, instance, "gguf_model")
    with pytest.raises(RequiredChecksError, match="enough_examples failed in run"):
        run(few, instance, "eval_report", "promoted_model")
    assert served() is None


def run_without_checks(loop, instance, *stages):
    """Materialize assets as the launchpad does after all checks were deselected."""
    job = definitions(loop).resolve_implicit_global_asset_job_def()
    subset = job.get_subset(
        asset_selection={dg.AssetKey(["notes", stage]) for stage in stages}, asset_check_selection=set()
    )
    done = subset.execute_in_process(instance=instance, raise_on_error=False)
    assert not done.get_asset_check_evaluations()
    return done


def spent():
    with connect().read() as connection:
        return connection.execute(sa.select(budget_tests.c.number)).scalars().all()


def test_a_comparison_spends_one_test_of_the_error_budget(loop, settled, instance):
    required = settled(gate={"significance": "required"})
    for _ in range(2):  # the check and the promotion ask in each run, and both runs compare the same files
        assert not run_softly(required, instance, "eval_report", "promoted_model").success
        report = get_latest(ReportManifest, "notes")
        assert report.manifest.decision == find_comparison(connect(), "notes", report.manifest.version).decision
        assert report.manifest.decision == "inconclusive"
        assert "can decide nothing" in report.manifest.reason
        assert spent() == [1]
    assert served() is None
    with pytest.raises(dg.Failure, match=r"not promoted: (.|\n)*inconclusive: about"):
        run(required, instance, "promoted_model")
    assert spent() == [1]


def test_a_comparison_that_is_not_recorded_spends_nothing(loop, settled, instance, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("finetune_pipeline.pipeline.evaluate.mark_judged", fail)
    required = settled(gate={"significance": "required"})
    with pytest.raises(RuntimeError, match="the disk is full"):
        run(required, instance, "eval_report")
    assert spent() == []


def test_no_run_can_deselect_the_checks_of_the_gguf(loop):
    job = definitions(loop).resolve_implicit_global_asset_job_def()
    with pytest.raises(dg.DagsterInvalidSubsetError):
        job.get_subset(asset_selection={dg.AssetKey(["notes", "gguf_model"])}, asset_check_selection=set())


def test_deselecting_the_checks_of_a_dataset_leads_to_no_promotion(loop, settled, instance):
    other = settled(curation={"min_examples": 4, "validation_fraction": 0.2})
    assert run_without_checks(other, instance, "curated_dataset").success
    make_adapter(other, 3)
    run(other, instance, "gguf_model")
    done = run_without_checks(other, instance, "eval_report", "promoted_model")
    [failed] = [event for event in done.all_events if event.is_step_failure]
    assert "enough_examples was not run on it" in str(failed.step_failure_data.error)
    assert served() is None


def test_deselecting_the_check_of_the_gain_leads_to_no_promotion(loop, settled, instance):
    done = run_without_checks(settled(gate=IMPOSSIBLE), instance, "eval_report", "promoted_model")
    [failed] = [event for event in done.all_events if event.is_step_failure]
    assert failed.step_key == "notes__promoted_model"
    assert "not promoted" in str(failed.step_failure_data.error)
    assert served() is None


@pytest.mark.parametrize(("stage", "name"), [("curated_dataset", "enough_examples"), ("eval_report", "gain")])
def test_the_checks_of_an_artifact_run_again_alone(loop, instance, stage, name):
    job = definitions(loop).resolve_implicit_global_asset_job_def()
    key = dg.AssetCheckKey(dg.AssetKey(["notes", stage]), name)
    again = job.get_subset(asset_selection=set(), asset_check_selection={key})
    done = again.execute_in_process(instance=instance)
    [check] = done.get_asset_check_evaluations()
    assert (check.check_name, check.passed) == (name, True)
    assert not done.get_asset_materialization_events()


def test_the_blocking_checks_equal_the_required_ones(loop):
    graph = definitions(loop).resolve_asset_graph()
    for kind in STAGES.values():
        keys = [key for key in graph.asset_check_keys if key.asset_key.path[-1] == kind.stage]
        assert {key.name for key in keys if graph.get(key).blocking} == set(kind.blocking_checks)


@pytest.mark.parametrize("stage", ["curated_dataset", "lora_adapter", "gguf_model"])
def test_an_edited_artifact_is_refused_and_created_again(loop, instance, stage):
    artifact = get_latest(STAGES[stage], "notes")
    edit(artifact.path / "manifest.json", lambda manifest: manifest.update(watermark=10**6))
    following = {"curated_dataset": "lora_adapter", "lora_adapter": "gguf_model", "gguf_model": "eval_report"}[stage]
    with pytest.raises(ArtifactError, match="is not what a run wrote; materialize"):
        run(loop, instance, following)
    if stage == "curated_dataset":
        run(loop, instance, "curated_dataset")  # created again
        assert get_latest(DatasetManifest, "notes").manifest.watermark < 10**6


def test_a_report_does_not_undo_a_rollback_or_a_switch(loop, instance):
    run(loop, instance, "eval_report")  # a second report of the same, made before the promotion
    first, second = (one.id for one in reversed(list_comparisons(connect(), "notes")))
    run(loop, instance, "promoted_model")
    assert [one.comparison_id for one in list_deployments(connect(), "notes")] == [second]
    run(loop, instance, "promoted_model")  # a retry after success changes nothing
    assert len(list_deployments(connect(), "notes")) == 1
    rollback(connect(), "notes", "ann", "worse in practice")
    for version in (second, first):
        set_latest(read(ReportManifest, stage_folder("notes", "eval_report") / version).manifest, "by hand")
        with pytest.raises(ChampionChangedError, match="rollback by ann"):
            run(loop, instance, "promoted_model")
    assert served() is None
    switch(connect(), "notes", "v1.0.0", "ann", "to look again")
    switch(connect(), "notes", "base", "ann", "no, it is worse")
    with pytest.raises(ChampionChangedError, match="switch by ann"):
        run(loop, instance, "promoted_model")
    assert served() is None
    run(loop, instance, "eval_report", "promoted_model")  # compared again, after the switch by hand
    assert served().version == "v1.0.0"


def test_changed_settings_invalidate_a_report(loop, settled, instance):
    easier = settled(gate={"min_gain": 0})
    settings = "base model, benchmark, schema, rules, gate settings or serving.constrain"
    with pytest.raises(ReportMismatchError, match=f"changed since: {settings}"):
        run(easier, instance, "promoted_model")
    assert served() is None


def test_a_verdict_must_agree_with_the_database(loop, instance):
    with connect().write() as connection:
        connection.execute(sa.update(comparisons).values(decision="reject"))
    with pytest.raises(ReportMismatchError, match="its manifest says promote, the database says reject"):
        run(loop, instance, "promoted_model")
    assert served() is None


@pytest.mark.parametrize("selected", [["eval_report"], ["eval_report", "promoted_model"], ["promoted_model"]])
def test_a_challenger_that_is_the_champion_succeeds_without_a_deployment(loop, instance, selected):
    run(loop, instance, "promoted_model")
    deployments, compared = list_deployments(connect(), "notes"), list_comparisons(connect(), "notes")
    result = run(loop, instance, *selected)
    assert result.success
    materialized = {event.asset_key.path[-1] for event in result.get_asset_materialization_events()}
    assert materialized == ({"promoted_model"} if selected == ["promoted_model"] else set())
    assert (list_deployments(connect(), "notes"), list_comparisons(connect(), "notes")) == (deployments, compared)


def test_data_that_reproduced_the_champion_counts_as_judged(loop, instance):
    run(loop, instance, "promoted_model")
    judged = judged_watermark(connect(), "notes")
    newer = {"watermark": judged + 7}
    gguf = get_latest(GgufManifest, "notes")
    with draft("notes", "gguf_model", "f" * 16) as folder:  # trained on more, and the same file to the last byte
        for path in gguf.path.iterdir():
            if path.name != "manifest.json":
                shutil.copy(path, folder)
        fields = gguf.manifest.model_dump(exclude={"files", "created_at"})
        again = publish(folder, GgufManifest, {**fields, "version": "f" * 16, **newer})
    record_outcomes(connect(), again, dict.fromkeys(GgufManifest.blocking_checks, True), "run-1")
    set_latest(again.manifest, "by hand")
    assert run(loop, instance, "eval_report", "promoted_model").success
    assert judged_watermark(connect(), "notes") == judged + 7
    assert len(list_deployments(connect(), "notes")) == 1


def test_a_model_trained_on_a_new_benchmark_is_not_evaluated(loop, instance, benchmark):
    rows = [json.loads(line) for line in benchmark.open()]
    rows[0]["prompt"] = "please note what person3 said about the person3 matter"
    benchmark.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RequiredChecksError, match="made for another benchmark, and 1 of its examples"):
        run(loop, instance, "eval_report", "promoted_model")
    assert served() is None


@pytest.fixture
def trained_twice(loop, settled, instance, benchmark, monkeypatch):
    """Return a loop whose champion was trained on a question of the new benchmark, with new examples to train on.

    None of the new examples is a near-duplicate of the benchmark.
    """
    run(loop, instance, "promoted_model")
    rows = [json.loads(line) for line in benchmark.open()]
    rows[0]["prompt"] = "please note what person3 said about the person3 matter"
    benchmark.write_text("".join(json.dumps(row) + "\n" for row in rows))
    later = settled(training={**ATTRIBUTES["training"], "mode": "incremental"})
    write_events(later.drop_folder / "later.jsonl", *corrected(f"other{n}" for n in range(10)))
    run(later, instance, "raw_logs", "curated_dataset")
    assert get_latest(DatasetManifest, "notes").manifest.near_benchmark
    monkeypatch.setattr(
        incremental, "obstacle_to_warm_start", lambda *_: None
    )  # the champion's adapter has random weights
    return later


def copied(artifact, version, *, other_bytes="", **changes):
    """Publish a copy of an artifact with changes to its manifest, and with a file of other bytes."""
    manifest = artifact.manifest
    with draft("notes", manifest.stage, version) as folder:
        shutil.copytree(artifact.path, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        if other_bytes:
            flip_last_byte(folder / other_bytes)
        fields = manifest.model_dump(exclude={"files", "created_at"})
        return publish(folder, type(manifest), {**fields, **changes, "version": version})


def test_a_warm_started_model_trained_on_a_new_benchmark_is_not_evaluated(trained_twice, instance):
    adapter, gguf = get_latest(AdapterManifest, "notes"), get_latest(GgufManifest, "notes")
    dataset = get_latest(DatasetManifest, "notes")
    datasets = {**gguf.manifest.datasets, dataset.manifest.version: dataset.sha256}
    inputs = {**adapter.manifest.inputs, "curated_dataset": dataset.manifest.version}
    second = copied(adapter, "d" * 16, inputs=inputs, datasets=datasets)
    trained = {"adapter_version": second.manifest.version, "datasets": datasets}
    challenger = copied(gguf, "e" * 16, other_bytes=gguf.manifest.gguf, **trained)
    record_outcomes(connect(), challenger, dict.fromkeys(GgufManifest.blocking_checks, True), "run-1")
    set_latest(challenger.manifest, "by hand")
    compared = list_comparisons(connect(), "notes")
    with pytest.raises(RequiredChecksError, match="made for another benchmark, and 1 of its examples"):
        run(trained_twice, instance, "eval_report", "promoted_model")
    assert list_comparisons(connect(), "notes") == compared


@pytest.mark.parametrize("there", [True, False])
def test_no_training_starts_from_an_adapter_that_was_trained_on_the_benchmark(trained_twice, there):
    loop, adapter = trained_twice, get_latest(AdapterManifest, "notes")
    if not there:  # a dataset of an earlier training, which was deleted
        copied(adapter, adapter.manifest.version, datasets={"0" * 16: "0" * 64, **adapter.manifest.datasets})
    base = base_hash(resolve_base_model(loop.base_model))
    begin = incremental.training_start(
        loop, loop.training, get_latest(DatasetManifest, "notes"), PROMPT_COMPLETION, base
    )
    expected = "made for another benchmark, and 1 of its examples" if there else "cannot be compared with the benchmark"
    assert begin.mode == "full" and expected in begin.reason


def test_a_damaged_champion_is_refused(loop, instance, own_home):
    gguf = get_latest(GgufManifest, "notes")
    path = own_home / "champion.gguf"
    shutil.copy(gguf.path / gguf.manifest.gguf, path)
    flip_last_byte(path)  # another model than the challenger
    other = CandidateModel(
        loop="notes", gguf_path=path, gguf_sha256=hash_file(path), base_hash=gguf.manifest.base_hash, mode="full",
        lineage={}, scores={}, report_path=path,
    )  # fmt: skip
    promote(connect(), other, None, "ann", "a test needs it", None, "force")
    flip_last_byte(path)
    with pytest.raises(RegistryError, match="is damaged or was replaced"):
        run(loop, instance, "eval_report", "promoted_model")
    assert len(list_deployments(connect(), "notes")) == 1
