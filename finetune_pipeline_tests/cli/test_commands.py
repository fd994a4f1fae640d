"""The `finetune` command as people type it, in its own home."""

import errno
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from uuid import UUID

import pytest
from click.testing import CliRunner

from finetune_pipeline.artifacts import ArtifactError, hash_file
from finetune_pipeline.cli import doctor as doctor_module
from finetune_pipeline.cli.main import finetune, unwritable_home
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.store import counters, find_interaction
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.manifests import ReportManifest
from finetune_pipeline.pipeline.ask import find_model
from finetune_pipeline.pipeline.source_sync import sync_sources
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.registry.trainings import record_training
from finetune_pipeline.settings import (
    COMPONENT_TYPE,
    PROJECT_ROOT,
    SettingsError,
    TrainingSettings,
    database_url,
    home,
    load_loop,
)
from finetune_pipeline.training.backends.base import Availability
from finetune_pipeline.training.backends.unsloth import Unsloth
from finetune_pipeline_tests.conftest import interaction
from finetune_pipeline_tests.pipeline.test_summary import made
from finetune_pipeline_tests.registry.conftest import promote_over
from finetune_pipeline_tests.registry.test_trainings import training_of

LOOP = "aec_parser"


def run(*arguments, code=0):
    result = CliRunner().invoke(finetune, arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def real(*arguments):
    """The installed command in a separate process."""
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)


@pytest.fixture
def two_versions(own_home):
    """Two promoted models; the second one serves."""
    for number in (1, 2):
        path = own_home / f"model-{number}.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF" + bytes([number]))
        candidate = CandidateModel(
            loop=LOOP, gguf_path=path, gguf_sha256=hash_file(path), base_hash="b", mode="full",
            lineage={"lora_adapter": "abc"}, scores={"accuracy": 0.5 + number / 10}, report_path=path,
        )  # fmt: skip
        promote_over(connect(), candidate, f"gain {number}", "test")


def test_models_are_listed_with_the_one_that_serves(two_versions):
    lines = [" ".join(line.split()) for line in run("model", "list").splitlines()]
    assert lines[1].startswith("* aec_parser@v1.1.0 70.0%")
    assert lines[2].startswith("aec_parser@v1.0.0 60.0%")
    assert lines[3].startswith("aec_parser@base")


def test_a_long_name_is_not_wrapped_in_the_list(two_versions, monkeypatch):
    name = "a_loop_with_a_name_" * 5
    monkeypatch.setattr(
        "finetune_pipeline.cli.options.the_loop", lambda _: load_loop(LOOP).model_copy(update={"name": name})
    )
    assert f"{name}@base" in run("model", "list", "--loop", name)


def test_a_version_can_be_shown_switched_to_and_rolled_back_from(two_versions):
    assert "lora_adapter: abc" in run("model", "show", "v1.0.0")
    assert run("model", "switch", "v1.0.0") == "aec_parser@v1.0.0 is the champion now\n"
    assert run("model", "rollback") == "aec_parser@v1.1.0 is the champion again\n"
    assert run("model", "rollback") == "aec_parser@v1.0.0 is the champion again\n"
    assert run("model", "rollback") == "aec_parser@base is the champion again\n"
    shown = run("model", "history")
    assert [shown.count(action) for action in ("promote", "switch", "rollback")] == [2, 2, 3]


def test_an_error_is_a_line_that_says_what_to_do_and_no_traceback(two_versions):
    result = real("model", "switch", "v9.9.9")
    assert result.returncode == 1
    assert "no version 'v9.9.9'; there are: v1.1.0, v1.0.0" in result.stderr
    assert "Traceback" not in result.stderr
    unknown = real("status", "--loop", "nobody")
    assert unknown.returncode == 1 and "are: aec_parser." in unknown.stderr


def test_status_says_what_the_sensor_says(own_home):
    before = run("status")
    assert "0 new high-reward examples, 50 needed" in before
    assert "event files to ingest; run `finetune ingest`" in before
    assert "interactions and" in run("ingest")
    assert run("ingest").startswith("no new file in ")
    after = run("status")
    assert "unread" not in after
    count = int(after.split("trigger")[1].split()[0])
    assert count >= 50
    assert "champion  the base model" in after


