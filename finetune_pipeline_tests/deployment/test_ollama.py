"""Deployment to Ollama: against the contract server, and against a real one if FINETUNE_TEST_OLLAMA_URL is set."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.deployment.ollama import REPLACED, Ollama
from finetune_pipeline.deployment.target import TargetError, TargetRefused
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import END_TOKENS, GenerateRequest, ModelSpec
from finetune_pipeline.inference.remote_engine import RemoteEngine
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.waiting import wait_until

PROMPTS = ["Add a 150 mm brick wall, 3 m high", "Move the door by 20 cm", "Two windows in the north wall"]
STOCK = "{{ range .Messages }}<|im_start|>{{ .Role }}: {{ .Content }}<|im_end|>{{ end }}<|im_start|>assistant\n"
SCRIPT = """
import sys
from pathlib import Path
from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.deployment.ollama import Ollama
from finetune_pipeline.deployment.target import Release
from finetune_pipeline.settings import OllamaTarget
url, gguf, base = sys.argv[1:]
sha256 = hash_file(Path(gguf))
release = Release(loop="notes", label="v1.0.0", sha256=sha256, gguf=Path(gguf), gguf_sha256=sha256,
    base_folder=Path(base), base_name="b", system_prompt="Parse the request.", context=512, max_tokens=64)
