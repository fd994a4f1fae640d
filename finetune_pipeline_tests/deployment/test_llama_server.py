"""llama-server in both forms: faults, files, presets and options. Real ones: pipeline.test_deploy_llama_server."""

import os
import shlex
import subprocess
import sys

import pytest

from finetune_pipeline.artifacts import hash_file, model_sha256
from finetune_pipeline.deployment import llama_server
from finetune_pipeline.deployment.files import PART
from finetune_pipeline.deployment.llama_server import PRESETS, open_llama_server, server_options
from finetune_pipeline.deployment.target import Release, TargetError, TargetRefused
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.settings import LlamaServerTarget
from finetune_pipeline_tests.deployment.llama_server_double import FakeServer, faking
from finetune_pipeline_tests.pipeline.test_full_disk import small_disk

from .conftest import STARTER


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def fake(folder):
    with faking(folder / PRESETS) as server:
        yield server


@pytest.fixture
def make_target(fake, folder):
    def make(form="router", loop="notes", **fields):
        settings = {"url": fake.url, "folder": str(folder), "timeout_seconds": 5, **fields}
        return open_llama_server(LlamaServerTarget(form=form, **settings), loop)

    return make


@pytest.fixture
def router(make_target):
    return make_target()


@pytest.fixture
def adapters(make_target):
    return make_target("adapter")


@pytest.fixture
def release(tmp_path):
    """Return a function that makes a release of a small file, or of it and an adapter."""
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF of the base")

    def make(label="v1.0.0", adapter=None, content=None, **changes):
        gguf = base
        if content is not None:
            gguf = tmp_path / f"{content}.gguf"
            gguf.write_text(content)
        sha256 = hash_file(gguf)
        fields = {"gguf": gguf, "gguf_sha256": sha256, "sha256": sha256}
        if adapter is not None:
            lora = tmp_path / f"{adapter}.lora.gguf"
            lora.write_text(adapter)
            fields |= {"adapter_gguf": lora, "sha256": model_sha256(sha256, hash_file(lora))}
        fields |= {
            "loop": "notes",
            "base_folder": STARTER,
            "base_name": "starter_model",
            "context": 512,
            "max_tokens": 64,
        }
        return Release(label=label, **{**fields, **changes})

    return make


def brought(target, one):
    target.stage(one)
    target.activate(one)
    return target.observe(one)


# ------------------------------------------------------------------------------------------------------------- router


def test_a_release_gets_a_file_and_a_section_and_then_the_loops_name(router, fake, folder, release):
    first, second = release(content="one"), release("v1.1.0", content="two")
    endpoint = router.stage(first)
    assert (endpoint.url, endpoint.model) == (f"{fake.url}/v1", "notes@v1.0.0")
    assert fake.models.keys() == {"notes@v1.0.0"} and router.observe(first).label is None
    router.activate(first)
    observed = router.observe(first)
    assert (observed.label, observed.digest) == ("v1.0.0", first.sha256)
    assert router.stage(second).model == "notes@v1.1.0"
    assert router.observe(second).label == "v1.0.0"  # until it is activated
    router.activate(second)
    assert (router.observe(second).label, router.observe(first).label) == ("v1.1.0", "v1.1.0")
    states = {name: status for name, (status, _) in fake.models.items()}
    assert states == {"notes": "loaded", "notes@v1.0.0": "unloaded", "notes@v1.1.0": "unloaded"}
    assert brought(router, first).label == "v1.0.0"  # rolled back: its file is still there
    assert router.remove_old(["v1.0.0"]) == ["v1.1.0"]
    assert sorted(path.name for path in folder.glob("*.gguf")) == ["notes-v1.0.0.gguf"]
    assert fake.models.keys() == {"notes", "notes@v1.0.0"}
    assert router.start_command(first) is None


def test_sections_of_the_user_and_of_other_loops_stay(router, make_target, fake, folder, release):
    folder.mkdir()
    own = "version = 1\n; mine\n[*]\nthreads = 2\n\n[llama]\nmodel = /models/llama.gguf ; the big one\n"
    (folder / PRESETS).write_text(own.rstrip("\n"))
    brought(router, release())
    other = make_target(loop="notes-2")
    assert brought(other, release(loop="notes-2")).label == "v1.0.0"
    router.remove_old([])
    text = (folder / PRESETS).read_text()
    assert text.startswith(own) and "[notes]" in text and "[notes@v1.0.0]" not in text and "[notes-2@v1.0.0]" in text
    assert {path.name for path in folder.glob("*.gguf")} == {"notes-v1.0.0.gguf", "notes-2-v1.0.0.gguf"}