@pytest.fixture
def second_loop(tmp_path, monkeypatch):
    """Declare the loop `notes` next to the default one, without a default for --loop; return its name."""
    folder = tmp_path / "loops"
    for name in ("notes", "mails"):
        (folder / name).mkdir(parents=True)
        settings = (
            f"attributes: {{name: {name}, base_model: some/model, evaluation: {{benchmark: b.jsonl, metric: rouge1}}}}"
        )
        (folder / name / "defs.yaml").write_text(f"type: {COMPONENT_TYPE}\n{settings}\n")
        (folder / name / "b.jsonl").write_text('{"id": "q", "slice": "s", "prompt": "why", "expected": "so"}\n')
    monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(folder))
    return "notes"


def test_status_covers_all_loops_and_names_the_home(own_home, second_loop):
    said = run("status")
    assert said.startswith(f"home {own_home}\n")
    assert [line for line in said.splitlines() if line.startswith("loop ")] == [
        "loop mails", "loop notes", "loop aec_parser"
    ]  # fmt: skip
    assert "run `finetune ingest --loop aec_parser`" in said
    assert "loop notes" in run("status", "--loop", second_loop) and "loop mails" not in run("status", "--loop", "notes")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("ask", " "), "PROMPT is empty"), (("feedback", "erase", "--user", "", "--yes"), "--user is empty")],
)
def test_an_empty_argument_is_refused(arguments, said):
    assert said in run(*arguments, code=2)


def test_a_broken_loop_does_not_hide_the_others(second_loop, tmp_path):
    (tmp_path / "loops" / "mails" / "b.jsonl").write_text("{}\n")
    said = run("status", code=1)
    assert "loop aec_parser" in said and "loop notes" in said
    assert re.search(r"Error: 1 loop cannot be read:\n  mails: .*b\.jsonl, line 1", said)


def test_an_id_or_a_version_says_which_loop_is_meant(second_loop):
    run("feedback", "log", "--prompt", "p", "--output", "o", code=1)  # no loop is given
    logged = run("feedback", "log", "--prompt", "p", "--output", "o", "--loop", second_loop).strip()
    run("feedback", "correct", logged, "better")
    assert "1 interaction, 1 feedback event" in run("status", "--loop", second_loop)
    assert run("model", "show", "notes@base") == "notes@base: the base model some/model\n"
    refused = real("model", "switch", "notes@base", "--loop", "mails")
    assert "notes@base is a model of notes, and --loop is mails" in refused.stderr


@pytest.mark.parametrize(("count", "said"), [(1, "1 more does not count"), (2, "2 more do not count")])
def test_status_counts_what_does_not_count_in_good_grammar(own_home, second_loop, count, said):
    for _ in range(count + 1):
        logged = run("feedback", "log", "--loop", second_loop, "--prompt", "one prompt", "--output", "o").strip()
        run("feedback", "correct", logged, "a better answer")
    assert f"{said}: same prompt as another new example" in run("status", "--loop", second_loop)


def test_status_counts_the_rows_of_file_sources_that_were_not_read(own_home, second_loop, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"question {n}", "completion": "so"}) for n in range(3)]
    rows.write_text("\n".join([*lines, lines[0], "broken"]) + "\n")
    path = tmp_path / "loops" / "notes" / "defs.yaml"
    path.write_text(path.read_text().rstrip("}\n") + "}, sources: [{kind: files, name: rows, path: " + f"{rows}}}]}}\n")
    assert f"unread    4 rows in {rows} are read at the next run\n" in run("status", "--loop", "notes")
    sync_sources(load_loop("notes"), connect(), print)
    assert "unread" not in run("status", "--loop", "notes")
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "a new one", "completion": "so"}) + "\n")
    assert f"unread    1 row in {rows} is read at the next run\n" in run("status", "--loop", "notes")
    rows.unlink()
    assert "unread" not in run("status", "--loop", "notes")


def test_status_says_why_new_examples_do_not_count_and_what_would_start_a_run(own_home):
    run("ingest")
    said = run("status")
    assert re.search(r"trigger +265 new high-reward examples, 50 needed; the sensor would start a run now\n", said)
    assert re.search(r"\d+ more do not count: reward below 0\.3\n", said)
    assert "started by hand (`finetune run`): sensor and schedules are off" in said
    state = json.loads(run("status", "--json"))
    assert state["home"] == str(own_home)
    (loop,) = state["loops"]
    assert loop["new_examples"] == 265 and loop["not_counted"]["reward below 0.3"] > 0
    assert set(loop["switched_on"].values()) == {False} and loop["daemon"] is False


