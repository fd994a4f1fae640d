"""Deployment to vLLM with a double: names, files, refusals, faults; `serving/test_vllm_server.py` has the server."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from finetune_pipeline.deployment.target import BASE, Release, TargetError, TargetRefused
from finetune_pipeline.deployment.targets import open_target
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.settings import PROJECT_ROOT, VllmTarget
from finetune_pipeline_tests.adapters import write_adapter
from finetune_pipeline_tests.deployment.vllm_double import LORA, RUNTIME_UPDATES, vllm_double
from finetune_pipeline_tests.pipeline.test_full_disk import small_disk

STARTER = PROJECT_ROOT / "data" / "starter_model"
SCRIPT = """
import sys
from pathlib import Path
from finetune_pipeline.deployment.target import Release
from finetune_pipeline.deployment.vllm import Vllm
from finetune_pipeline.settings import VllmTarget
url, folder, adapter, base = sys.argv[1:]
release = Release(loop="notes", label="v1.1.0", sha256="b", gguf=Path(base), gguf_sha256="b", base_folder=Path(base),
    base_name="owner/starter", context=512, adapter_folder=Path(adapter))
target = Vllm(VllmTarget(url=url, folder=folder), "notes")
target.stage(release)
target.activate(release)
print(target.remove_old({"v1.1.0"}))
"""
"""Deploys v1.1.0, as another process that can be killed."""


@pytest.fixture
def server():
    with vllm_double(str(STARTER)) as running:
        yield running


@pytest.fixture
def vllm(server, tmp_path):
    """Return a function that opens the target, as each reconciliation does."""

    def make(**settings):
        given = {"url": server.url, "folder": str(tmp_path / "served"), "timeout_seconds": 5, **settings}
        return open_target(VllmTarget(**given), "notes")

    return make


@pytest.fixture
def release(tmp_path):
    """Return a function that makes a release with an adapter of its own."""

    def make(label="v1.0.0", seed=0, lora=None, **changes):
        adapter = tmp_path / f"adapter-{label}-{seed}"
        if not adapter.exists():
            write_adapter(STARTER, adapter, seed)
        if lora:
            path = adapter / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | lora))
        given = {
            "loop": "notes", "label": label, "sha256": label, "gguf": STARTER, "gguf_sha256": label,
            "base_folder": STARTER, "base_name": "owner/starter", "context": 512, "adapter_folder": adapter,
        }  # fmt: skip
        return Release(**{**given, **changes})

    return make


def deploy(target, release, keep=()):
    endpoint = target.stage(release)
    target.activate(release)
    target.remove_old({release.label, *keep})
    return endpoint


# ------------------------------------------------------------------------------------------------------------ adapters


def test_each_version_is_loaded_under_its_own_name_and_the_old_one_is_unloaded(vllm, server, release, tmp_path):
    target, first, second = vllm(), release(), release("v1.1.0", 1)
    assert target.observe(first).label is None
    endpoint = target.stage(first)
    assert (endpoint.url, endpoint.model) == (f"{server.url}/v1", "notes-v1.0.0")
    assert target.observe(first).label is None  # staged only
    target.activate(first)
    before = target.observe(first)
    assert before.label == "v1.0.0" and before.digest
    assert server.adapters == {"notes-v1.0.0": str(tmp_path / "served" / "notes-v1.0.0")}
    config = json.loads((tmp_path / "served" / "notes-v1.0.0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/starter"

    target.stage(second)
    assert target.observe(second) == before  # applications notice nothing yet
    target.activate(second)
    assert target.observe(second).label == "v1.1.0" and target.observe(second).digest != before.digest
    assert target.remove_old({"v1.1.0", "v1.0.0"}) == []
    assert target.remove_old({"v1.1.0"}) == ["v1.0.0"]
    assert list(server.adapters) == ["notes-v1.1.0"]
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["notes-v1.1.0", "notes.vllm.json"]
    deploy(target, first)  # a rollback leads to the same digest
    assert target.observe(first) == before
    assert [body["lora_name"] for path, body in server.requests if path == "/v1/load_lora_adapter"] == [
        "notes-v1.0.0", "notes-v1.1.0", "notes-v1.0.0",
    ]  # fmt: skip
    assert not any(body.get("load_inplace") for _, body in server.requests if body)


def test_a_release_that_is_there_is_not_loaded_again(vllm, server, release):
    deploy(vllm(), release())
    server.requests.clear()
    deploy(vllm(), release())
    assert "/v1/load_lora_adapter" not in {path for path, _ in server.requests}


def test_the_base_model_serves_under_its_own_name(vllm, server, release):
    target, base = vllm(), release(BASE, adapter_folder=None)
    assert deploy(target, release()).model == "notes-v1.0.0"
    assert deploy(target, base).model == "base"
    assert target.observe(base).label == BASE
    assert server.adapters == {}  # unloaded, though nothing else was loaded


def test_a_restarted_server_gets_its_adapter_again(vllm, server, release):
    deploy(vllm(), release())
    server.restart()
    observed = vllm().observe(release())
    assert observed.label is None and "forgets adapters when it restarts" in observed.detail
    deploy(vllm(), release())
    assert vllm().observe(release()).label == "v1.0.0"


def test_adapters_of_other_loops_stay(vllm, server, release, tmp_path):
    server.adapters |= {"other-v1.0.0": "/x", "notes-old": "/y", "notes-v1.0.0-beta": "/z"}
    (tmp_path / "served" / "other-v1.0.0").mkdir(parents=True)
    deploy(vllm(), release("v1.1.0"))
    assert set(server.adapters) == {"other-v1.0.0", "notes-old", "notes-v1.0.0-beta", "notes-v1.1.0"}
    assert (tmp_path / "served" / "other-v1.0.0").is_dir()


def test_the_file_of_the_active_release_belongs_to_one_target(vllm, release):
    deploy(vllm(), release())
    assert vllm(name="other").observe(release()).label is None


# ------------------------------------------------------------------------------------------- content that is not right


def test_a_changed_adapter_is_noticed_and_gets_another_name(vllm, server, release, tmp_path):
    deploy(vllm(), release())
    weights = tmp_path / "served" / "notes-v1.0.0" / "adapter_model.safetensors"
    weights.unlink()  # it may be a hard link
    shutil.copyfile(release("v9.0.0", 7).adapter_folder / weights.name, weights)
    observed = vllm().observe(release())
    assert observed.label is None and "was not activated or changed" in observed.detail
    # vLLM may have read the changed weights under this name, so it is not used again.
    assert deploy(vllm(), release()).model == "notes-v1.0.0-2"
    assert vllm().observe(release()).label == "v1.0.0"


def test_a_name_that_somebody_else_loaded_is_left_alone(vllm, server, release):
    server.adapters["notes-v1.0.0"] = "/elsewhere"
    assert vllm().stage(release()).model == "notes-v1.0.0-2"
    assert server.adapters["notes-v1.0.0"] == "/elsewhere"


def test_a_server_that_does_not_list_what_it_says_it_loaded(vllm, server, release):
    server.faults["/v1/load_lora_adapter"] = "lie"
    with pytest.raises(TargetError, match=r"says that it loaded notes-v1.0.0, but lists no model of this name"):
        vllm().stage(release())


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ],
)
def test_an_adapter_that_vllm_would_apply_wrongly_is_refused(vllm, server, release, tmp_path, lora, named):
    with pytest.raises(TargetRefused, match=f"does not apply {named} of the adapter .* set form: merged"):
        vllm().stage(release(lora=lora))
    assert server.requests == [] and not (tmp_path / "served").exists()


def test_what_the_server_never_serves_is_refused(vllm, release):
    with pytest.raises(TargetRefused, match=r"expected target modules .* Set form: merged"):
        vllm().stage(release(lora={"target_modules": ["k_proj_of_nobody"]}))


def test_a_rank_that_the_server_was_not_started_for(vllm, server, release):
    with pytest.raises(TargetError, match=r"greater than max_lora_rank 16.*--max-lora-rank 32") as caught:
        vllm().stage(release(lora={"r": 20}))
    assert not isinstance(caught.value, TargetRefused)  # a restart helps
    with pytest.raises(TargetRefused, match=r"rank 600, and vLLM serves at most 512; set form: merged"):
        vllm().stage(release("v1.1.0", lora={"r": 8, "rank_pattern": {"q_proj": 600}}))
    with pytest.raises(TargetRefused, match=r"max_lora_rank is 16, and the adapter of notes@v1.2.0 has rank 20"):
        vllm().stage(release("v1.2.0", lora={"r": 20}, config={"max_lora_rank": 16}))


def test_a_version_without_its_adapter_is_refused(vllm, release):
    with pytest.raises(TargetRefused, match=r"notes@v1.0.0 has no adapter any more"):
        vllm().stage(release(adapter_folder=None))


# --------------------------------------------------------------------------------------------- settings of the server


def words(command):
    return shlex.split(command)


def test_the_start_command_has_what_takes_effect_at_the_start(vllm, release, tmp_path):
    config = {"gpu_memory_utilization": 0.8, "max_model_len": 2048, "enforce_eager": True, "temperature": 0.5}
    target = vllm(api_key_env="SERVER_KEY", url="http://gpu-2:8000")
    command = target.start_command(release(config=config))
    assert command.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_API_KEY=$SERVER_KEY vllm serve owner/starter")
    given = words(command)
    for name, value in {
        "--served-model-name": "owner/starter",
        "--host": "gpu-2",
        "--port": "8000",
        "--max-lora-rank": "16",
        "--max-cpu-loras": "4",
        "--gpu-memory-utilization": "0.8",
        "--max-model-len": "2048",
        "--generation-config": "vllm",
        "--override-generation-config": '{"temperature": 0.5}',
        "--lora-modules": f"notes-v1.0.0={tmp_path}/served/notes-v1.0.0",
    }.items():
        assert given[given.index(name) + 1] == value
    assert {"--enable-lora", "--enforce-eager"} <= {*given}
    assert (tmp_path / "served" / "notes-v1.0.0" / "adapter_config.json").is_file()


def test_a_reasoning_model_is_started_without_thoughts(vllm, release, tmp_path):
    base = tmp_path / "reasoning"
    base.mkdir()
    (base / "chat_template.jinja").write_text("{% if enable_thinking %}<think>{% endif %}{{ messages }}")
    given = words(vllm().start_command(release(base_folder=base)))
    assert given[given.index("--default-chat-template-kwargs") + 1] == '{"enable_thinking": false}'
    assert str(base) not in given  # its Hub id is


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_model_length": 4096}, "did you mean max_model_len"),
        ({"port": 1}, "port is no setting of vLLM that a deployment sets"),
        ({"max_model_len": "4k"}, "max_model_len is '4k'; vLLM expects an integer"),
        ({"enforce_eager": 1}, "enforce_eager is 1; vLLM expects true or false"),
        ({"max_model_len": 256}, "max_model_len is 256, and the loop's context is 512"),
    ],
)
def test_what_vllm_cannot_apply_is_refused(vllm, server, release, config, message):
    with pytest.raises(TargetRefused, match=message):
        vllm().stage(release(config=config))
    assert server.requests == []


def test_a_server_with_a_shorter_context_has_to_be_restarted(vllm, server, release):
    server.max_model_len = 256
    with pytest.raises(
        TargetError, match=r"max_model_len 256, and the loop's context is 512 .* Restart it with: .*serve"
    ):
        vllm().stage(release())


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (RUNTIME_UPDATES, r"without VLLM_ALLOW_RUNTIME_LORA_UPDATING=True\. Restart it with: VLLM_ALLOW"),
        (LORA, r"without --enable-lora\. Restart it with: .*--enable-lora"),
    ],
)
def test_a_server_that_cannot_load_adapters_has_to_be_restarted(vllm, server, release, missing, message):
    server.options.remove(missing)
    with pytest.raises(TargetError, match=message) as caught:
        vllm().stage(release())
    assert not isinstance(caught.value, TargetRefused)


# -------------------------------------------------------------------------------------------------------------- merged


def test_a_merged_folder_is_served_after_a_restart(server, vllm, release, tmp_path):
    merged = tmp_path / "merged"
    merged.mkdir()
    for name in ("model.safetensors", "config.json"):
        (merged / name).write_text(name)
    target = vllm(form="merged")
    assert target.wants_merged_folder
    version = release(merged_folder=merged, config={"tensor_parallel_size": 2})
    folder = tmp_path / "served" / "notes-v1.0.0"
    with pytest.raises(
        TargetError, match=r"loads other weights only at its start\. Restart it with: vllm serve"
    ) as caught:
        target.stage(version)
    command = str(caught.value).partition("Restart it with: ")[2]
    assert command == target.start_command(version)
    given = words(command)
    assert given[2] == str(folder) and "--enable-lora" not in given
    assert given[given.index("--tensor-parallel-size") + 1] == "2"
    assert given[given.index("--served-model-name") + 1 :][:2] == ["notes-v1.0.0", "notes"]
    assert (folder / "model.safetensors").read_text() == "model.safetensors"

    server.bases = {"notes-v1.0.0": str(folder), "notes": str(folder)}  # somebody restarted it
    assert deploy(target, version).model == "notes-v1.0.0"
    assert target.observe(version).label == "v1.0.0"
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("changed")
    assert target.observe(version).label is None
    server.bases = {"notes": str(STARTER)}
    with pytest.raises(TargetError, match=r"does not have notes@v1.0.0 any more"):
        target.activate(version)


def test_the_base_model_is_not_copied(server, vllm, release, tmp_path):
    target, base = vllm(form="merged"), release(BASE, adapter_folder=None, merged_folder=STARTER, base_name="starter")
    assert deploy(target, base).model == "base"
    assert target.observe(base).label == BASE
    assert words(target.start_command(base))[2] == str(STARTER)
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["notes.vllm.json"]


# -------------------------------------------------------------------------------------------------------------- faults


FAULTS = {
    "error inside": "answered POST /v1/load_lora_adapter with status 200 and the error 'EngineDeadError'",
    "reset": r"broke off during POST /v1/load_lora_adapter",
    "silent": r"did not answer POST /v1/load_lora_adapter within 0.5 s",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_an_adapter_is_loaded_is_tried_again(vllm, server, release, fault):
    deploy(vllm(), release())
    server.faults["/v1/load_lora_adapter"] = fault
    second = release("v1.1.0", 1)
    with pytest.raises(TargetError, match=FAULTS[fault]):
        vllm(timeout_seconds=0.5 if fault == "silent" else 30).stage(second)
    server.faults.clear()
    assert vllm().observe(second).label == "v1.0.0"
    deploy(vllm(), second)
    assert vllm().observe(second).label == "v1.1.0" and list(server.adapters) == ["notes-v1.1.0"]


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_a_kill_while_the_server_loads_or_unloads(vllm, server, release, tmp_path, path):
    deploy(vllm(), release())
    server.faults[path] = "silent"
    second = release("v1.1.0", 1)
    arguments = [server.url, str(tmp_path / "served"), str(second.adapter_folder), str(STARTER)]
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments])
    assert server.reached.wait(120)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    server.faults.clear()
    assert vllm().observe(second).label == ("v1.0.0" if path == "/v1/load_lora_adapter" else "v1.1.0")
    deploy(vllm(), second)
    assert vllm().observe(second).label == "v1.1.0" and list(server.adapters) == ["notes-v1.1.0"]
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["notes-v1.1.0", "notes.vllm.json"]


def test_a_full_disk_leaves_the_release_that_serves(vllm, server, release, own_home):
    with small_disk("disk") as leave:
        folder, first = own_home / "disk", release()
        deploy(vllm(folder=str(folder)), first)
        leave(4096)
        with pytest.raises(TargetError, match=r"the disk of .* is full .*; nothing was changed there"):
            vllm(folder=str(folder)).stage(release("v1.1.0", 1))
        assert {path.name for path in folder.iterdir()} == {"filler", "notes-v1.0.0", "notes.vllm.json"}
        assert list(server.adapters) == ["notes-v1.0.0"]
        assert vllm(folder=str(folder)).observe(first).label == "v1.0.0"


def test_a_folder_that_a_killed_process_left_is_removed(vllm, release, tmp_path):
    left = tmp_path / "served" / ".notes-v1.0.0.part"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_text("half")
    deploy(vllm(), release())
    assert not left.exists()


def test_an_adapter_that_made_room_is_unloaded_all_the_same(vllm, server, release):
    deploy(vllm(), release())
    server.dropped.add("notes-v1.0.0")
    deploy(vllm(), release("v1.1.0", 1))
    assert list(server.adapters) == ["notes-v1.1.0"]


def test_a_server_that_is_no_vllm(vllm, server, release):
    server.bases.clear()
    with pytest.raises(TargetError, match=r"answered /v1/models with .*; expected vLLM's list of models"):
        vllm().observe(release())


def test_a_server_that_reads_another_disk(vllm, server, release, tmp_path, monkeypatch):
    target, not_found = vllm(), "Loading lora notes-v1.0.0 failed: No adapter found for <path>"
    monkeypatch.setattr(type(server), "_load", lambda *_: (404, {"error": {"message": not_found}}))
    with pytest.raises(TargetError, match=r"does not find .*/served/notes-v1.0.0: .* has to read the target's folder"):
        target.stage(release())


def test_token_ids_come_from_the_staged_model(vllm, server, release):
    target, version = vllm(), release()
    target.stage(version)
    assert target.prompt_tokens(version, [{"role": "user", "content": "hello"}]) == [1, 1]
    assert server.requests[-1][1]["model"] == "notes-v1.0.0"
    with pytest.raises(RequestRefused, match="unexpected role"):
        target.prompt_tokens(version, [{"role": "tool", "content": "hello"}])