target = Ollama(OllamaTarget(url=url), "notes")
target.stage(release)
target.activate(release)
"""
"""Stages and activates v1.0.0, as another process that can be killed."""
HALF_UPLOADED = """
import os
from finetune_pipeline.deployment import ollama
def half(path):
    yield path.read_bytes()[: path.stat().st_size // 2]
    os.kill(os.getpid(), 9)
ollama._chunks = half
"""
"""Kills the process when it has sent half of the GGUF."""


def deploy(target, release):
    endpoint = target.stage(release)
    target.activate(release)
    return endpoint


def test_a_release_serves_under_the_applications_name_until_the_next_one(ollama, make_release):
    first, second = make_release(), make_release("v1.1.0", "Q8_0")
    assert ollama.observe(first).label is None
    endpoint = deploy(ollama, first)
    assert (endpoint.url, endpoint.model) == (f"{ollama._url}/v1", f"{ollama._model}:v1.0.0")
    observed = ollama.observe(first)
    assert observed.label == "v1.0.0" and observed.digest
    ollama.stage(second)
    assert ollama.observe(second).label == "v1.0.0"  # applications notice nothing yet
    ollama.activate(second)
    assert ollama.observe(second).label == "v1.1.0"
    assert ollama.observe(second).digest != observed.digest
    ollama.activate(first)
    assert ollama.observe(first) == observed  # a rollback leads to the same digest
    assert ollama.start_command(first) is None
    assert ollama.prompt_tokens(first, []) is None


def test_the_answers_are_the_judged_models(ollama, make_release):
    release = make_release()
    endpoint = deploy(ollama, release)
    system = {"role": "system", "content": release.system_prompt}
    requests = [GenerateRequest(messages=[system, {"role": "user", "content": one}], max_tokens=48) for one in PROMPTS]
    with Engine(ModelSpec(gguf=release.gguf, context=512, parallel=1)) as judged:
        expected = [one.text for one in judged.generate(requests)]
    with RemoteEngine(endpoint, 1, "the test") as remote:
        assert [remote.submit(one).result().text for one in requests] == expected
        # Ollama adds the system prompt if an application sends none.
        without = GenerateRequest(messages=requests[0].messages[1:], max_tokens=48)
        assert remote.submit(without).result().text == expected[0]


def test_old_releases_are_removed_but_nothing_else(ollama, make_release):
    releases = [make_release(f"v1.{number}.0", "F16", context=512 + number) for number in range(3)]
    for release in releases:
        deploy(ollama, release)
    ollama._copy("v1.2.0", "mine")
    assert ollama.remove_old({"v1.1.0"}) == ["v1.0.0"]  # v1.2.0 is active
    assert sorted(ollama._digests()) == ["latest", "mine", "v1.1.0", "v1.2.0"]
    assert ollama.remove_old({"v1.1.0", "v1.2.0"}) == []


def test_an_alias_moved_by_hand_is_told(ollama, make_release):
    first, second = make_release(), make_release("v1.1.0", "Q8_0")
    deploy(ollama, first)
    deploy(ollama, second)
    ollama._copy("v1.0.0", "latest")
    observed = ollama.observe(second)
    assert observed.label == "v1.0.0" and "is v1.0.0" in observed.detail
    ollama._create(make_release("foreign", context=256), {"num_ctx": 256, "temperature": 0, "repeat_penalty": 1})
    ollama._copy("foreign", "latest")
    observed = ollama.observe(second)
    assert observed.label is None and "is no release of this loop" in observed.detail
    ollama._create(make_release("v1.1.0"), {"num_ctx": 512, "temperature": 0, "repeat_penalty": 1})
    ollama._check_prompts(make_release("v1.1.0"), {}, _tokenizer())
    ollama._copy("v1.1.0", "latest")
    observed = ollama.observe(second)
    assert observed.label is None and "has the name of v1.1.0, but its GGUF is" in observed.detail
    deploy(ollama, second)
    assert ollama.observe(second).label == "v1.1.0"


def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PROJECT_ROOT / "data" / "starter_model")


def test_a_changed_setting_makes_the_model_again_without_an_upload(server, make_ollama, make_release):
    target = make_ollama(server.url)
    deploy(target, make_release())
    before = server.digest("notes:v1.0.0")
    created = server.requests.count(("POST", "/api/create"))
    target.stage(make_release())
    assert server.requests.count(("POST", "/api/create")) == created
    deploy(target, make_release(config={"temperature": 0.5, "stop": ["\n\n", "é"], "top_k": 1}))
    assert server.digest("notes:latest") != before
    parameters = server.manifest("notes")["parameters"]
    assert parameters == {
        "num_ctx": 512, "num_predict": 64, "temperature": 0.5, "repeat_penalty": 1, "stop": ["\n\n", "é"], "top_k": 1,
    }  # fmt: skip
    target.stage(make_release(config={"temperature": 0.5, "stop": ["\n\n", "é"], "top_k": 1}))
    assert server.requests.count(("POST", "/api/create")) == created + 1
    assert len(server.uploads) == 1


def test_the_models_stop_at_every_end_that_the_gguf_names(server, make_ollama, make_release, tmp_path):
    target = make_ollama(server.url)
    target.stage(make_release())
    assert server.manifest("notes:v1.0.0")["parameters"]["stop"] == ["<|im_end|>"]
    key = END_TOKENS.encode()
    content = bytearray(make_release().gguf.read_bytes())
    value = content.index(key) + len(key) + 12  # after its type and length
    assert content[value : value + 1] == b"5"  # <|im_end|>
    content[value : value + 1] = b"3"
    path = tmp_path / "ends.gguf"
    path.write_bytes(content)
    sha256 = hash_file(path)
    target.stage(make_release("v1.1.0", gguf=path, gguf_sha256=sha256, sha256=sha256))
    assert server.manifest("notes:v1.1.0")["parameters"]["stop"] == ["<|im_end|>", "<pad>"]


def test_a_model_that_had_the_applications_name_is_kept(server, make_ollama, make_release):
    foreign = make_ollama(server.url)
    foreign.stage(make_release("foreign"))
    foreign._copy("foreign", "latest")
    server.models.pop("notes:foreign")
    before = server.digest("notes")
    deploy(foreign, make_release("v1.0.0", "Q8_0"))
    assert server.digest(f"notes:{REPLACED}") == before
    assert foreign.remove_old({"v1.0.0"}) == []


@pytest.mark.parametrize("system_prompt", ["", "Parse the request."])
def test_a_stock_template_that_differs_is_replaced_by_one_of_the_tokenizers(
    server, make_ollama, make_release, system_prompt
):
    server.stock_template = STOCK
    target, release = make_ollama(server.url), make_release(system_prompt=system_prompt)
    deploy(target, release)
    manifest = server.manifest("notes")
    assert manifest["template"] != STOCK and manifest["parser"] == "passthrough"
    messages = [{"role": "user", "content": "A wall"}]
    with Engine(ModelSpec(gguf=release.gguf, context=512, parallel=1)) as engine:
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        assert server.prompt(manifest, messages) == engine.render([*system, *messages])
    created = server.requests.count(("POST", "/api/create"))
    target.stage(release)
    assert server.requests.count(("POST", "/api/create")) == created  # found as it should be


def test_a_server_that_renders_other_prompts_all_the_same_is_rejected_with_both(server, make_ollama, make_release):
    server.native_suffix, server.own_template_can_more = "<think>\n", True
    make_ollama(server.url).stage(make_release())  # its own template differs, and one that is made does not
    server.models.clear()
    server.prompt = lambda manifest, messages: "always this"
    with pytest.raises(
        TargetRefused, match=r"its own template \('always this'\).*the tokenizer renders '<\|im_start\|>"
    ):
        make_ollama(server.url).stage(make_release())


def test_a_server_without_debug_rendering_is_left_to_the_comparison_of_answers(server, make_ollama, make_release):
    server.debug_rendering, server.stock_template = False, STOCK
    deploy(make_ollama(server.url), make_release())
    assert server.manifest("notes")["template"] == STOCK
    assert server.violations == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_model_len": 4096}, "has no parameter max_model_len and would ignore it; .*It has: draft_num_predict"),
        ({"temperatur": 0.5}, "did you mean temperature"),
        ({"typical_p": 0.5}, "has no parameter typical_p"),
        ({"num_ctx": 0.5}, "num_ctx is 0.5; Ollama expects an integer"),
        ({"temperature": True}, "temperature is True; Ollama expects a number"),
        ({"use_mmap": 1}, "use_mmap is 1; Ollama expects true or false"),
        ({"stop": "x"}, "stop is 'x'; Ollama expects a list of texts"),
        ({"stop": [1]}, "expects a list of texts"),
    ],
)
def test_parameters_that_ollama_would_ignore_are_refused(server, make_ollama, make_release, config, message):
    with pytest.raises(TargetRefused, match=message):
        make_ollama(server.url).stage(make_release(config=config))
    assert server.models == {}


def test_an_adapter_is_refused_with_the_remedy(server, make_ollama, make_release):
    with pytest.raises(TargetRefused, match=r"since 0\.34\.1.*set export\.form: merged"):
        make_ollama(server.url).stage(make_release(adapter_gguf=Path("adapter.gguf")))
    assert server.requests == []


def test_an_api_key_is_sent(server, make_ollama, make_release, monkeypatch):
    server.key = "secret"
    with pytest.raises(TargetError, match="status 401"):
        make_ollama(server.url).observe(make_release())
    target = make_ollama(server.url, api_key_env="OLLAMA_KEY")
    monkeypatch.delenv("OLLAMA_KEY", raising=False)
    with pytest.raises(TargetError, match="OLLAMA_KEY is not set"):
        target.observe(make_release())
    monkeypatch.setenv("OLLAMA_KEY", "secret")
    assert target.stage(make_release()).api_key_env == "OLLAMA_KEY"


@pytest.mark.parametrize("version", ["0.5.4", "0.4.12"])
def test_an_old_version_is_told(server, make_ollama, make_release, version):
    server.version = version
    with pytest.raises(TargetError, match=f"is Ollama {version}; expected at least 0.5.5"):
        make_ollama(server.url).stage(make_release())
    server.version = "0.0.0"  # of a development build
    assert make_ollama(server.url).observe(make_release()).label is None


def test_a_server_that_is_not_ollama_is_told(server, make_ollama, make_release):
    with pytest.raises(TargetError, match=r"is not an Ollama server: GET /api/version was answered by status 404"):
        make_ollama(f"{server.url}/v1").observe(make_release())


# Faults


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        ("/api/create", "error-line", "cannot create notes:v1.0.0: write .* no space left on device"),
        ("/api/create", "no-success", r"ended with \{'status': 'writing manifest'\} instead of success"),
        ("/api/create", "lie", "has the GGUF 0000000000000000 instead of"),
        ("/api/blobs", "lie", "cannot create notes:v1.0.0: open .* no such file"),
        (
            "/api/blobs",
            "full",
            r"cannot store the GGUF \(\d+ MB\): status 500, 'write sha256-1: no space left on device'",
        ),
        ("/api/copy", "lie", "/api/tags lists no such model and"),
        *(
            (path, "reset", f"broke off during .* {path}")
            for path in ("/api/version", "/api/create", "/api/copy", "/api/chat")
        ),
        *(
            (path, "hang", f"did not answer .* {path}.* within 2 s")
            for path in ("/api/version", "/api/blobs", "/api/create")
        ),
    ],
)
def test_a_faulty_server_is_noticed_and_recovered_from(server, make_ollama, make_release, path, fault, message):
    server.faults[path] = fault
    target, release = make_ollama(server.url, timeout_seconds=2 if fault == "hang" else 60), make_release()
    with pytest.raises(TargetError, match=message) as raised:
        deploy(target, release)
    assert not isinstance(raised.value, TargetRefused)
    assert "notes:latest" not in server.models
    server.faults.clear()
    server.end_hanging.set()
    target = make_ollama(server.url)
    deploy(target, release)
    assert target.observe(release).label == "v1.0.0"


def test_a_server_that_is_down_is_told(make_ollama, make_release):
    with pytest.raises(TargetError, match="cannot be reached, or broke off during GET /api/version"):
        make_ollama("http://127.0.0.1:1").observe(make_release())


def test_a_tampered_gguf_is_not_sent(server, make_ollama, make_release, tmp_path):
    content = bytearray(make_release().gguf.read_bytes())
    content[-1] ^= 1
    (tmp_path / "tampered.gguf").write_bytes(content)
    with pytest.raises(TargetRefused, match=r"is damaged or was replaced.*nothing was sent"):
        make_ollama(server.url).stage(make_release(gguf=tmp_path / "tampered.gguf"))
    assert server.uploads == [] and server.models == {}
    assert ("POST", f"/api/blobs/sha256:{make_release().gguf_sha256}") not in server.requests


def test_an_interrupted_upload_leaves_nothing_and_a_finished_one_is_not_repeated(server, make_ollama, make_release):
    server.faults["/api/blobs"] = "full"
    target, release = make_ollama(server.url), make_release()
    with pytest.raises(TargetError):
        target.stage(release)
    assert list(server.folder.iterdir()) == []
    server.faults.clear()
    server.faults["/api/create"] = "error-line"
    with pytest.raises(TargetError):
        target.stage(release)
    server.faults.clear()
    target.stage(release)
    assert len(server.uploads) == 1 and server.violations == []


def test_a_kill_in_the_middle_of_an_upload_leaves_nothing(server, make_ollama, make_release):
    release = make_release()
    command = [sys.executable, "-c", HALF_UPLOADED + SCRIPT, server.url, str(release.gguf), str(release.base_folder)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: not list(server.folder.iterdir()))
    assert (server.uploads, server.models) == ([], {})
    target = make_ollama(server.url)
    deploy(target, release)
    assert target.observe(release).label == "v1.0.0"
    assert len(server.uploads) == 1 and server.violations == []


@pytest.mark.parametrize(
    "at", [*(pytest.param(path, marks=pytest.mark.slow) for path in ("/api/create", "/api/chat")), "/api/copy"]
)
def test_a_kill_leaves_what_served_before_and_the_next_try_goes_on(server, make_ollama, make_release, at):
    reached, go_on = threading.Event(), threading.Event()

    def pause(method: str, path: str) -> None:
        if path == at:
            reached.set()
            go_on.wait(60)

    server.on_request = pause
    release = make_release()
    command = [sys.executable, "-c", SCRIPT, server.url, str(release.gguf), str(release.base_folder)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}) as process:
        assert reached.wait(120)
        os.kill(process.pid, signal.SIGKILL)
    assert "notes:latest" not in server.models
    server.on_request = lambda method, path: None
    go_on.set()
    target = make_ollama(server.url)
    deploy(target, release)
    assert target.observe(release).label == "v1.0.0"
    assert len(server.uploads) == 1 and server.violations == []


def test_what_is_staged_answers_before_applications_get_it(server, make_ollama, make_release):
    endpoint = make_ollama(server.url).stage(make_release())
    assert httpx.post(f"{server.url}/api/show", json={"model": "notes"}).status_code == 404
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "A wall"}],
        "temperature": 0,
        "stream": True,
    }
    assert httpx.post(f"{endpoint.url}/chat/completions", json=body).status_code == 200


def test_the_default_name_is_the_loops():
    from finetune_pipeline.settings import OllamaTarget

    assert Ollama(OllamaTarget(url="http://127.0.0.1:11434"), "notes")._model == "notes"