def test_a_changed_file_or_section_is_drift_and_never_overwritten(router, fake, folder, release):
    one = release(content="one")
    brought(router, one)
    file = folder / "notes-v1.0.0.gguf"
    file.unlink()
    file.write_text("a file that lies about its digest")
    observed = router.observe(one)
    assert observed.label is None and "has not the content of v1.0.0" in observed.detail
    assert brought(router, one).label == "v1.0.0"
    assert file.read_text() == "a file that lies about its digest"  # a server may have it open
    assert (folder / "notes-v1.0.0-2.gguf").read_text() == "one"
    assert "notes-v1.0.0-2.gguf" in fake.models["notes"][1]
    router.remove_old(["v1.0.0"])
    assert [path.name for path in folder.glob("*.gguf")] == ["notes-v1.0.0-2.gguf"]
    text = (folder / PRESETS).read_text()
    (folder / PRESETS).write_text(text.replace("temperature = 0", "temperature = 1"))
    assert "the section [notes] of" in router.observe(one).detail
    assert brought(router, one).label == "v1.0.0"
    (folder / "notes-v1.0.0-2.gguf").unlink()
    assert "has a file that cannot be read here" in router.observe(one).detail


def test_an_adapter_is_a_line_of_the_section(router, fake, folder, release):
    one = release(adapter="a1")
    assert brought(router, one).label == "v1.0.0"
    assert f"lora = {folder / 'notes-v1.0.0.lora'}" in fake.models["notes"][1]
    (folder / "notes-v1.0.0.lora").unlink()
    (folder / "notes-v1.0.0.lora").write_text("another adapter")
    assert router.observe(one).label is None


def test_a_router_that_reads_another_folder_is_told_apart(router, fake, folder, release, tmp_path):
    fake.presets = tmp_path / "elsewhere.ini"
    with pytest.raises(TargetError, match=r"does not read .*presets.ini") as caught:
        router.stage(release())
    expected = ["llama-server", "--models-preset", str(folder / PRESETS), "--host", "127.0.0.1", "--port"]
    assert shlex.split(str(caught.value).split("Restart it with: ")[1])[:6] == expected
    fake.faults["/models"] = (200, {"data": [{"id": "a"}]})
    with pytest.raises(TargetError, match="is no llama-server in router mode; start one with: llama-server"):
        router.observe(release())


def test_a_section_that_the_server_refuses_is_taken_back(router, fake, folder, release):
    brought(router, release())
    before = (folder / PRESETS).read_text()
    fake.faults["/models?reload"] = (500, {"error": {"message": "option 'x' not recognized in preset 'notes@v1.1.0'"}})
    with pytest.raises(TargetError, match="option 'x' not recognized"):
        router.stage(release("v1.1.0"))
    fake.faults.clear()
    assert (folder / PRESETS).read_text() == before
    assert router.observe(release()).label == "v1.0.0"


def test_a_model_that_cannot_be_loaded_is_an_error(router, fake, release):
    one = release()
    brought(router, one)
    failed = {"value": "unloaded", "preset": fake.models["notes"][1], "failed": True, "exit_code": 1}
    listed = {"id": "notes", "aliases": [], "status": failed}
    fake.faults["/models"] = (200, {"data": [listed, {**listed, "id": "notes@v1.0.0"}]})
    fake.faults["/models/load"] = (200, {"success": True})
    assert router.observe(one).detail == "notes cannot be loaded, exit status 1"
    with pytest.raises(TargetError, match=r"cannot load notes@v1.0.0: it is unloaded, exit status 1\. See"):
        router.stage(one)


def test_an_alias_with_the_loops_name_is_refused_before_a_reload(router, fake, release):
    brought(router, release())
    listed = [
        {"id": name, "aliases": ["notes"] if name == "llama" else [], "status": {"value": "loaded", "preset": ""}}
        for name in ("llama", "notes")
    ]
    fake.faults["/models"] = (200, {"data": listed})
    with pytest.raises(TargetError, match=r"the model llama of .* has the alias notes"):
        router.stage(release("v1.1.0"))


