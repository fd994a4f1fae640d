"""Tiny models of real families through the whole loop: train, merge, convert, quantize, check, compare, serve.

The models have random weights, but the tokenizers, special tokens and chat templates of their families. They learn
the answers of the benchmark, so that each is promoted.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import llama_cpp
import pytest

from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.database import connect
from finetune_pipeline.export.base import resolve_base_model
from finetune_pipeline.export.special_tokens import read_special_tokens
from finetune_pipeline.inference.native import NativeVocabulary
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.manifests import AdapterManifest, DatasetManifest, GgufManifest
from finetune_pipeline.pipeline.export import CHECK_NAMES, CHECKS
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.training.conversations import tokenize_rows
from finetune_pipeline_tests.conftest import dataset_rows
from finetune_pipeline_tests.family_models import FAMILIES, WINDOW, write_model
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions, write_events
from finetune_pipeline_tests.serving.conftest import Running, serving

NAMES = ("amber", "birch", "cedar", "dunes", "ember", "fjord")
STAGES = ("raw_logs", "curated_dataset", "lora_adapter", "gguf_model", "eval_report", "promoted_model")
ANSWER = "noted"


@dataclass
class Promoted:
    """A family whose model went through the loop."""

    name: str
    loop: LoopSettings
    base: Path

    @property
    def family(self):
        return FAMILIES[self.name]


WHOLE_PATH = ("gemma2", "gemma3")


@pytest.fixture(scope="module", params=WHOLE_PATH)
def promoted(request, tmp_path_factory):
    """Run the loop of a family once for all tests of this module."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_model(request.param, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(folder / "home"))
        patch.delenv("FINETUNE_DATABASE_URL", raising=False)
        questions = [
            {
                "id": f"q{n}",
                "slice": "notes",
                "prompt": f"please note what {name} said about the {name} matter",
                "expected": ANSWER,
            }
            for n, name in enumerate(NAMES)
        ]
        (folder / "benchmark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        loop = LoopSettings(
            name="notes",
            base_model=str(base),
            curation={"min_examples": 5, "validation_fraction": 0.2},
            training={
                "num_train_epochs": 4, "learning_rate": 1e-2, "max_length": 128, "per_device_train_batch_size": 4,
            },
            evaluation={
                "benchmark": str(folder / "benchmark.jsonl"), "metric": "rouge1", "max_tokens": 12, "context": 256,
            },
            export={"quantization": "Q8_0"},
            gate={"min_score": 0},  # one constant answer is always right here
        )  # fmt: skip
        write_events(loop.drop_folder / "log.jsonl", *corrected([f"person{n}" for n in range(24)], ANSWER))
        (folder / "dagster").mkdir()
        with dg.DagsterInstance.local_temp(str(folder / "dagster")) as instance:
            job = definitions(loop).resolve_implicit_global_asset_job_def()
            keys = [dg.AssetKey(["notes", stage]) for stage in STAGES]
            job.execute_in_process(instance=instance, asset_selection=keys)
        yield Promoted(request.param, loop, resolve_base_model(loop.base_model))


@pytest.fixture
def own_home(promoted):
    """Keep the home of the family's loop."""


@pytest.fixture
def vocabulary(promoted):
    made = get_latest(GgufManifest, "notes")
    return NativeVocabulary(made.path / made.manifest.gguf)


@pytest.mark.slow
def test_a_family_goes_through_the_loop(promoted):
    made = get_latest(GgufManifest, "notes")
    outcomes = {check["name"]: check["passed"] for check in json.loads((made.path / CHECKS).read_text())}
    assert outcomes == dict.fromkeys(CHECK_NAMES, True)
    trained = get_latest(AdapterManifest, "notes").manifest
    assert trained.loss_after < trained.loss_before
    assert champion(connect(), "notes").version == "v1.0.0"


@pytest.mark.slow
def test_both_ends_are_learned(promoted):
    tokenizer = load_tokenizer(promoted.base)
    ends = tokenizer.convert_tokens_to_ids([promoted.family.end_of_turn, promoted.family.end_of_sequence])
    rows = dataset_rows(get_latest(DatasetManifest, "notes").path, "train")
    for row in tokenize_rows(rows, ("completion",), "", tokenizer):
        learned = [label for label in row.labels() if label >= 0]
        assert learned[-1] == ends[1]
        assert ends[0] in learned and all(learned.count(end) == 1 for end in ends)
        answer = tokenizer.decode(learned[: learned.index(ends[0])])
        assert answer.strip() == ANSWER


@pytest.mark.slow
def test_both_ends_end_an_answer_in_every_server(promoted, vocabulary):
    tokenizer = load_tokenizer(promoted.base)
    for text in (promoted.family.end_of_turn, promoted.family.end_of_sequence):
        end = tokenizer.convert_tokens_to_ids(text)
        assert vocabulary.is_end_of_generation(end) and llama_cpp.llama_vocab_is_eog(vocabulary.vocab, end), text
        assert end in read_special_tokens(promoted.base).ends


@pytest.mark.slow
def test_nothing_doubles_bos(promoted, vocabulary):
    tokenizer = load_tokenizer(promoted.base)
    bos = tokenizer.convert_tokens_to_ids(promoted.family.bos) if promoted.family.bos else None
    expected = 0 if bos is None else 1
    messages = [{"role": "user", "content": "How thick is the wall?"}]
    served = vocabulary.template.tokens(messages)
    rows = dataset_rows(get_latest(DatasetManifest, "notes").path, "train")
    trained = [row.conversations["completion"] for row in tokenize_rows(rows, ("completion",), "", tokenizer)]
    for ids in (served, *trained):
        assert ids.count(bos) == expected and (bos is None or ids[0] == bos)
        assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == expected


@pytest.mark.slow
def test_the_gateway_stops_at_each_end_and_says_what_the_template_rejects(promoted, vocabulary):
    tokenizer = load_tokenizer(promoted.base)
    with serving(promoted.loop) as gateway:
        answered = gateway.ask("please note what person3 said about the person3 matter", max_tokens=12).json()
        assert answered["choices"][0]["finish_reason"] == "stop"
        assert answered["choices"][0]["message"]["content"].strip() == ANSWER
        assert answered["usage"]["prompt_tokens"] > WINDOW  # longer than a sliding window
        for text in {promoted.family.end_of_turn, promoted.family.end_of_sequence}:
            bias = {str(tokenizer.convert_tokens_to_ids(text)): 100}
            ended = gateway.ask("a wall", max_tokens=12, logit_bias=bias).json()
            assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] <= 1, text
        check_system_message(gateway, promoted.family.refusal)
        check_alternation(gateway, promoted.family.alternates)


def check_system_message(gateway: Running, refusal: str | None) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a wall"}]
    response = gateway.http.post("/v1/chat/completions", json={"model": "notes", "messages": messages, "max_tokens": 2})
    assert response.status_code == (400 if refusal else 200), response.text
    assert refusal is None or refusal in response.json()["error"]["message"]


def check_alternation(gateway: Running, alternates: bool) -> None:
    messages = [{"role": "user", "content": "a wall"}, {"role": "user", "content": "a door"}]
    response = gateway.http.post("/v1/chat/completions", json={"model": "notes", "messages": messages, "max_tokens": 2})
    assert response.status_code == (400 if alternates else 200), response.text
    assert not alternates or "must alternate" in response.json()["error"]["message"]
    messages.insert(1, {"role": "assistant", "content": "noted"})
    response = gateway.http.post("/v1/chat/completions", json={"model": "notes", "messages": messages, "max_tokens": 2})
    assert response.status_code == 200, response.text
