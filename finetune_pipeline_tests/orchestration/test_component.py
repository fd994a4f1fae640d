import click
import dagster as dg
import pytest
import yaml

from finetune_pipeline.definitions import defs
from finetune_pipeline.orchestration.component import FineTuneLoop, loop_definitions
from finetune_pipeline.orchestration.scaffolder import LoopParams, LoopScaffolder
from finetune_pipeline.orchestration.training_config import NOT_IN_THE_LAUNCHPAD, training_config
from finetune_pipeline.pipeline.init_loop import init_loop
from finetune_pipeline.settings import PROJECT_ROOT, SettingsError, TrainingSettings, load_loop, project_path, read_loop
from finetune_pipeline_tests.orchestration.conftest import ATTRIBUTES, definitions

STAGES = ["raw_logs", "curated_dataset", "lora_adapter", "gguf_model", "eval_report", "promoted_model"]


def edges(graph):
    return {
        key.to_user_string(): sorted(parent.to_user_string() for parent in graph.get(key).parent_keys)
        for key in graph.get_all_asset_keys()
    }


def test_the_default_loop_has_six_assets_with_bare_keys():
    assert edges(defs().resolve_asset_graph()) == {
        "raw_logs": [],
        "curated_dataset": ["raw_logs"],
        "lora_adapter": ["curated_dataset"],
        "gguf_model": ["lora_adapter"],
        "eval_report": ["gguf_model"],
        "promoted_model": ["eval_report", "gguf_model"],
    }


def test_the_default_loop_has_these_checks():
    graph = defs().resolve_asset_graph()
    checks = {f"{key.asset_key.to_user_string()}.{key.name}": graph.get(key).blocking for key in graph.asset_check_keys}
    assert checks == {
        "raw_logs.rejected_lines": False,
        "raw_logs.sources_read": False,
        "curated_dataset.enough_examples": True,
        "curated_dataset.no_benchmark_overlap": True,
        "curated_dataset.targets_parse": True,
        "gguf_model.loads_and_answers": True,
        "gguf_model.tokenizer_parity": True,
        "gguf_model.agreement": False,
        "gguf_model.score_equivalence": False,
        "eval_report.gain": True,
        "eval_report.significance": False,
        "eval_report.no_slice_regressed": False,
        "eval_report.fixed_corrections_held": False,
    }


def test_a_loop_with_targets_has_a_check_that_never_blocks(make_loop):
    graph = definitions(
        make_loop(deploy={"targets": [{"kind": "folder", "path": "/srv/models"}]})
    ).resolve_asset_graph()
    checks = {
        key.name: graph.get(key).blocking for key in graph.asset_check_keys if "promoted_model" in key.asset_key.path
    }
    assert checks == {"deployed": False}


def test_what_starts_runs_is_off_by_default():
    repository = defs().get_repository_def()
    assert repository.has_job("aec_parser_loop")
    assert {sensor.name: sensor.default_status for sensor in repository.sensor_defs} == {
        "aec_parser_new_examples": dg.DefaultSensorStatus.STOPPED,
        "aec_parser_alerts": dg.DefaultSensorStatus.RUNNING,  # it starts nothing
        "aec_parser_history": dg.DefaultSensorStatus.RUNNING,  # nor does this
    }
    schedules = {schedule.name: schedule.default_status for schedule in repository.schedule_defs}
    assert schedules == {
        "aec_parser_nightly": dg.DefaultScheduleStatus.STOPPED,
        "aec_parser_yearly": dg.DefaultScheduleStatus.STOPPED,
    }


def test_trigger_running_turns_the_sensor_and_the_schedules_on(make_loop):
    repository = definitions(make_loop(trigger={"running": True})).get_repository_def()
    assert {sensor.default_status for sensor in repository.sensor_defs} == {dg.DefaultSensorStatus.RUNNING}
    on = [schedule.name for schedule in repository.schedule_defs if schedule.default_status.value == "RUNNING"]
    assert sorted(on) == ["notes_nightly", "notes_yearly"]


def test_the_owners_of_a_loop_own_its_assets(make_loop):
    specs = definitions(make_loop(owners=["team:nlp", "rita@example.com"])).resolve_all_asset_specs()
    owners = {tuple(spec.owners) for spec in specs if spec.key.path[-1] in STAGES}
    assert owners == {("team:nlp", "rita@example.com")}
    with pytest.raises(SettingsError, match=r"owners\[0\]"):
        make_loop(owners=["rita"])


def test_a_second_loop_needs_only_a_yaml():
    second = read_loop(PROJECT_ROOT / "examples" / "meeting_notes" / "defs.yaml")
    both = dg.Definitions.merge(definitions(load_loop("aec_parser")), definitions(second))
    keys = set(edges(both.resolve_asset_graph()))
    assert keys == {*STAGES, *(f"meeting_notes/{stage}" for stage in STAGES)}
    groups = {spec.group_name for spec in both.resolve_all_asset_specs()}
    assert groups == {"aec_parser", "meeting_notes"}
    assert {job.name for job in both.get_repository_def().get_all_jobs()} >= {"aec_parser_loop", "meeting_notes_loop"}


def test_dagster_loads_the_yaml_of_the_example():
    text = (PROJECT_ROOT / "examples" / "meeting_notes" / "defs.yaml").read_text()
    component = FineTuneLoop.from_attributes_dict(attributes=yaml.safe_load(text)["attributes"])
    assert component.settings.output_schema is None


def test_keep_champion_makes_the_gain_check_non_blocking(make_loop):
    graph = definitions(make_loop(gate={"on_reject": "keep_champion"})).resolve_asset_graph()
    assert {key.name: graph.get(key).blocking for key in graph.asset_check_keys}["gain"] is False


