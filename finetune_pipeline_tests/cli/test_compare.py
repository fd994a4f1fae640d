"""`finetune compare`, with engines that answer from a dictionary and a real HTTP server."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune_pipeline.artifacts import ArtifactError, draft, hash_file, publish, stage_folder
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.benchmark import load_benchmark
from finetune_pipeline.evaluation.comparison import ComparisonError
from finetune_pipeline.evaluation.performance import WAVES
from finetune_pipeline.evaluation.regression import RegressionSuite, SuiteAnswer
from finetune_pipeline.evaluation.run import EndpointRunManifest, compare_models
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.inference.errors import UpstreamFailed
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.manifests import AdapterManifest, GgufManifest
from finetune_pipeline.pipeline import compare as compare_module
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.comparisons import judged_watermark, list_comparisons, list_manual_comparisons
from finetune_pipeline.registry.model_versions import CandidateModel, RegistryError
from finetune_pipeline.settings import LoopSettings, SettingsError
from finetune_pipeline_tests.evaluation.fakes import SCHEMA, WALL, FakeEngines, line, question, write_benchmark
from finetune_pipeline_tests.evaluation.test_judge import endpoint
from finetune_pipeline_tests.evaluation.test_judge import settings as judge_settings
from finetune_pipeline_tests.inference.test_remote import chunk, fake_upstream, sse
from finetune_pipeline_tests.registry.conftest import promote_over

LOOP = "aec_parser"
LINES = [line(f"w{number}", slice="walls" if number < 4 else "doors") for number in range(6)]


def gguf(path: Path, knows: int) -> Path:
    """Write a fake model that answers the first questions correctly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({str(one["prompt"]): json.dumps(WALL) for one in LINES[:knows]}))
    return path


