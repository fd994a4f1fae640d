"""The default loop's data: the benchmark, its rules, the starter model's replay examples and the sample logs."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from finetune_pipeline.curation.acceptance import Policy, accept
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.feedback.resolution import resolve
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.records import Example, Feedback, Interaction, normalize
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import CurationSettings

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data"
SLICES = {"walls", "doors_windows", "slabs_structure", "mep", "seismic", "fire_energy", "louisiana"}

# The generators are scripts, not a package; they import each other from their own folder.
sys.path.insert(0, str(ROOT / "scripts" / "aec"))

import make_benchmark  # noqa: E402
import make_rules  # noqa: E402
import make_starter_model  # noqa: E402
import wording  # noqa: E402

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logs(folder: str) -> list[Line]:
    return [line for path in sorted((DATA / "samples" / folder).glob("*.jsonl")) for line in read(path)]


@pytest.fixture(scope="module")
def benchmark() -> list[Line]:
    return read(DATA / "benchmarks" / "aec_parser.jsonl")


@pytest.fixture(scope="module")
def index(benchmark: list[Line]) -> NearIndex:
    return NearIndex({item["id"]: item["prompt"] for item in benchmark})


def near(index: NearIndex, prompts: Iterator[str]) -> list[str]:
    return [prompt for prompt in prompts if (found := index.nearest(prompt)) and found[1] >= 0.8]


def problems(answer: Line) -> list[str]:
    schema = json.loads((DATA / "benchmarks" / "aec_parser.schema.json").read_text(encoding="utf-8"))
    rules = json.loads((DATA / "benchmarks" / "aec_parser.compliance.json").read_text(encoding="utf-8"))
    shape = [error.message for error in Draft202012Validator(schema).iter_errors(answer)]
    return shape + [rule["id"] for rule in rules if not Draft202012Validator(rule["schema"]).is_valid(answer)]


def prompts_of_logs() -> list[str]:
    both = logs("aec_parser") + logs("aec_parser_more")
    return [line["prompt"] for line in both if line["event"] == "interaction"]


def test_the_benchmark_is_large_balanced_and_partly_hand_written(benchmark: list[Line]) -> None:
    assert len(benchmark) >= 240
    assert {item["slice"] for item in benchmark} == SLICES
    wordings = Counter(item["wording"] for item in benchmark)
    assert wordings["plain"] == wordings["firm"] == len(benchmark) / 2
    by_hand = [item for item in benchmark if item["origin"] == "hand"]
    assert len(by_hand) >= 60
    assert {(item["slice"], item["wording"]) for item in by_hand} == {(s, w) for s in SLICES for w in ("plain", "firm")}
    assert {item["origin"] for item in benchmark} == {"hand", "generator"}


def test_no_question_occurs_twice(benchmark: list[Line]) -> None:
    assert len({item["id"] for item in benchmark}) == len(benchmark)
    assert len({normalize(item["prompt"]) for item in benchmark}) == len(benchmark)


def test_every_expected_answer_passes_the_schema_and_the_rules(benchmark: list[Line]) -> None:
    assert {item["id"]: found for item in benchmark if (found := problems(item["expected"]))} == {}


def test_every_expected_answer_has_its_keys_in_order(benchmark: list[Line]) -> None:
    assert all(list(item["expected"]) == list(wording.ordered(item["expected"])) for item in benchmark)


@pytest.mark.parametrize(
    ("path", "content"),
    [(make_rules.SCHEMA, make_rules.OUTPUT_SCHEMA), (make_rules.RULES, make_rules.COMPLIANCE)],
    ids=["schema", "rules"],
)
def test_schema_and_rules_are_as_the_script_writes_them(path: Path, content: object) -> None:
    assert json.loads(path.read_text(encoding="utf-8")) == content


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("door-rating", {"element": "door", "material": "steel", "fire_rating_hr": 2}),
        ("concrete-2h-thickness", {"element": "wall", "material": "concrete", "thickness_mm": 90, "fire_rating_hr": 2}),
        ("title-24-state", {"element": "roof", "material": "steel", "energy_code": "Title 24", "location": "Nevada"}),
        ("title-24-state", {"element": "roof", "material": "steel", "energy_code": "Title 24"}),
        ("seismic-material", {"element": "wall", "material": "brick", "seismic_category": "D"}),
        ("parish-state", {"element": "roof", "material": "steel", "parish": "Orleans", "location": "Texas"}),
        ("wind-borne-debris", {"element": "window", "material": "vinyl", "wind_speed_mph": 150}),
        ("pipe-size", {"element": "pipe", "material": "copper", "service": "hot_water"}),
    ],
)
def test_a_rule_rejects_an_unacceptable_answer(rule: str, answer: Line) -> None:
    assert problems(answer) == [rule]


def test_generated_answers_pass_the_rules() -> None:
    rng = Random(5)
    drawn = (wording.sample_spec(slice_name, rng) for slice_name in wording.rotation(wording.SLICES, 210))
    assert [spec for spec in drawn if problems(spec)] == []


def test_the_script_reproduces_the_benchmark() -> None:
    assert make_benchmark.benchmark_text().encode() == make_benchmark.BENCHMARK.read_bytes()


def test_the_firm_adopts_words_in_the_second_batch(benchmark: list[Line]) -> None:
    first = [line["prompt"] for line in logs("aec_parser") if line["event"] == "interaction"]
    more = [line["prompt"] for line in logs("aec_parser_more") if line["event"] == "interaction"]
    assert not any(wording.has_later_words(prompt) for prompt in first)
    assert sum(wording.has_later_words(prompt) for prompt in more) >= 30
    assert any(wording.has_later_words(item["prompt"]) for item in benchmark)


def test_no_training_text_is_near_the_benchmark(index: NearIndex) -> None:
    replay = [example["prompt"] for example in read(DATA / "starter_model" / "replay.jsonl")]
    pretraining = [example["prompt"] for example in make_starter_model.examples(1500, make_starter_model.SEED)]
    assert near(index, iter(replay + pretraining + prompts_of_logs())) == []


def test_no_training_text_is_near_the_demo_prompt() -> None:
    demo = NearIndex({"demo": make_benchmark.DEMO_PROMPT})
    replay = [example["prompt"] for example in read(DATA / "starter_model" / "replay.jsonl")]
    pretraining = [example["prompt"] for example in make_starter_model.examples(1500, make_starter_model.SEED)]
    assert near(demo, iter(replay + pretraining + prompts_of_logs())) == []


def test_replay_examples_pass_the_rules() -> None:
    replay = read(DATA / "starter_model" / "replay.jsonl")
    assert len(replay) == 300
    assert [example for example in replay if problems(json.loads(example["completion"]))] == []


@pytest.mark.parametrize(("folder", "at_least"), [("aec_parser", 150), ("aec_parser_more", 50)])
def test_sample_logs_are_valid_and_in_time_order(folder: str, at_least: int) -> None:
    lines = logs(folder)
    interactions = [Interaction.model_validate(line) for line in lines if line["event"] == "interaction"]
    feedback = [Feedback.model_validate(line) for line in lines if line["event"] == "feedback"]
    assert len(interactions) >= at_least
    assert len({item.id for item in interactions}) == len(interactions)
    assert {item.interaction_id for item in feedback} <= {item.id for item in interactions}
    assert {item.kind for item in feedback} >= {"correction", "thumbs_up", "thumbs_down", "success"}
    times = [line["created_at"] for line in lines]
    assert times == sorted(times)
    confident = [item for item in interactions if item.confidence is not None]
    assert len(confident) == len(interactions)


def test_no_logged_prompt_occurs_twice() -> None:
    prompts = prompts_of_logs()
    assert len(set(prompts)) == len(prompts)


def examples(folder: str) -> list[Example]:
    lines = logs(folder)
    feedback = [Feedback.model_validate(line) for line in lines if line["event"] == "feedback"]
    found = []
    for line in lines:
        if line["event"] == "interaction":
            logged = Interaction.model_validate(line)
            about = [item for item in feedback if item.interaction_id == logged.id]
            found.append(resolve(logged, about, 1, default_reward))
    return [example for example in found if example is not None]


@pytest.mark.parametrize(("folder", "at_least"), [("aec_parser", 180), ("aec_parser_more", 50)])
def test_enough_logged_examples_are_accepted(folder: str, at_least: int, index: NearIndex) -> None:
    policy = Policy(CurationSettings(), index, answer_validator(make_rules.OUTPUT_SCHEMA))
    accepted = [example for example in examples(folder) if accept(example, policy).accepted]
    assert len(accepted) >= at_least
    assert sum(example.reward >= policy.settings.min_reward for example in accepted) >= at_least


def test_corrections_pass_the_rules() -> None:
    lines = logs("aec_parser") + logs("aec_parser_more")
    corrections = [json.loads(line["correction"]) for line in lines if line.get("kind") == "correction"]
    assert [answer for answer in corrections if problems(answer)] == []