# ----------------------------------------------------------------------------------------------------------- adapters


def restart_command(target, one):
    with pytest.raises(TargetError) as caught:
        target.stage(one)
    assert not isinstance(caught.value, TargetRefused)
    return str(caught.value).split("Restart it with: ")[1]


def test_new_adapters_need_a_restart_and_loaded_ones_do_not(adapters, fake, folder, release):
    base, first, second = release("base"), release(adapter="a1"), release("v1.1.0", adapter="a2")
    fake.model_path = "/elsewhere/base.gguf"
    fake.start(restart_command(adapters, base))
    assert adapters.stage(base).extra_body == {}
    assert adapters.observe(base).label == "base"
    command = restart_command(adapters, first)
    assert command.count(".lora:0") == 1 and ".lora:1" not in command  # what it serves does not change
    fake.start(command)
    assert adapters.stage(first).extra_body == {"lora": [{"id": 0, "scale": 1.0}]}
    assert adapters.observe(first).label == "base"
    adapters.activate(first)
    observed = adapters.observe(first)
    assert (observed.label, observed.digest) == ("v1.0.0", first.sha256)
    command = restart_command(adapters, second)
    assert f"{folder / 'notes-v1.0.0.lora'}:1,{folder / 'notes-v1.1.0.lora'}:0" in command
    fake.start(command)
    assert adapters.stage(second).extra_body == {"lora": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]}
    adapters.activate(second)
    assert adapters.observe(second).label == "v1.1.0"
    assert f"{folder / 'notes-v1.1.0.lora'}:1" in adapters.start_command(second)
    for one, label in [(first, "v1.0.0"), (base, "base"), (second, "v1.1.0")]:  # without a restart
        assert brought(adapters, one).label == label
    fake.adapters[0] = (fake.adapters[0][0], 0.5)
    assert "expected one adapter at 1" in adapters.observe(second).detail


def test_adapters_that_are_loaded_stay_on_the_disk(adapters, fake, folder, release):
    for label in ("v1.0.0", "v1.1.0"):
        fake.model_path = fake.model_path or "/elsewhere/base.gguf"
        fake.start(restart_command(adapters, release(label, adapter=label)))
        brought(adapters, release(label, adapter=label))
    (folder / "notes-base-0123456789ab.gguf").write_text("an old base model")
    assert adapters.remove_old(["v1.1.0"]) == []
    assert not (folder / "notes-base-0123456789ab.gguf").exists()
    fake.adapters = [one for one in fake.adapters if "v1.1.0" in one[0]]
    assert adapters.remove_old(["v1.1.0"]) == ["v1.0.0"]
    assert [path.name for path in folder.glob("*.lora")] == ["notes-v1.1.0.lora"]


def test_a_server_that_caches_prompts_across_adapters_is_not_used(adapters, fake, release):
    fake.model_path = "/elsewhere/base.gguf"
    one = release(adapter="a1")
    fake.start(restart_command(adapters, one))
    fake.cached = 7
    with pytest.raises(TargetError, match=r"reuses the cache of prompts .*Restart it with: .*--no-cache-prompt"):
        adapters.stage(one)


def test_a_tampered_adapter_is_found(adapters, fake, folder, release, tmp_path):
    fake.model_path = "/elsewhere/base.gguf"
    one = release(adapter="a1")
    fake.start(restart_command(adapters, one))
    brought(adapters, one)
    loaded = folder / "notes-v1.0.0.lora"
    loaded.unlink()
    loaded.write_text("another adapter")
    assert "has not the content of v1.0.0" in adapters.observe(one).detail
    assert "notes-v1.0.0-2.lora" in restart_command(adapters, one)  # never the loaded name
    (tmp_path / "a1.lora.gguf").write_text("a tampered adapter")
    with pytest.raises(TargetRefused, match=r"a1.lora.gguf is damaged or was replaced: .*nothing was deployed"):
        adapters.stage(one)


