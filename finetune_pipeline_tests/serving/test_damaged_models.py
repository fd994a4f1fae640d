"""Files that are damaged before they are loaded or while they serve, and models with empty answers."""

import os
import shutil

import pytest

from finetune_pipeline.artifacts import hash_file
from finetune_pipeline.database import connect
from finetune_pipeline.export.base_gguf import base_gguf
from finetune_pipeline.pipeline.ask import find_model
from finetune_pipeline.registry import champion
from finetune_pipeline.registry.model_versions import RegistryError
from finetune_pipeline_tests.inference.test_remote import chunk, fake_upstream, sse
from finetune_pipeline_tests.serving.conftest import make_loop, promote, serving
from finetune_pipeline_tests.waiting import wait_until


def flip(path, *, keep_times=False):
    """Invert the second half of a file in place; it holds tensors, so the file still loads."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        half = file.read()
        file.seek(before.st_size // 2)
        file.write(bytes(byte ^ 0xFF for byte in half))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path):
    """Replace a file by a damaged copy, as an interrupted download does."""
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    flip(copy)
    copy.replace(path)


@pytest.mark.parametrize("kind", ["flipped", "flipped_at_the_same_time", "replaced"])
def test_a_damaged_champion_is_refused_and_the_base_model_answers(ggufs, kind):
    loop = f"damaged_{kind}"
    good, bad = promote(ggufs["Q8_0"], loop), promote(ggufs["Q6_K"], loop)
    replace(bad.gguf_path) if kind == "replaced" else flip(bad.gguf_path, keep_times=kind != "flipped")
    with serving(make_loop(loop)) as running:
        health = running.health()
        error = health["loops"][loop]["last_error"]
        assert (health["status"], health["loops"][loop]["serving"]) == ("degraded", f"{loop}@base")
        assert f"{bad.name} does not load" in error and f"{bad.gguf_path} is damaged or was replaced" in error
        assert hash_file(bad.gguf_path)[:16] in error and bad.gguf_sha256[:16] in error
        assert "restore the file, or choose another version" in error
        assert running.ask(model=loop).json()["model"] == f"{loop}@base"
        named = running.ask(model=bad.name)
        assert (named.status_code, bad.gguf_path.name in named.text) == (503, True)
        with pytest.raises(RegistryError, match="is damaged or was replaced"):
            find_model(make_loop(loop), "champion", print)  # `finetune ask`
        rolled_back = running.http.post("/admin/rollback", json={"loop": loop}).json()
        assert rolled_back == {"loop": loop, "serving": good.name, "last_error": None}
        with pytest.raises(RegistryError, match="is damaged or was replaced"):
            champion.switch(connect(), loop, bad.version, "tests", "forward again")
        assert running.health()["status"] == "ok"


def test_a_model_damaged_while_it_serves_is_taken_out_of_service(ggufs):
    name = promote(ggufs["Q8_0"], "rotting")
    with serving(make_loop("rotting")) as running:
        before = running.ask(model="rotting").json()
        assert before["model"] == name.name
        name.gguf_path.chmod(0o640)  # changes its times but not its content
        flip(name.gguf_path)
        wait_until(lambda: running.health()["loops"]["rotting"]["serving"] == "rotting@base")
        assert "is damaged or was replaced" in running.health()["loops"]["rotting"]["last_error"]
        assert running.ask(model="rotting").json()["model"] == "rotting@base"
        flip(name.gguf_path)
        assert running.http.post("/admin/reload-model", json={}).json()[0]["serving"] == name.name
        after = running.ask(model="rotting").json()
        assert after["choices"][0]["message"] == before["choices"][0]["message"]
        assert running.health()["status"] == "ok"


def test_a_damaged_adapter_keeps_the_old_one_in_service(ggufs, adapters):
    one = promote(ggufs["F16"], "torn", adapters[0])
    with serving(make_loop("torn")) as running:
        two = promote(ggufs["F16"], "torn", adapters[1])
        wait_until(lambda: running.health()["loops"]["torn"]["serving"] == two.name)
        champion.switch(connect(), "torn", one.version, "tests", "back")
        wait_until(lambda: running.health()["loops"]["torn"]["serving"] == one.name)
        replace(one.adapter_path)  # the process still has the old file open
        reloaded = running.http.post("/admin/reload-model", json={})
        assert reloaded.status_code == 503
        assert f"{one.adapter_path} is damaged or was replaced" in reloaded.json()["error"]["message"]
        assert running.health()["loops"]["torn"]["serving"] == one.name


DAMAGES = {
    "flipped": flip,
    "replaced": replace,
    "truncated": lambda file: os.truncate(file, 1000),
    "deleted": os.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_model_is_exported_again(damage):
    loop = make_loop(f"rotten_base_{damage}")
    gguf = base_gguf(loop, print)
    expected = hash_file(gguf)
    DAMAGES[damage](gguf)
    with serving(loop) as running:
        assert (running.health()["status"], hash_file(gguf)) == ("ok", expected)
        assert running.ask(model=loop.name).json()["model"] == f"{loop.name}@base"


def test_a_base_model_damaged_while_it_serves_is_exported_again():
    loop = make_loop("rotting_base")
    gguf = base_gguf(loop, print)
    expected = hash_file(gguf)
    with serving(loop) as running:
        before = running.ask(model=loop.name).json()
        flip(gguf)
        wait_until(lambda: hash_file(gguf) == expected)
        wait_until(lambda: running.health()["status"] == "ok")
        after = running.ask(model=loop.name).json()
        assert after["choices"][0]["message"] == before["choices"][0]["message"]


# ---- empty answers


def test_empty_answers_degrade_health_until_answers_have_text():
    silent, talking = sse(chunk(finish="stop")), sse(chunk("hello"), chunk(finish="stop"))
    with fake_upstream(silent) as (server, upstream):
        settings = {"upstream": upstream.model_dump(), "fallback": None}
        with serving(make_loop("quiet", serving=settings)) as running:

            def ask(times, **fields):
                for _ in range(times):
                    assert running.ask(model="quiet", **fields).status_code == 200

            ask(30, stop=["x"])  # the stop text may have made them empty
            ask(19)
            assert running.health()["status"] == "ok"  # too few to be conclusive
            ask(1)
            health = running.health()
            assert health["status"] == "degraded"
            assert "20 of the last 20 answers of quiet@m are empty" in health["loops"]["quiet"]["last_error"]
            assert running.metric("finetune_healthy", loop="quiet") == 0
            server.body = talking.encode()
            ask(19)
            assert running.health()["status"] == "degraded"
            ask(1)
            assert running.health()["status"] == "ok"
            assert running.metric("finetune_healthy", loop="quiet") == 1


def test_the_limit_for_empty_answers_can_be_raised():
    with fake_upstream(sse(chunk(finish="stop"))) as (_, upstream):
        settings = {"upstream": upstream.model_dump(), "fallback": None, "empty_limit": 1.0}
        with serving(make_loop("mute", serving=settings)) as running:
            for _ in range(25):
                running.ask(model="mute")
            assert running.health()["status"] == "ok"


def test_a_model_damaged_before_its_evaluation_is_detected_by_empty_answers(ggufs, tmp_path):
    zeros = tmp_path / "zeros.gguf"
    shutil.copyfile(ggufs["F16"], zeros)
    size = zeros.stat().st_size
    with zeros.open("r+b") as file:
        file.seek(size // 4)
        file.write(bytes(size - size // 4))
    name = promote(zeros, "hollow").name
    with serving(make_loop("hollow")) as running:
        for _ in range(20):
            answer = running.ask(model="hollow", max_tokens=4).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"].strip()) == (name, "")
        assert running.health()["status"] == "degraded"