def test_finished_training_runs_are_listed_and_shown(own_home):
    assert "no training of loop aec_parser has finished" in run("train", "list")
    for number in (1, 2):
        moment = datetime(2026, 1, number, tzinfo=UTC)
        record_training(connect(), training_of(id=f"a{number}", loop=LOOP, created_at=moment))
    lines = run("train", "list").splitlines()
    assert [line.split()[0] for line in lines] == ["adapter", "a2", "a1"]
    assert "1.500 -> 0.250" in lines[1]
    assert run("train", "show").startswith("a2\n")
    assert json.loads(run("train", "show", "a1", "--json"))["steps"] == 40
    with pytest.raises(SettingsError, match="has no adapter a9: its adapters are: a2, a1"):
        CliRunner().invoke(finetune, ["train", "show", "a9"], catch_exceptions=False)


@pytest.mark.usefixtures("kept_base_checks")
@pytest.mark.parametrize(
    "arguments", [("status",), ("model", "list"), ("model", "show"), ("model", "history"), ("key", "list"),
                  ("train", "list"), ("train", "plan"), ("check",), ("model", "gc", "--dry-run")]
)  # fmt: skip
def test_what_lists_or_shows_prints_json_too(two_versions, arguments):
    json.loads(run(*arguments, "--json"))


def test_the_newest_report_is_named(own_home):
    with pytest.raises(ArtifactError, match=r"loop aec_parser has no report yet; `finetune run` makes one"):
        CliRunner().invoke(finetune, ["report"], catch_exceptions=False)
    path = made("r1", ReportManifest, loop=LOOP, decision="reject") / "report.html"
    assert run("report") == f"reject: gain 50.0%, 5% needed\n{path}\n"
    assert json.loads(run("report", "--json"))["html"] == str(path)


@pytest.mark.parametrize(("used", "folder"), [(False, "."), (True, "demo")])
def test_the_demo_takes_the_home_if_it_is_empty(own_home, monkeypatch, used, folder):
    homes = []
    monkeypatch.setattr("finetune_pipeline.cli.run.run_job", lambda *_, **__: homes.append(home()) or 1)
    run("status")  # which leaves a database and Dagster's storage
    if used:
        run("feedback", "log", "--prompt", "p", "--output", "o")
    run("demo", code=1)
    assert homes == [(own_home / folder).resolve()]