def test_a_merged_model_is_refused(adapters, release):
    with pytest.raises(TargetRefused, match=r"is a merged GGUF, .*set export.form: adapter .*or form: router"):
        adapters.stage(release())


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("form", ["router", "adapter"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("reset", "cannot be reached, or broke off during"),
        ("silent", "did not answer GET .* within 0.3 s"),
        ("text", "something else than JSON: '<html>a proxy</html>'"),
        ((200, {"error": {"message": "out of memory"}}), "status 200 and the error 'out of memory'"),
        ((503, {"error": {"message": "Loading model", "code": 503}}), "status 503 and the error 'Loading model'"),
        ((200, {"data": 7}), "is no llama-server in router mode|expected llama-server's list"),
        ((401, {"error": {"message": "Invalid API Key", "code": 401}}), "Invalid API Key"),
    ],
)
def test_faults_are_errors_that_are_tried_again(make_target, fake, release, form, fault, message):
    target = make_target(form, timeout_seconds=0.3 if fault == "silent" else 30)
    one = release(adapter="a1")
    fake.faults |= dict.fromkeys(("/models", "/lora-adapters"), fault)
    for step in (target.observe, target.stage, target.activate):
        with pytest.raises(TargetError, match=message) as caught:
            step(one)
        assert not isinstance(caught.value, TargetRefused)
    fake.faults.clear()
    if form == "router":
        assert brought(make_target(), one).label == "v1.0.0"


def test_nothing_is_active_before_a_reset_load_worked(router, fake, release):
    one = release()
    fake.faults["/models/load"] = "reset"
    with pytest.raises(TargetError, match="broke off during POST /models/load"):
        router.stage(one)
    assert router.observe(one).label is None
    fake.faults.clear()
    assert brought(router, one).label == "v1.0.0"


def test_a_server_that_is_not_started_is_told_how(make_target, fake, release):
    url = "http://127.0.0.1:9"
    with pytest.raises(TargetError, match=r"cannot be reached.*Its start command: llama-server --models-preset"):
        make_target(url=url).stage(release())
    with pytest.raises(TargetError, match=r"cannot be reached.*Its start command: llama-server --model .*lora-scaled"):
        make_target("adapter", url=url).observe(release(adapter="a1"))


def test_a_key_is_sent_and_its_absence_is_told(make_target, fake, release, monkeypatch):
    target = make_target(api_key_env="SOME_KEY")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(TargetError, match="the environment variable SOME_KEY is not set"):
        target.observe(release())
    monkeypatch.setenv("SOME_KEY", "secret")
    target.observe(release())
    assert fake.requests[-1][3]["Authorization"] == "Bearer secret"


def test_a_damaged_gguf_is_refused_before_anything_is_sent(router, fake, folder, release):
    with pytest.raises(TargetRefused, match=r"is damaged or was replaced: .*nothing was deployed"):
        router.stage(release(gguf_sha256="0" * 64))
    assert fake.requests == [] and not [*folder.glob("*.gguf")]


def test_a_full_disk_leaves_no_file(make_target, fake, release, own_home, tmp_path):
    large = tmp_path / "large.gguf"
    large.write_bytes(os.urandom(100_000))
    one = release(gguf=large, gguf_sha256=hash_file(large), sha256=hash_file(large))
    with small_disk("disk") as leave:
        target = make_target(folder=str(own_home / "disk"))
        leave(4096)
        with pytest.raises(TargetError, match=r"the disk of .* is full"):
            target.stage(one)
        assert {path.name for path in (own_home / "disk").iterdir()} == {"filler"}


KILLED = """
import os, sys
from pathlib import Path
from finetune_pipeline.deployment import llama_server
from finetune_pipeline.deployment.target import Release
from finetune_pipeline.settings import LlamaServerTarget
url, folder, gguf, sha256, step = sys.argv[1:]
release = Release(
    loop="notes", label="v1.0.0", sha256=sha256, gguf=Path(gguf), gguf_sha256=sha256, base_folder=Path("."),
    base_name="starter_model", system_prompt="Parse the request.", context=512, max_tokens=64,
)
die = lambda *_, **__: os.kill(os.getpid(), 9)
target = llama_server.open_llama_server(LlamaServerTarget(url=url, folder=folder), "notes")
if step == "file":
    Path.rename = die
if step == "reload":
    llama_server.LlamaRouter._reload = die
target.stage(release)
if step == "switch":
    llama_server.LlamaRouter._reload = die
if step != "staged":
    target.activate(release)
die()
"""


