"""What is checked before a run starts."""

import pytest

from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.check_loop import check_loop
from finetune_pipeline.settings import LoopSettings, load_loop

MISSING = "/nowhere/at all"
TEACHER = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NOT_SET_ANYWHERE"}


def test_a_loop_without_problems(loop):
    assert check_loop(loop) == []
    assert check_loop(load_loop("aec_parser")) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"benchmark": MISSING, "metric": "rouge1"}}, "{} does not exist; write the benchmark, or"),
        ({"output_schema": MISSING}, "{} does not exist; create it, or change output_schema"),
        ({"evaluation": {"compliance": MISSING}}, "{} does not exist; create it, or change evaluation.compliance"),
        ({"curation": {"replay": MISSING}}, "curation.replay: the file {} does not exist"),
        ({"ingest": {"folders": [MISSING]}}, "folder {} does not exist; create it, or correct ingest.folders"),
        ({"sources": [{"kind": "files", "name": "a", "path": MISSING}]}, "sources[0] (a): {} does not exist; create"),
        ({"sources": [{"kind": "vault", "name": "a", "path": MISSING}]}, "sources[0] (a): {} does not exist"),
        ({"sources": [{"kind": "vault", "name": "a", "path": __file__}]}, "is not a folder; correct path"),
        ({"sources": [{"kind": "code", "name": "a", "path": MISSING}]}, "sources[0] (a): {} does not exist"),
        (
            {"sources": [{"kind": "documents", "name": "a", "path": "docs", "templates": MISSING}]},
            "sources[0] (a): {} does not exist; create it, or correct templates",
        ),
        (
            {"sources": [{"kind": "code", "name": "a", "path": "docs", "teacher": TEACHER}]},
            "sources[0] (a): the environment variable NOT_SET_ANYWHERE is not set; export the teacher's key",
        ),
        (
            {
                "sources": [
                    {"kind": "sql", "name": "a", "url_env": "NOT_SET_ANYWHERE", "table": "t", "key": "k", "cursor": "c",
                     "prompt": "p", "response": "r"}
                ]
            },
            "sources[0] (a): the environment variable NOT_SET_ANYWHERE is not set; export the database's URL",
        ),
        ({"feedback": {"reward_function": "no.such"}}, "feedback.reward_function: 'no.such' cannot be imported"),
        ({"base_model": "/nowhere/model"}, "/nowhere/model"),
    ],
)  # fmt: skip
def test_each_missing_thing_is_named_with_its_remedy(make_loop, changes, said):
    loop = with_changes(make_loop(), changes)
    (problem,) = check_loop(loop)
    assert said.format(MISSING) in problem


def with_changes(loop, changes):
    """Return a loop with changes; sections are merged."""
    given = loop.model_dump(exclude_unset=True)
    for name, change in changes.items():
        given[name] = {**given.get(name, {}), **change} if isinstance(change, dict) else change
    return LoopSettings.model_validate(given)


def test_all_problems_are_listed_together(make_loop, tmp_path):
    """Each line of a benchmark is a problem of its own."""
    benchmark = tmp_path / "bad.jsonl"
    benchmark.write_text('{"id": "a"}\nbroken\n')
    changes = {
        "evaluation": {"benchmark": str(benchmark)},
        "curation": {"replay": MISSING},
        "training": {
            "per_device_train_batch_size": 24,
            "num_processes": 5,
            "report_to": ["wandb"],
            "backend": "axolotl",
        },
        "ingest": {"folders": [MISSING, "/nowhere/else"]},
        "base_model": "docs",
    }
    problems = check_loop(with_changes(make_loop(), changes))
    for said in (
        f"{benchmark}, line 1: ", f"{benchmark}, line 2: not JSON", "curation.replay: ", MISSING, "/nowhere/else",
        "evenly across 5 processes", "no config.json",
    ):  # fmt: skip
        assert [problem for problem in problems if said in problem], said
    assert len(problems) == len(set(problems)) >= 8


@pytest.mark.parametrize("what", ["folder", "not UTF-8", "deeply nested"])
@pytest.mark.parametrize(
    "setting", ["evaluation.benchmark", "output_schema", "evaluation.compliance", "curation.replay"]
)
def test_a_file_that_cannot_be_read_is_a_sentence(make_loop, tmp_path, setting, what):
    path = tmp_path / "odd"
    if what == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe" if what == "not UTF-8" else b"[" * 100_000)
    section, _, name = setting.rpartition(".")
    changes = {section: {name: str(path)}} if section else {name: str(path)}
    problems = check_loop(with_changes(make_loop(), changes))
    assert len(problems) == 1 and str(path) in problems[0]


def test_weights_are_not_downloaded_for_a_check(loop, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    wanted = []

    def download(name, allow_patterns):
        wanted.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loop = loop.model_copy(update={"base_model": "some-one/some-model"})
    assert check_loop(loop, download=False) == []
    assert "config.json" in wanted and not [name for name in wanted if "safetensors" in name]
    assert "no safetensors weights" in check_loop(loop)[0]


def test_a_file_that_disappears_later_is_named_too(tmp_path):
    with pytest.raises(CurationError, match=r"replay: .*gone.jsonl cannot be read \(No such file"):
        loop_files.hashes(replay=tmp_path / "gone.jsonl")
