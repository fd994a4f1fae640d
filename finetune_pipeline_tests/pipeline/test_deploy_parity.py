"""A staged release is compared with the judged model: real models, tokenizers, and gateways as the servers."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from finetune_pipeline.artifacts import hash_file, stage_folder
from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.run import BenchmarkRunManifest
from finetune_pipeline.export.base import base_hash
from finetune_pipeline.inference.chat_template import tokenizer_chat_template
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.probe import write_tiny_gguf
from finetune_pipeline.pipeline import deploy
from finetune_pipeline.pipeline.deploy import reconcile, release_of
from finetune_pipeline.pipeline.deploy_parity import ParityError, check_parity
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.champion import promote as promote_in_registry
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.settings import DeploySettings, UpstreamSettings
from finetune_pipeline_tests.deployment.shelf import Shelf, shelf
from finetune_pipeline_tests.serving.conftest import serving
from finetune_pipeline_tests.sources.endpoint import teaching
from finetune_pipeline_tests.stories import STORIES, STORIES_GGUF

WORDS = ("girl", "boy", "dog", "cat", "bird", "tree", "boat", "house", "ball", "park", "king", "frog")
SILENT = "silent"


def promoted(name, gguf, loop="notes"):
    """Force a model into service, and return it."""
    folder = stage_folder(loop, "gguf_model") / name
    folder.mkdir(parents=True)
    shutil.copyfile(gguf, folder / "model.gguf")
    now = champion(connect(), loop)
    candidate = CandidateModel(
        loop=loop, gguf_path=folder / "model.gguf", gguf_sha256=hash_file(gguf), base_hash=base_hash(STORIES),
        mode="full", lineage={"base_model": str(STORIES)}, scores={"accuracy": 0.5}, report_path=folder,
    )  # fmt: skip
    expected = now.id if now else None
    return promote_in_registry(connect(), candidate, expected, "tests", "a test needs it", None, action="force")


@pytest.fixture
def stories_loop(make_loop, tmp_path):
    """Return a function that makes a loop whose base is the stories model."""
    rows = [
        {"id": word, "slice": "s", "prompt": f"Once upon a time, there was a {word}", "expected": "named Lily"}
        for word in WORDS
    ]
    (tmp_path / "benchmark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes):
        evaluation = {"benchmark": "BENCHMARK", "metric": "rouge1", "max_tokens": 16, "context": 256}
        return make_loop(base_model=str(STORIES), evaluation=evaluation, **changes)

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture
def told():
    """The lines that a comparison logs."""
    return []


def target(prompt_tokens=lambda release, messages: None):
    return SimpleNamespace(name="server", prompt_tokens=prompt_tokens)


def compare(loop, told, endpoint=None, prompt_tokens=lambda release, messages: None):
    release = release_of(loop, champion(connect(), "notes"))
    return check_parity(loop, release, target(prompt_tokens), endpoint, told.append)


def at(running, model):
    return UpstreamSettings(url=f"{running.url}/v1", model=model)


# --------------------------------------------------------------------------------------------------------- the tokens


def test_a_server_that_reads_the_same_tokens_passes(stories_loop, told, tokenizer):
    promoted("one", STORIES_GGUF)
    template = tokenizer_chat_template(tokenizer)  # as the gateway renders, with control tokens as text
    facts = compare(stories_loop(), told, prompt_tokens=lambda release, messages: template.tokens(messages))
    assert facts["tokens"]["compared"] > 50 and facts["tokens"]["differing"] == 0
    assert facts["reads_control_tokens"] is False
    assert "conversations compared: the same tokens" in told[0]


def test_reading_control_tokens_alone_is_a_fact(stories_loop, told, tokenizer):
    promoted("one", STORIES_GGUF)

    def parses(release, messages):  # as vLLM does
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    facts = compare(stories_loop(), told, prompt_tokens=parses)
    assert facts["reads_control_tokens"] is True and facts["tokens"]["differing"] == 0
    assert told[0].endswith("the same tokens, except control tokens")


def test_another_chat_template_is_rejected_with_both_renderings(stories_loop, told, tokenizer):
    promoted("one", STORIES_GGUF)

    def other_template(release, messages):
        text = "".join(f"### {message['role']}: {message['content']}" for message in messages)
        return tokenizer(text)["input_ids"]

    with pytest.raises(ParityError) as caught:
        compare(stories_loop(), told, prompt_tokens=other_template)
    message = str(caught.value)
    assert "reads " in message and " conversations as other tokens than the judged model" in message
    assert "expected '<s> How thick is the wall?'" in message and "### user: How thick is the wall?'" in message
    assert caught.value.facts["tokens"]["differing"] > 10


def test_a_server_that_refuses_a_conversation_differs(stories_loop, told, tokenizer):
    promoted("one", STORIES_GGUF)
    template = tokenizer_chat_template(tokenizer)

    def without_system(release, messages):
        if messages[0]["role"] == "system":
            raise RequestRefused("System role not supported")
        return template.tokens(messages)

    with pytest.raises(ParityError, match=r"found refused \(0 tokens\)"):
        compare(stories_loop(), told, prompt_tokens=without_system)


# -------------------------------------------------------------------------------------------------------- the answers


def test_the_same_model_passes_and_the_judged_answers_are_reused(stories_loop, told):
    loop = stories_loop(deploy={"parity_sample": 10})
    promoted("one", STORIES_GGUF)
    with serving(loop) as running:
        facts = compare(loop, told, at(running, "notes@v1.0.0"))
        assert (facts["answers"]["same"], facts["answers"]["total"]) == (10, 10)
        assert facts["answers"]["score"] == facts["answers"]["judged_score"]
        compare(loop, told, at(running, "notes@v1.0.0"))
    assert [line for line in told if "answered the benchmark again" in line] == told[:1]
    assert len(list(stage_folder("notes", BenchmarkRunManifest.stage).glob("[!.]*/manifest.json"))) == 1


@pytest.fixture
def another(tmp_path):
    """Return a model whose answers have nothing in common with the stories model's."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_other_answers_are_rejected_with_both(stories_loop, told, another):
    loop = stories_loop()
    promoted("one", STORIES_GGUF)
    promoted("other", another)
    release = release_of(loop, next(m for m in deploy.list_models(connect(), "notes") if m.version == "v1.0.0"))
    with serving(loop) as running, pytest.raises(ParityError) as caught:
        check_parity(loop, release, target(), at(running, "notes@v1.1.0"), told.append)
    message = str(caught.value)
    assert message.startswith("0 of 12 answers equal the judged model's, expected at least 80% (export.min_agreement)")
    assert "the judged model answered '" in message
    assert "/v1, model notes@v1.1.0, '" in message and "All answers are in" in message
    assert caught.value.facts["answers"]["same"] == 0