@pytest.mark.parametrize("step", ["file", "reload", "staged", "switch"])
def test_a_kill_at_any_step_is_survived(router, fake, folder, release, step):
    one = release()
    arguments = [fake.url, folder, one.gguf, one.sha256, step]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=False)
    assert killed.returncode == -9
    assert router.observe(one).label is None  # not active before its activation was complete
    assert brought(router, one).label == "v1.0.0"
    router.remove_old(["v1.0.0"])
    assert {path.name for path in folder.iterdir()} == {PRESETS, f"{PRESETS}.lock", "notes-v1.0.0.gguf"}
    assert not [*folder.glob(f"*{PART}")]


# ---------------------------------------------------------------------------------------------------------- and others


def test_tokens_are_those_of_the_servers_own_chat(router, fake, release):
    assert router.prompt_tokens(release(), [{"role": "user", "content": "hi"}]) == [*b"<s>hi"]
    sent = {path: body for _, path, body, _ in fake.requests}
    assert sent["/tokenize"] == {
        "model": "notes@v1.0.0", "content": "<s>hi", "add_special": True, "parse_special": True
    }  # fmt: skip
    for status, said in [
        (400, "All non-assistant messages must contain 'content'"),
        (500, "Jinja Exception: no system"),
    ]:
        fake.faults["/apply-template"] = (status, {"error": {"message": said}})
        with pytest.raises(RequestRefused, match=said):
            router.prompt_tokens(release(), [])
    fake.faults["/apply-template"] = (500, {"error": {"message": "proxy error: Failed to read connection"}})
    with pytest.raises(TargetError, match="Failed to read connection"):
        router.prompt_tokens(release(), [])


def test_options_come_from_the_loop_and_the_config(release):
    assert server_options(release()) == {"ctx-size": 2048, "parallel": 4, "n-predict": 64, "temperature": 0}
    config = {"n_ctx": 4096, "n_gpu_layers": 99, "parallel": 2, "flash_attn": "on", "kv-unified": True, "temp": 0.5}
    assert server_options(release(config=config)) == {
        "ctx-size": 4096, "parallel": 2, "n-predict": 64, "temperature": 0.5, "n-gpu-layers": 99, "flash-attn": "on",
        "kv-unified": True,
    }  # fmt: skip
    for config, message in [
        ({"max_model_len": 4096}, "max_model_len is no option of llama-server"),
        ({"ctx_sizes": 4096}, "did you mean ctx-size?"),
        ({"model": "/etc/passwd"}, "model is no option of llama-server that a deployment sets"),
        ({"parallel": "two"}, "parallel is 'two'; llama-server expects an integer"),
        ({"temperature": True}, "expects a number"),
        ({"jinja": "yes"}, "expects true or false"),
        ({"chat_template": None}, "expects a text"),
    ]:
        with pytest.raises(TargetRefused, match=message):
            server_options(release(config=config))
    with pytest.raises(TargetRefused, match="a preset of llama-server's router cannot hold"):
        server_options(release(config={"chat_template": "a\n[llama]\nmodel = b"}), for_ini=True)


def test_a_config_is_part_of_section_and_start_command(router, adapters, fake, release):
    config = {"n_gpu_layers": 99, "kv_unified": True}
    brought(router, release(config=config))
    assert "n-gpu-layers = 99\nkv-unified = true" in fake.models["notes"][1]
    assert router.observe(release()).label is None  # it serves with other settings
    command = adapters.start_command(release(adapter="a1", config=config))
    assert "--n-gpu-layers 99 --kv-unified --no-cache-prompt" in command


def test_requests_in_progress_are_waited_for(router, fake, release, monkeypatch):
    brought(router, release())
    busy = iter([True, True])
    answer = FakeServer.answer

    def answers(self, method, path, query, body):
        if path == "/slots":
            return 200, [{"is_processing": next(busy, False)}]
        return answer(self, method, path, query, body)

    monkeypatch.setattr(FakeServer, "answer", answers)
    router.activate(release("v1.1.0"))
    assert [path for _, path, _, _ in fake.requests].count("/slots") == 4  # once before, when it was idle
    monkeypatch.setattr(llama_server, "DRAIN_SECONDS", 0.0)
    fake.faults["/slots"] = (200, [{"is_processing": True}])
    router.activate(release("v1.0.0"))  # the switch is not put off for ever
    assert router.observe(release()).label == "v1.0.0"