def test_every_hyperparameter_can_be_set_for_one_run(make_loop):
    config = training_config(make_loop(training={"num_train_epochs": 4}))
    assert set(config.model_fields) == set(TrainingSettings.model_fields) - NOT_IN_THE_LAUNCHPAD
    assert config().num_train_epochs == 4
    assert config(num_train_epochs=1, seed=9).seed == 9


@pytest.mark.parametrize("stage", STAGES)
def test_every_asset_has_a_description(stage):
    specs = {spec.key.path[-1]: spec for spec in defs().resolve_all_asset_specs()}
    assert len(specs[stage].description) > 60


def test_the_scaffolder_writes_the_files_of_init_without_data(tmp_path):
    folder = tmp_path / "tickets"
    folder.mkdir()
    request = dg.ScaffoldRequest("finetune_pipeline.orchestration.FineTuneLoop", folder, "yaml", None, LoopParams())
    LoopScaffolder().scaffold(request)
    loop = read_loop(folder / "defs.yaml")  # paths in the package are relative to the project
    assert loop.name == "tickets" and loop.evaluation.benchmark == str(folder / "benchmark.jsonl")
    assert set(edges(definitions(loop).resolve_asset_graph())) == {f"tickets/{stage}" for stage in STAGES}
    other = init_loop("tickets", tmp_path / "loops", loop.base_model).folder
    differ = [path.name for path in other.rglob("*") if path.is_file() and path.read_bytes() != (
        folder / path.relative_to(other)).read_bytes()]  # fmt: skip
    assert sorted(differ) == ["README.md", "defs.yaml"]
    changed = (folder / "defs.yaml").read_text().splitlines()
    same = [line for line in (other / "defs.yaml").read_text().splitlines() if line in changed]
    assert len(changed) - len(same) == 5  # the schema's path, where paths start, schema, data, benchmark


def test_the_scaffolder_refuses_a_name_that_no_loop_can_have(tmp_path):
    folder = tmp_path / "My Tickets"
    folder.mkdir()
    request = dg.ScaffoldRequest("finetune_pipeline.orchestration.FineTuneLoop", folder, "yaml", None, LoopParams())
    with pytest.raises(click.ClickException, match=r"No loop can be named 'My Tickets': .* my_tickets would do"):
        LoopScaffolder().scaffold(request)
    assert not folder.exists()


def test_a_changed_setting_changes_the_code_version_of_its_asset(make_loop):
    def versions(loop):
        return {spec.key.path[-1]: spec.code_version for spec in definitions(loop).resolve_all_asset_specs()}

    before, after = versions(make_loop()), versions(make_loop(training={"num_train_epochs": 2, "max_length": 128}))
    assert [stage for stage in STAGES if before[stage] != after[stage]] == ["lora_adapter"]


def test_dagster_loads_loops_outside_the_package(make_loop, tmp_path, monkeypatch):
    make_loop()
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "defs"))
    graph = defs().resolve_asset_graph()
    assert set(edges(graph)) == {*STAGES, *(f"notes/{stage}" for stage in STAGES)}
    for key in ("raw_logs", "notes/raw_logs"):  # both link to their YAML in the UI
        (reference,) = graph.get(dg.AssetKey.from_user_string(key)).metadata["dagster/code_references"].code_references
        assert reference.file_path.endswith("defs.yaml")


@pytest.mark.parametrize("key", ["post_processing", "requirements", "template_vars_module"])
def test_keys_that_only_dagster_reads_are_refused_outside_the_package(make_loop, tmp_path, monkeypatch, key):
    make_loop()
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "defs"))
    path = tmp_path / "defs" / "notes" / "defs.yaml"
    path.write_text(path.read_text() + f"{key}: {{}}\n")
    with pytest.raises(SettingsError, match=f"{key}: allowed only in the package's defs/"):
        load_loop("notes")


def code_versions(loop):
    graph = loop_definitions(loop).resolve_asset_graph()
    return {key.path[-1]: graph.get(key).code_version for key in graph.get_all_asset_keys()}


CHANGES = [
    ("curation", {"compute": "ray"}, ""),  # how, not what
    ("evaluation", {"parallel": 2}, ""),
    ("training", {"report_to": ["tensorboard"]}, ""),
    ("curation", {"min_confidence": 0.5}, "curated_dataset"),
    ("training", {"num_train_epochs": 9}, "lora_adapter"),
    ("export", {"quantization": "Q8_0"}, "gguf_model"),
    ("gate", {"min_gain": 0.1}, "eval_report promoted_model"),
    ("system_prompt", "Be short.", "curated_dataset lora_adapter eval_report"),
]


@pytest.mark.parametrize(("setting", "value", "stale"), CHANGES, ids=lambda value: str(value))
def test_a_changed_setting_changes_the_code_versions_of_what_depends_on_it(make_loop, setting, value, stale):
    before = code_versions(make_loop())
    changed = {**ATTRIBUTES.get(setting, {}), **value} if isinstance(value, dict) else value
    after = code_versions(make_loop(**{setting: changed}))
    assert {stage for stage in before if before[stage] != after[stage]} == set(stale.split())


def test_an_edited_benchmark_makes_dataset_and_report_stale(make_loop):
    loop = make_loop()
    before = code_versions(loop)
    path = project_path(loop.evaluation.benchmark)
    path.write_text(path.read_text() + "\n")
    after = code_versions(loop)
    assert {stage for stage in before if before[stage] != after[stage]} == {"curated_dataset", "eval_report"}