def test_a_lower_score_is_rejected_where_other_answers_are_allowed(stories_loop, told, another):
    """export.min_agreement 0 allows any answers; the score must not be lower all the same."""
    loop = stories_loop(export={"min_agreement": 0.0, "equivalence_margin": 0.01})
    promoted("one", STORIES_GGUF)
    promoted("other", another)
    good, bad = reversed(deploy.list_models(connect(), "notes"))
    with serving(loop) as running:
        with pytest.raises(ParityError, match=r"but the score is lower than the judged model's \(.*points on 12"):
            check_parity(loop, release_of(loop, good), target(), at(running, "notes@v1.1.0"), told.append)
        # The other way round it gains, which is no reason to reject.
        facts = check_parity(loop, release_of(loop, bad), target(), at(running, "notes@v1.0.0"), told.append)
    assert facts["answers"]["score"] > facts["answers"]["judged_score"]


# ---------------------------------------------------------------------------------- servers that fail, and the registry


class Answering(Shelf):
    """A shelf whose releases answer at a URL."""

    url = ""

    def stage(self, release):
        super().stage(release)
        return UpstreamSettings(url=self.url, model=release.label, timeout_seconds=2)


def error_inside(body, number):
    return 200, {"Content-Type": "text/event-stream"}, b'data: {"error": {"message": "CUDA out of memory"}}\n\n'


def cut_off(body, number):
    return 200, {"Content-Length": "100000"}, b'data: {"choices": [{"delta": {"content": "Once"}}]}\n\n'


def is_busy(body, number):
    return 503, {}, b"model is loading"


def refuses(body, number):
    return 400, {}, b'{"error": {"message": "response_format is not supported"}}'


def test_a_server_that_refuses_a_question_is_rejected(stories_loop, told):
    promoted("one", STORIES_GGUF)
    message = "the target refuses: question '.*' of the benchmark was rejected: .*response_format is not supported"
    with teaching(refuses) as (_, server), pytest.raises(ParityError, match=message):
        compare(stories_loop(), told, UpstreamSettings(url=server.url, model="m"))


FAULTS = {
    "an error inside a 200": (error_inside, "failed in the middle of a completion: {'message': 'CUDA out of memory'}"),
    "a connection that ends": (cut_off, "does not answer"),
    "a server that is loading": (is_busy, "returned status 503: model is loading"),
    "a server that is not there": (None, "does not answer (ConnectError"),
    "a server that never answers": (SILENT, "does not answer (ReadTimeout"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_not_switched_and_tried_again(stories_loop, tmp_path, monkeypatch, fault):
    script, message = FAULTS[fault]
    loop = stories_loop(deploy={"targets": [shelf(name="server", path=str(tmp_path / "server"))], "parity_sample": 2})
    promoted("one", STORIES_GGUF)
    monkeypatch.setattr(deploy, "open_target", Answering)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if script is SILENT:
            monkeypatch.setattr(Answering, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
            [state] = reconcile(loop, print)
        elif script is None:
            port = silent.getsockname()[1]
            silent.close()
            monkeypatch.setattr(Answering, "url", f"http://127.0.0.1:{port}/v1")
            [state] = reconcile(loop, print)
        else:
            with teaching(script) as (_, server):
                monkeypatch.setattr(Answering, "url", server.url)
                [state] = reconcile(loop, print)
    assert (state.state, state.tries, state.observed) == ("failed", 1, None)
    assert message in state.last_error
    assert not (tmp_path / "server" / "current").exists()
    assert champion(connect(), "notes").version == "v1.0.0"


class Fixed(Answering):
    """A shelf whose releases all answer as the first one."""

    def stage(self, release):
        Shelf.stage(self, release)
        return UpstreamSettings(url=self.url, model="notes@v1.0.0", timeout_seconds=60)


def test_what_a_gateway_needs_is_known_until_another_release_is_active(stories_loop, tmp_path, monkeypatch, another):
    loop = stories_loop(deploy={"targets": [shelf(name="server", path=str(tmp_path / "server"))]})
    promoted("one", STORIES_GGUF)
    monkeypatch.setattr(deploy, "open_target", Fixed)
    with serving(loop.model_copy(update={"deploy": DeploySettings()})) as running:
        monkeypatch.setattr(Answering, "url", f"{running.url}/v1")
        [state] = reconcile(loop, print)
        assert state.active.label == "v1.0.0" and state.active.vocabulary is None
        assert (state.active.upstream.url, state.active.upstream.model) == (f"{running.url}/v1", "notes@v1.0.0")
        promoted("other", another)
        [state] = reconcile(loop, print)
    assert (state.state, state.wanted) == ("rejected", "v1.1.0")
    assert state.active.label == "v1.0.0"  # which the target still serves