@pytest.fixture
def engines(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngines:
    """A loop with six questions, a base model that knows two of them, and two versions that know three and five."""
    found = FakeEngines()
    benchmark = load_benchmark(write_benchmark(own_home.parent / "b.jsonl", LINES), SCHEMA)
    monkeypatch.setattr(compare_module, "compare_models", partial(compare_models, open_engine=found))
    monkeypatch.setattr(compare_module, "base_gguf", lambda loop, log: gguf(own_home / "base.gguf", 2))
    monkeypatch.setattr(loop_files, "benchmark", lambda loop: benchmark)
    monkeypatch.setattr(loop_files, "scorer", lambda loop: Scorer("parameters", SCHEMA))
    monkeypatch.setattr(loop_files, "constraint", lambda loop: None)
    monkeypatch.setattr(loop_files, "rules", lambda loop: ())
    for number, knows in enumerate((3, 5)):
        path = gguf(own_home / f"model-{number}.gguf", knows)
        candidate = CandidateModel(
            loop=LOOP, gguf_path=path, gguf_sha256=hash_file(path), base_hash="b", mode="full",
            lineage={AdapterManifest.stage: "gone"}, scores={}, report_path=own_home / "r" / "report.html",
        )  # fmt: skip
        promote_over(connect(), candidate)
    return found


def run(*arguments: str, code: int = 0, columns: int = 80) -> str:
    result = CliRunner().invoke(finetune, ["compare", *arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def error_of(*arguments: str) -> Exception:
    result = CliRunner().invoke(finetune, ["compare", *arguments])
    assert isinstance(result.exception, Exception)
    return result.exception


def test_a_challenger_is_compared_by_its_hash(engines: FakeEngines) -> None:
    with draft(LOOP, "gguf_model", "f" * 16) as folder:
        sha256 = hash_file(gguf(folder / "model.gguf", 6))
        fields = {
            "loop": LOOP, "version": "f" * 16, "inputs": {}, "settings": {}, "packages": {}, "gguf": "model.gguf",
            "quantization": "F16", "base_model": "b", "base_hash": "b", "adapter_version": "a", "mode": "full",
            "watermark": 1,
        }  # fmt: skip
        publish(folder, GgufManifest, fields)
    assert "B against A: 1 won, 0 lost, 5 tied" in run("champion", f"{LOOP}@{sha256[:8]}")
    [recorded] = list_manual_comparisons(connect(), LOOP)
    assert (recorded.second, recorded.second_sha256) == (f"{LOOP}@{sha256[:16]}", sha256)
    assert "has no challenger" in str(error_of("champion", "abcdef0"))


def test_two_versions_are_compared_and_recorded_and_nothing_else_changes(engines: FakeEngines) -> None:
    before, judged = champion(connect(), LOOP), list_comparisons(connect(), LOOP)
    output = run(f"{LOOP}@v1.0.0", f"{LOOP}@champion")
    assert "B against A: 2 won, 0 lost, 4 tied" in output
    assert re.search(r"parameter accuracy +33\.3% +50\.0% +83\.3% +\+33\.3 points", output)
    slices = "slices: no slice lost significantly more than 5 points; too small to tell: doors, walls"
    assert slices in " ".join(output.split())
    assert re.search(r"\nbenchmark  [0-9a-f]{64}\nbase +[0-9a-f]{64}\nA +[0-9a-f]{64}\nB +[0-9a-f]{64}\n", output)
    assert "6 questions find gains from about" in output and "regression suite" not in output
    assert re.search(r"doors \(2\) +0\.0% +0\.0% +50\.0% +\+50\.0 points", output)
    assert "changed answers: 2 wrong to correct" in output and "training: not measured" not in output
    [kept] = list_manual_comparisons(connect(), LOOP)
    assert (kept.first, kept.second) == (f"{LOOP}@v1.0.0", f"{LOOP}@v1.1.0")
    assert (kept.wins, kept.losses, kept.ties) == (2, 0, 4)
    assert kept.report_path.is_file() and str(kept.report_path) in output
    assert (champion(connect(), LOOP), list_comparisons(connect(), LOOP)) == (before, judged)
    assert judged_watermark(connect(), LOOP) == max(one.watermark for one in judged)
    asked = len(engines.asked)
    run("v1.1.0", "v1.0.0")
    assert len(engines.asked) - asked == 3 * (6 + 2 + 1 + WAVES * 8)  # only timed: the answers are reused by hash


def test_questions_without_an_expected_answer_and_few_questions_are_shown(
    engines: FakeEngines, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [{"id": f"o{n}", "slice": "walls", "prompt": f"Which wall, {n}?"} for n in range(3)]
    few = load_benchmark(write_benchmark(own_home.parent / "few.jsonl", [*LINES[2:5], *free]), SCHEMA)
    monkeypatch.setattr(loop_files, "benchmark", lambda loop: few)
    output = run("v1.0.0", "v1.1.0", "--questions", "2", columns=200)
    assert (
        "3 questions can decide nothing: even 3 won and none lost would give p = 0.12; at least 5 are needed" in output
    )
    assert "questions without an expected answer, for people to compare: 3" in output
    shown = output[output.index("\no0: Which wall, 0?") :]
    assert re.match(r"\no0: .*\n  base +I do not know\n  A +I do not know\n  B +I do not know\n", shown)
    assert "\no1: " in shown and "\no2: " not in shown and "and 1 more in the report" in shown


def test_the_regression_suite_is_asked_but_never_over_the_network(
    engines: FakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = RegressionSuite(1, (SuiteAnswer(question("yes"), "yes", True, "no", False),))
    asked: list[list[str]] = []

    def ask(loop: LoopSettings, *specs: ModelSpec, **_: Any) -> RegressionSuite:
        asked.append([spec.gguf.name for spec in specs])
        return suite

    monkeypatch.setattr(compare_module, "ask_suite", lambda loop, a, b, scorer, progress: ask(loop, a, b))
    output = " ".join(run("v1.0.0", "v1.1.0").split())
    assert asked == [["model-0.gguf", "model-1.gguf"]]
    assert "A as the champion and B as the challenger: 1 of 1 fixed correction broken, 10% tolerated" in output
    with fake_upstream(sse(chunk(json.dumps(WALL)), chunk(finish="stop"))) as (_, settings):
        assert "regression suite" not in run("champion", f"{settings.url}#big-model")
    assert len(asked) == 1


def test_the_base_model_is_one_column(engines: FakeEngines) -> None:
    data = json.loads(run("base", "champion", "--json"))
    assert (data["base"], data["champion"]["name"]) == (None, f"{LOOP}@base")
    assert (data["wins"], data["losses"], data["ties"]) == (3, 0, 3)
    assert Path(data["html"]).is_file() and "questions" not in data and "verdict" not in data


def test_a_gguf_file_is_compared(engines: FakeEngines, tmp_path: Path) -> None:
    path = gguf(tmp_path / "other model.gguf", 6)
    assert json.loads(run("champion", str(path), "--json"))["challenger"]["name"] == "other model.gguf"


def test_a_judge_is_shown_with_its_agreement(engines: FakeEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint(lambda a, b: "A" if a > b else "B") as server:
        metric = judge_settings(server)
        for scorer in (Scorer("parameters", SCHEMA, (), [metric]), Scorer(metric, SCHEMA)):
            monkeypatch.setattr(loop_files, "scorer", lambda loop, made=scorer: made)
            output = run("v1.0.0", "v1.1.0", columns=300)
            assert "judge: 2 wins, 0 losses, 4 ties, set aside 0" in output
            assert "its agreement with people is unknown" in output  # which only a gate would refuse


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_tables_fit_the_terminal(engines: FakeEngines, columns: int) -> None:
    lines = run("v1.0.0", "v1.1.0", columns=columns).partition("\nbenchmark  ")[0].splitlines()  # hashes are whole
    assert max(map(len, lines)) <= columns
    assert any("+33.3" in text for text in lines)


def test_a_server_is_asked_each_time_and_its_answers_are_kept(engines: FakeEngines) -> None:
    body = sse(chunk(json.dumps(WALL)), chunk(finish="stop"))
    with fake_upstream(body) as (server, settings):
        named = f"{settings.url}#big-model"
        first = run("champion", named)
        run("champion", named)
        assert len(server.asked) == 2 * 6
        assert {request["model"] for request in server.asked} == {"big-model"}
    assert f"{settings.url}, model big-model, asked 20" in first
    runs = [path for path in stage_folder(LOOP, EndpointRunManifest.stage).iterdir() if path.is_dir()]
    assert len(runs) == 2
    manifest = json.loads((runs[0] / "manifest.json").read_text())
    assert (manifest["url"], manifest["model"], manifest["questions"]) == (settings.url, "big-model", 6)
    kept = list_manual_comparisons(connect(), LOOP)
    assert all("model big-model, asked 20" in one.second for one in kept)
    assert kept[0].second_sha256 != kept[1].second_sha256


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["champion", "v1.1.0"], ComparisonError, "are the same model; name two different ones"),
        (["champion", "v9.0.0"], RegistryError, "has no version 'v9.0.0'; there are: v1.1.0, v1.0.0"),
        (["champion", "none.gguf"], ComparisonError, "the file none.gguf does not exist"),
        (["champion", "http://localhost:1/v1"], ComparisonError, "names no model; expected the URL and the model"),
        (["champion", "http://me:secret@host/v1#m"], ComparisonError, "contains a user or password"),
        ([f"{LOOP}@base", "notes@base"], ComparisonError, "notes@base is a model of notes, and the benchmark is"),
        ([f"{LOOP}@base", "v1.0.0", "--loop", "notes"], SettingsError, "--loop is notes; leave out --loop"),
        (["base", "v1.0.0", "--api-key-env", "KEY"], ComparisonError, "KEY is the key of one server, and 0 are"),
        (
            ["http://a/v1#m", "http://b/v1#m", "--api-key-env", "KEY"],
            ComparisonError,
            "KEY is the key of one server, and 2 are compared",
        ),
        (["base", "http://localhost:1/v1#m"], UpstreamFailed, "Start the server, or correct the URL, model or key"),
    ],
)
def test_bad_input_says_what_to_do(
    engines: FakeEngines, arguments: list[str], kind: type[Exception], message: str
) -> None:
    error = error_of(*arguments)
    assert isinstance(error, kind) and message in str(error)
    assert list_manual_comparisons(connect(), LOOP) == []


def test_a_deleted_or_damaged_version_is_not_compared(engines: FakeEngines, own_home: Path) -> None:
    gguf(own_home / "model-0.gguf", 6)
    error = error_of("v1.0.0", "base")
    assert isinstance(error, RegistryError | ArtifactError) and "is damaged or was replaced" in str(error)
