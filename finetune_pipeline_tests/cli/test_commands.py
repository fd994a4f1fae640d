"""The `finetune` command as people type it, in its own home."""

import importlib.util
import subprocess
import sys

import pytest
from click.testing import CliRunner

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.cli import doctor as doctor_module
from finetune_pipeline.cli.ask import find_model
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings, home, load_loop
from finetune_pipeline.training.backends.base import Availability
from finetune_pipeline.training.backends.unsloth import Unsloth
from finetune_pipeline_tests.conftest import interaction
from finetune_pipeline_tests.registry.conftest import promote_over

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
        "finetune_pipeline.cli.options.load_loop", lambda _: load_loop(LOOP).model_copy(update={"name": name})
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


def test_a_single_file_can_be_taken_in(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(interaction("a").model_copy(update={"loop": LOOP}).model_dump_json() + "\nbroken\n")
    said = run("ingest", str(path))
    assert "1 file: 1 interaction and 0 feedback events added, 0 duplicates, 1 line rejected" in said
    assert f"{path}:2: not JSON" in said
    assert run("ingest", str(path)) == f"{path}: unchanged since it was read\n"
    with path.open("a") as file:
        file.write('{"prompt": "a wall')
    assert f"{path}: its last line is incomplete (18 bytes)" in run("ingest", str(path))


@pytest.mark.parametrize(("count", "more"), [(10, None), (11, "and 1 more"), (1_500, "and 1,490 more")])
def test_rejected_lines_beyond_the_listed_ones_are_counted(tmp_path, count, more):
    path = tmp_path / "events.jsonl"
    path.write_text("broken\n" * count)
    for arguments in (("ingest", str(path)), ("feedback", "import", str(path))):
        said = run(*arguments, code=1)
        listed = said.count(": not JSON")
        assert (listed, f"and {count - listed:,} more" in said) == (listed, count > listed)
    assert more is None or more in run("ingest", "--format", "events", str(path), code=1)


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
    assert find_model(load_loop(LOOP), "champion") == (f"{LOOP}@v1.2.0", ModelSpec(gguf=base, adapter=adapter))
    assert find_model(load_loop(LOOP), "previous") == (f"{LOOP}@v1.1.0", ModelSpec(gguf=own_home / "model-2.gguf"))


def test_ask_answers_with_the_base_model_while_there_is_no_champion():
    answer = run("ask", "200 mm concrete wall").splitlines()[-1]
    assert answer.startswith("{") and '"concrete"' in answer


def compared(monkeypatch, *arguments):
    """Return the lines of a comparison, without running a model."""
    monkeypatch.setattr("finetune_pipeline.cli.ask.generate_answers", lambda *_: ["an answer"])
    monkeypatch.setattr("finetune_pipeline.export.base_gguf.base_gguf", lambda *_: home() / "base.gguf")
    return run("ask", "a wall", "--compare", *arguments).splitlines()[2:]


def test_a_comparison_without_a_champion_prints_the_base_once(monkeypatch):
    lines = compared(monkeypatch)
    assert [line.split()[0] for line in lines] == [f"{LOOP}@base", "no"]
    assert lines[1] == f"  no champion yet: `finetune run --loop {LOOP}` trains one"
    assert "name another with --model" in compared(monkeypatch, "--model", "base")[1]


def test_a_comparison_is_of_the_base_and_the_named_model(two_versions, monkeypatch):
    for name, shown in (("champion", "v1.1.0"), ("previous", "v1.0.0"), ("v1.0.0", "v1.0.0")):
        lines = compared(monkeypatch, "--model", name)
        assert [line.split()[0] for line in lines] == [f"{LOOP}@base", f"{LOOP}@{shown}"]


def test_doctor_finds_this_machine_able():
    said = run("doctor")
    for name in ("python", "C++ compiler", "llama.cpp, quantized", "GGUF converter", "GPU", "training: peft"):
        assert name in said
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
    for name in (loop.output_schema, loop.evaluation.benchmark, loop.evaluation.compliance, loop.curation.replay):
        assert (PROJECT_ROOT / name).is_file()


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
    monkeypatch.setattr("finetune_pipeline.cli.options.load_loops", lambda: {LOOP: loop.model_copy(update=changes)})
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
    monkeypatch.setattr("finetune_pipeline.cli.options.load_loops", lambda: {LOOP: changed})
    wanted = []

    def download(name, allow_patterns):
        wanted.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("finetune_pipeline.cli.run.run_job", lambda *_, **__: pytest.fail("it ran"))
    assert "cannot be split evenly across 5 processes" in run("run", code=1)
    assert "config.json" in wanted and not [name for name in wanted if "safetensors" in name]


def test_a_plan_says_what_fits_how_it_was_estimated_and_what_to_write():
    output = run("train", "plan", "--base", "meta-llama/Llama-3.1-8B-Instruct", "--vram", "12")
    assert "8.03 billion parameters" in output and " fits " in output and " no " in output
    for said in ("x 0.516 B (NF4)", "assumed, not measured", "  adapter: qlora", "  max_length: 1024"):
        assert said in output
    here = run("train", "plan", "--examples", "100")  # there is one loop
    assert "matrix products reach here (measured)" in here
    assert "  per_device_train_batch_size: 24" in here  # the loop's own


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
