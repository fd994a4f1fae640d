"""The sealed benchmark as a file: bad ones, decontamination, and what its looks found."""

import json

import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.benchmark import BenchmarkError
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.check_loop import check_loop
from finetune_pipeline.pipeline.required_checks import near_benchmark
from finetune_pipeline.pipeline.sealed_benchmark import sealed_findings, sealed_summary
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.registry.champion import champion, promote
from finetune_pipeline.registry.sealed_looks import SealedScores
from finetune_pipeline.settings import SettingsError
from finetune_pipeline_tests.conftest import feedback, interaction, uid
from finetune_pipeline_tests.orchestration.conftest import ATTRIBUTES, BENCHMARK
from finetune_pipeline_tests.registry.conftest import candidate, compared  # noqa: F401

QUESTION = "please note what the harbor master said about the third crane"


@pytest.fixture
def sealed(make_loop, tmp_path):
    """Return a function that writes a sealed benchmark and returns the loop with it."""

    def write(*rows, **changes):
        path = tmp_path / "sealed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return make_loop(evaluation={**ATTRIBUTES["evaluation"], "sealed_benchmark": str(path), **changes})

    return write


def row(id, prompt, **fields):
    return {"id": id, "slice": "notes", "prompt": prompt, "expected": "noted", **fields}


def test_questions_of_the_benchmark_are_rejected_with_their_number(sealed, tmp_path):
    same = BENCHMARK[1]["prompt"]
    shared = [row("a", QUESTION), row("b", f"  {same.upper()} "), row("c", same, context="a page", cluster="page")]
    loop = sealed(*shared, row("d", BENCHMARK[2]["prompt"]))
    expected = (
        f"{tmp_path / 'sealed.jsonl'}: 2 of 4 questions of the sealed benchmark are in the benchmark too (b, d); only "
        "other questions tell whether that one is overfitted. Remove them from the sealed one"
    )
    with pytest.raises(BenchmarkError) as raised:
        loop_files.sealed_benchmark(loop)
    assert str(raised.value) == expected
    assert check_loop(loop) == [expected]
    assert check_loop(sealed(row("a", QUESTION))) == []


@pytest.mark.usefixtures("kept_base_checks")
def test_a_missing_or_broken_file_is_a_problem_of_the_loop(sealed, tmp_path):
    loop = sealed({"id": "a"})
    assert any(f"{tmp_path / 'sealed.jsonl'}, line 1: " in problem for problem in check_loop(loop))
    (tmp_path / "sealed.jsonl").unlink()
    assert any(f"{tmp_path / 'sealed.jsonl'} does not exist" in problem for problem in check_loop(loop))


def test_the_summary_says_when_it_is_asked_next(sealed, candidate):  # noqa: F811
    db, loop = connect(), sealed(row("a", QUESTION), sealed_every=3)
    left = []
    for number, scores in enumerate([None, look((20, 20)), None, None, None]):
        left.append(sealed_summary(loop, db))
        one, now = candidate(f"model {number}", loop=loop.name), champion(db, loop.name)
        promote(db, one, now.id if now else None, "loop", "gain", compared(db, one, f"c{number}"), sealed=scores)
    assert left[:2] == ["promotions until it is asked first: 1"] * 2
    first = "first look, so there is nothing to compare with yet; promotions until it is asked again"
    assert left[2:] == [f"{first}: 3", f"{first}: 2", f"{first}: 1"]
    assert sealed_summary(loop, db) == f"{first}: 1"  # a promotion by force asks nothing, so it is due
    none = loop.model_copy(update={"evaluation": loop.evaluation.model_copy(update={"sealed_benchmark": None})})
    assert sealed_summary(none, db) == "first look, so there is nothing to compare with yet"


def test_a_judge_cannot_score_it(sealed):
    judge = {"kind": "judge", "url": "http://127.0.0.1:9/v1", "model": "m", "criteria": "good"}
    with pytest.raises(SettingsError, match="sealed_benchmark needs a metric that scores one answer"):
        sealed(row("a", QUESTION), metric=judge)


def test_no_near_duplicate_of_a_sealed_question_trains(make_loop, sealed):
    events = []
    for name, prompt in {"ash": "what did ash say about birch and cedar", "leak": f"{QUESTION}!"}.items():
        events.append(interaction(name, prompt=prompt))
        events.append(feedback(f"on {name}", name, "correction", correction="noted"))
    curation = {"min_examples": 1, "validation_fraction": 0.0}
    open_only = make_loop(curation=curation)
    with connect().write() as connection:
        record(connection, open_only.name, events, default_reward)
    logs, _ = snapshot(open_only, connect())
    earlier = build_dataset(open_only, logs)
    assert (earlier.manifest.train, earlier.manifest.near_benchmark) == (2, [])

    loop = sealed(row("a", QUESTION)).model_copy(update={"curation": open_only.curation})
    made = build_dataset(loop, logs)
    assert (made.manifest.train, list(made.manifest.near_benchmark)) == (1, [str(uid("leak"))])
    assert near_benchmark(loop, [made.manifest.version]) is None
    assert "1 of its examples are near-duplicates" in near_benchmark(loop, [earlier.manifest.version])
    assert near_benchmark(open_only, [made.manifest.version]) is None  # made with more questions than there are now


def look(correct, **changes):
    """Return the scores of a model that answers so many of 50 questions of each benchmark correctly."""
    opened, asked = ({f"q{n}": (int(n < count), 1, None) for n in range(50)} for count in correct)
    hashes = {"sealed_sha256": "s", "benchmark_sha256": "b", "settings_sha256": "m", **changes}
    return SealedScores(**hashes, sealed_scores=asked, open_scores=opened)


def test_each_look_is_compared_with_the_one_before_if_nothing_was_edited(candidate):  # noqa: F811
    db = connect()
    looks = [
        look((20, 20)),
        None,
        look((40, 20)),
        look((42, 22), sealed_sha256="edited"),
        look((45, 23), sealed_sha256="edited", settings_sha256="other", benchmark_sha256="other"),
        look((45, 23), sealed_sha256="edited", settings_sha256="other", benchmark_sha256="other"),
    ]
    for number, scores in enumerate(looks):
        one, now = candidate(f"model {number}", loop="aec_parser"), champion(db, "aec_parser")
        id = compared(db, one, f"c{number}")
        promote(db, one, now.id if now else None, "loop", f"gain {number}", id, sealed=scores)
    found = sealed_findings(db, "aec_parser")
    assert list(found) == [1, 3, 4, 5, 6]
    assert found[1] == "first look, so there is nothing to compare with yet"
    assert found[3].startswith("since v1.0.0: +40.0 points on the benchmark, +0.0 on the sealed one: difference +40.0")
    assert found[3].endswith("the benchmark is overfitted, so its gains overstate: write a new one")
    assert found[4] == "since v1.0.2: not compared with the look before, because it changed: the sealed benchmark"
    changed = "the benchmark, the metric, the schema or how answers are decoded"
    assert found[5] == f"since v1.0.3: not compared with the look before, because it changed: {changed}"
    assert "no sign that the benchmark is overfitted" in found[6]

    output = CliRunner().invoke(finetune, ["model", "history"], env={"COLUMNS": "400"}).output
    assert output.count("sealed benchmark, ") == 5 and f"sealed benchmark, {found[3]}" in output
    shown = json.loads(CliRunner().invoke(finetune, ["model", "history", "--json"]).output)
    assert [one["sealed"] for one in shown] == [found[1], None, *(found[id] for id in (3, 4, 5, 6))]