def test_the_demo_leaves_another_database_alone(own_home, monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_DATABASE_URL", f"sqlite:///{tmp_path}/team.db")
    urls = []
    monkeypatch.setattr("finetune_pipeline.cli.run.run_job", lambda *_, **__: urls.append(database_url()) or 1)
    run("demo", code=1)
    assert urls == [f"sqlite:///{own_home / 'demo' / 'finetune.db'}"]


def test_a_single_file_can_be_taken_in(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(interaction("a").model_copy(update={"loop": LOOP}).model_dump_json() + "\nbroken\n")
    said = run("ingest", str(path))
    assert "1 file: 1 interaction and 0 feedback events added, 0 duplicates, 1 line rejected" in said
    assert f"{path}:2: not JSON" in said
    found = json.loads(run("ingest", "--problems", "--json"))
    assert [(row["path"], row["line"]) for row in found["rejected_lines"]] == [(str(path), 2)]
    assert "--json needs --problems" in run("ingest", "--json", code=2)
    assert run("ingest", str(path)) == f"{path}: unchanged since it was read\n"
    with path.open("a") as file:
        file.write('{"prompt": "a wall')
    assert f"{path}: its last line is incomplete (18 bytes)" in run("ingest", str(path))


@pytest.mark.parametrize("count", [10, 11, 1_500])
def test_rejected_lines_beyond_the_listed_ones_are_counted(tmp_path, count):
    path = tmp_path / "events.jsonl"
    path.write_text("broken\n" * count)
    said = run("feedback", "import", str(path), code=1)
    listed = said.count(f"  {path}:")
    assert (listed, f"and {count - listed:,} more" in said) == (listed, count > listed)


@pytest.mark.parametrize(
    ("lines", "listed"),
    [
        (["broken"] * 3, ["1: not JSON: Expecting value: line 1 column 1 (char 0) (and 2 more lines)"]),
        (["{}", "broken", "[]", "[]"], ["3: ", "1: ", "2: "]),
        ([json.dumps({f"field {n}": ""}) for n in range(12)], [*"123456789", "10", "and 2 more reasons"]),
    ],
)
def test_ingest_prints_each_reason_once(tmp_path, lines, listed):
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(lines) + "\n")
    said = [line for line in run("ingest", str(path), code=1).splitlines() if line.startswith("  ")]
    expected = [f"  {part if part.startswith('and') else f'{path}:{part}'}" for part in listed]
    assert [line[: len(start)] for line, start in zip(said, expected, strict=True)] == expected


def test_the_reasons_of_files_in_the_folders_are_printed_once(own_home):
    inbox = own_home / "inbox" / LOOP
    inbox.mkdir(parents=True)
    (inbox / "events.jsonl").write_text("broken\n" * 3)
    said = run("ingest")
    assert said.count("not JSON") == 1 and "`finetune ingest --problems` lists them" in said


def test_a_file_of_another_loop_says_how_it_is_ingested(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(interaction("a").model_copy(update={"loop": "other"}).model_dump_json() + "\n")
    assert "belongs to loop 'other', but this file is read for 'aec_parser'; name that loop with --loop" in run(
        "ingest", str(path), code=1
    )


def test_only_lines_of_this_call_are_listed(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("broken\n" * 12)
    run("ingest", str(path), code=1)
    with path.open("a") as file:
        file.write("broken too\n")
    said = run("ingest", str(path), code=1)
    assert f"  {path}:13: not JSON" in said and "more" not in said and f"{path}:1:" not in said


def test_a_table_without_its_name_is_told_to_be_named_as_one(tmp_path):
    path = tmp_path / "answers.txt"
    path.write_text("prompt,completion\np,c\n")
    assert "if answers.txt is CSV, rename it to answers.csv" in run("ingest", str(path), code=1)
    path.rename(tmp_path / "answers.csv")
    assert "1 interaction and" in run("ingest", str(tmp_path / "answers.csv"))


def test_ask_takes_a_pairs_base_and_adapter(two_versions, own_home):
    base, adapter = own_home / "model-1.gguf", own_home / "adapter.gguf"
    adapter.write_bytes(b"GGUF adapter")
    pair = CandidateModel(
        loop=LOOP, gguf_path=base, gguf_sha256=hash_file(base), adapter_path=adapter, adapter_sha256=hash_file(adapter),
        base_hash="b", mode="full", lineage={}, scores={}, report_path=base,
    )  # fmt: skip
    promote_over(connect(), pair, "gain 3", "test")
    assert find_model(load_loop(LOOP), "champion", print) == (f"{LOOP}@v1.2.0", ModelSpec(gguf=base, adapter=adapter))
    assert find_model(load_loop(LOOP), "previous", print) == (
        f"{LOOP}@v1.1.0",
        ModelSpec(gguf=own_home / "model-2.gguf"),
    )


def test_ask_answers_with_the_base_model_while_there_is_no_champion():
    asked = CliRunner().invoke(finetune, ["ask", "200 mm concrete wall", "--user", "ann"])
    answer = asked.stdout.splitlines()[-1]
    assert answer.startswith("{") and '"concrete"' in answer
    id = asked.stderr.rsplit("recorded as ", 1)[1].strip()
    with connect().read() as connection:
        logged = find_interaction(connection, UUID(id)).interaction
    assert (logged.prompt, logged.output, logged.user) == ("200 mm concrete wall", answer, "ann")
    assert (logged.model, logged.variant) == (f"{LOOP}@base", "ask") and logged.confidence is not None
    assert "recorded" not in run("ask", "200 mm concrete wall", "--no-record")
    with connect().read() as connection:
        assert counters(connection, LOOP)["interactions"] == 1


def compared(monkeypatch, *arguments):
    """Return the lines of a comparison, without running a model."""
    monkeypatch.setattr("finetune_pipeline.pipeline.ask.generate_answers", lambda *_: ["an answer"])
    monkeypatch.setattr("finetune_pipeline.export.base_gguf.base_gguf", lambda *_: home() / "base.gguf")
    return run("ask", "a wall", "--compare", *arguments).splitlines()[2:]


def test_a_comparison_without_a_champion_prints_the_base_once(monkeypatch):
    lines = compared(monkeypatch)
    assert [line.split()[0] for line in lines] == [f"{LOOP}@base", "the"]
    assert lines[1] == "  the champion is the base model; see `finetune status`"
    assert "name another with --model" in compared(monkeypatch, "--model", "base")[1]


@pytest.mark.parametrize(("name", "shown"), [("champion", "v1.1.0"), ("previous", "v1.0.0"), ("v1.0.0", "v1.0.0")])
def test_a_comparison_is_of_the_base_and_the_named_model(two_versions, monkeypatch, name, shown):
    lines = compared(monkeypatch, "--model", name)
    assert [line.split()[0] for line in lines] == [f"{LOOP}@base", f"{LOOP}@{shown}"]


def test_doctor_finds_this_machine_able():
    said = run("doctor")
    names = [
        "python",
        "C++ compiler",
        "llama.cpp, quantized",
        "GGUF converter",
        "GPU",
        "training: peft",
        f"room for {LOOP}",
    ]
    assert [name for name in names if name not in said] == []
    assert "FAIL" not in said


def test_doctor_points_to_wsl_on_windows(monkeypatch):
    monkeypatch.setattr(doctor_module.platform, "system", lambda: "Windows")
    (system, *_) = doctor_module._system()
    assert not system.works and "WSL" in system.remedy


def test_doctor_says_what_to_do_without_a_converter(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", str(tmp_path))
    said = run("doctor", code=1)
    assert "FAIL      GGUF converter" in said and "make setup" in said


def test_the_default_loop_reads_files_that_are_there():
    loop = load_loop(LOOP)
    names = [loop.output_schema, loop.evaluation.benchmark, loop.evaluation.compliance, loop.curation.replay]
    assert [name for name in names if not (PROJECT_ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "unsloth"}, "unsloth cannot run here"),
        ({"base_model": "../nowhere/model"}, "nowhere/model does not exist; correct it"),
        ({"base_model": "docs"}, "docs has no config.json"),
        ({"compute": "ray"}, "Ray is not installed"),
        ({"report_to": ("wandb",)}, "names wandb, which is not installed"),
        ({"per_device_train_batch_size": 24, "num_processes": 5}, "cannot be split evenly across 5 processes"),
        ({"method": "kto", "per_device_train_batch_size": 1}, "needs 2 or more on each device, not 1"),
        ({"trainable_token_indices": (5, 999_999)}, "names 999999, but the base model's tokens"),
        ({"preset": "8gb", "per_device_train_batch_size": 512, "max_length": 65_536}, "does not fit preset 8gb"),
    ],
)
def test_what_would_let_the_training_fail_is_said_before_anything_runs(monkeypatch, changes, said):
    loop = load_loop(LOOP)
    if "base_model" not in changes:
        changes = {"training": loop.training.model_copy(update=changes)}
    monkeypatch.setattr("finetune_pipeline.settings.load_loops", lambda: {LOOP: loop.model_copy(update=changes)})
    monkeypatch.setattr(Unsloth, "check", lambda self: Availability("unsloth", False, "no GPU", "take another"))
    absent, find = {"ray", "wandb"}, importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in absent else find(name, *of))
    monkeypatch.setattr("finetune_pipeline.cli.run.run_job", lambda *_, **__: pytest.fail("it ran"))
    assert said in run("run", code=1)
    assert said in run("check", code=1)


def test_the_weights_of_a_base_model_are_downloaded_only_when_the_settings_will_do(tmp_path, monkeypatch):
    loop = load_loop(LOOP)
    training = loop.training.model_copy(update={"num_processes": 5})
    changed = loop.model_copy(update={"base_model": "some-one/some-model", "training": training})
    monkeypatch.setattr("finetune_pipeline.settings.load_loops", lambda: {LOOP: changed})
    wanted = []

    def download(name, allow_patterns):
        wanted.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("finetune_pipeline.cli.run.run_job", lambda *_, **__: pytest.fail("it ran"))
    assert "cannot be split evenly across 5 processes" in run("run", code=1)
    assert "config.json" in wanted and not [name for name in wanted if "safetensors" in name]


@pytest.mark.usefixtures("kept_base_checks")
def test_a_plan_says_what_fits_how_it_was_estimated_and_what_to_write():
    output = run("train", "plan", "--base", "meta-llama/Llama-3.1-8B-Instruct", "--vram", "12")
    assert "8.03 billion parameters" in output and " fits " in output and " no " in output
    expected = ["x 0.516 B (NF4)", "assumed, not measured", "  adapter: qlora", "  max_length: 1024"]
    assert [said for said in expected if said not in output] == []
    here = run("train", "plan", "--examples", "100")  # there is one loop
    assert "matrix products reach here (measured" in here
    assert "examples: 100 (--examples)" in here
    assert all(stage in here for stage in ("  training", "  merge", "  F16", "  quantization", "  serving"))
    assert "that suffices: " in here and "stages of a run" not in output  # which has no loop
    assert "  per_device_train_batch_size: 24" in here  # the loop's own


@pytest.mark.slow
@pytest.mark.usefixtures("kept_base_checks")
def test_a_plan_for_a_base_model_that_cannot_be_served_says_why(tmp_path):
    shutil.copytree(PROJECT_ROOT / "data" / "starter_model", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    done = real("train", "plan", "--base", str(tmp_path / "base"), "--vram", "8")
    assert done.returncode == 1 and done.stdout == ""
    assert "cannot be trained and served:" in done.stderr and "writes nothing after an answer" in done.stderr


@pytest.mark.usefixtures("kept_base_checks")
def test_a_plan_is_for_the_loops_preset_unless_another_memory_is_named(monkeypatch):
    loop = load_loop("aec_parser")
    loop = loop.model_copy(update={"training": TrainingSettings(preset="24gb")})
    monkeypatch.setattr("finetune_pipeline.cli.train.the_loop", lambda _: loop)
    assert "usable memory: 22.8 GiB (GPU)" in run("train", "plan", "--loop", "aec_parser")
    assert "usable memory: 22.8 GiB (GPU)" in run("train", "plan", "--loop", "aec_parser", "--length", "256")
    assert "usable memory: 7.6 GiB (GPU)" in run("train", "plan", "--loop", "aec_parser", "--vram", "8")
    assert "usable memory: 76.0 GiB (GPU)" in run("train", "plan", "--loop", "aec_parser", "--preset", "80gb")


@pytest.mark.parametrize("size", ["nan", "inf", "-inf", "0", "-4"])
def test_a_memory_size_that_is_none_is_refused(size):
    result = CliRunner().invoke(finetune, ["train", "plan", "--base", "mistralai/Mistral-7B-v0.3", "--vram", size])
    assert result.exit_code != 0
    assert "--vram" in f"{result.output}{result.exception}"
    assert "Traceback" not in result.output and "usable memory" not in result.output


@pytest.mark.usefixtures("kept_base_checks")
def test_a_plan_of_what_does_not_fit_says_what_it_takes_at_least_and_what_to_change():
    def refusal(*arguments):
        result = CliRunner().invoke(finetune, ["train", "plan", *arguments])
        assert result.exit_code != 0
        return str(result.exception)

    large = refusal("--base", "meta-llama/Llama-3.3-70B-Instruct", "--vram", "24")
    assert "does not fit 24 GB: with qlora, per_device_train_batch_size 1 and 256 tokens" in large
    assert "the smallest preset for it is 80gb, or use a smaller base_model" in large
    long = refusal("--base", "mistralai/Mistral-7B-v0.3", "--vram", "8", "--length", "65536")
    assert "and 65536 tokens" in long and "leave max_length unset" in long


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system", "{home}/logs"), "{home}/logs cannot be used (Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "{home}"), "set FINETUNE_HOME to a folder that is"),
        (OSError(errno.ENOSPC, "No space left on device", "{home}/logs/a.log"), "the disk is full: {home}/logs/a.log"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: {home} could not be written"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere"), None),
    ],
)
def test_a_home_that_cannot_be_written_is_a_sentence(error, said):
    if error.filename:
        error.filename = error.filename.format(home=home())
    found = unwritable_home(error)
    assert found is None if said is None else said.format(home=home()) in found


@pytest.mark.parametrize("command", [["demo"], ["ingest"]])
def test_no_command_ends_with_a_traceback_if_the_home_cannot_be_created(tmp_path, monkeypatch, command):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "file" / "home"))
    done = real(*command)
    assert done.returncode == 1
    assert re.search(r"Error: .*set FINETUNE_HOME to a", done.stderr) and "Traceback" not in done.stderr
