"""LoRA adapters generate as in transformers, and are swapped without a restart."""

import threading
from concurrent.futures import CancelledError

import psutil
import pytest

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import ModelNotLoaded
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.adapters import write_adapter
from finetune_pipeline_tests.inference.conftest import run_converter
from finetune_pipeline_tests.stories import STORIES, STORIES_GGUF
from finetune_pipeline_tests.waiting import wait_until

STARTER = PROJECT_ROOT / "data" / "starter_model"
PROMPTS = ["a brick wall", "two doors, 900 mm wide", "concrete slab 200 mm", "a window in the north wall"]
SWAPS = 20


def ask(prompt, max_tokens=24):
    return GenerateRequest(messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens)


def tokens(engine, prompts=PROMPTS):
    return [answer.token_ids for answer in engine.generate([ask(prompt) for prompt in prompts])]


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    """Return the starter model's GGUF and two adapters that change its completions, by name; None is the base."""
    folder = tmp_path_factory.mktemp("starter")
    base = folder / "base.gguf"
    run_converter("convert_hf_to_gguf.py", STARTER, "--outfile", base, "--outtype", "f16")
    for seed, name in enumerate(["one", "two"]):
        write_adapter(STARTER, folder / name, seed)
        gguf = folder / f"{name}.gguf"
        run_converter("convert_lora_to_gguf.py", folder / name, "--base", STARTER, "--outfile", gguf)
    return {"base": base, "one": folder / "one.gguf", "two": folder / "two.gguf", None: None}


def open_engine(starter, adapter=None, **fields):
    return Engine(ModelSpec(gguf=starter["base"], adapter=starter[adapter], context=128, **fields))


@pytest.fixture(scope="module")
def alone(starter):
    """Return the completions of engines that were opened with one adapter."""
    answers = {}
    for name in (None, "one", "two"):
        with open_engine(starter, name) as engine:
            answers[name] = tokens(engine)
    assert answers[None] != answers["one"] != answers["two"] != answers[None]
    return answers


def test_a_swapped_adapter_generates_as_one_loaded_at_the_start(starter, alone):
    with open_engine(starter, "one") as engine:
        for name in ("one", "two", None, "two", "one", "one", None):
            assert engine.swap_adapter(starter[name]).result() is None
            assert engine.spec.adapter == starter[name]
            assert tokens(engine) == alone[name]


def test_a_swap_applies_to_requests_that_were_submitted_after_it(starter, alone):
    with open_engine(starter, parallel=2) as engine:
        ended, futures = [], []
        for number, name in enumerate(("one", None, "two")):
            engine.swap_adapter(starter[name])
            for index, prompt in enumerate(
                PROMPTS
            ):  # more than are decoded together, so some wait before and after a swap
                future = engine.submit(ask(prompt))
                future.add_done_callback(lambda _, number=number: ended.append(number))
                futures.append((future, alone[name][index]))
        assert [future.result().token_ids for future, _ in futures] == [expected for _, expected in futures]
        assert ended == sorted(ended)


def test_under_load_every_completion_is_generated_with_one_adapter(starter, alone):
    possible = [{tuple(answers[index]) for answers in alone.values()} for index in range(len(PROMPTS))]
    found, stop = [], threading.Event()

    def client(engine):
        while not stop.is_set():
            for index, prompt in enumerate(PROMPTS):
                found.append((index, tuple(engine.submit(ask(prompt)).result(60).token_ids)))

    with open_engine(starter, parallel=4) as engine:
        clients = [threading.Thread(target=client, args=(engine,)) for _ in range(8)]
        for thread in clients:
            thread.start()
        for number in range(SWAPS):
            before = len(found)
            wait_until(lambda before=before: len(found) > before)
            engine.swap_adapter(starter[("one", "two", None)[number % 3]]).result(60)
        stop.set()
        for thread in clients:
            thread.join()
    assert len(found) > SWAPS
    assert all(answer in possible[index] for index, answer in found)
    assert {answer for index, answer in found if index == 0} == possible[0]  # all three were used


def test_an_unusable_file_keeps_the_old_adapter(starter, alone, tmp_path, tiny_gguf):
    text, truncated, other = tmp_path / "notes.gguf", tmp_path / "truncated.gguf", tmp_path / "other.gguf"
    text.write_text("not an adapter")
    truncated.write_bytes(starter["two"].read_bytes()[:-1000])
    write_adapter(STARTER, tmp_path / "other", 0, hidden=128)
    run_converter("convert_lora_to_gguf.py", tmp_path / "other", "--base", STARTER, "--outfile", other)
    refused = [
        (tmp_path / "missing.gguf", "does not exist"),
        (text, "starts with b'not '"),
        (starter["base"], "expect general.type to be 'adapter'"),
        (truncated, "not within the file bounds"),
        (other, "wrong base model"),
    ]
    with open_engine(starter, "one") as engine:
        for path, reason in refused:
            with pytest.raises(ModelNotLoaded, match=reason) as caught:
                engine.swap_adapter(path).result()
            assert str(path) in str(caught.value)
            assert engine.spec.adapter == starter["one"]
        assert tokens(engine) == alone["one"]


def test_a_swap_can_be_canceled(starter, alone):
    with open_engine(starter, "one", parallel=1) as engine:
        running = engine.submit(ask(PROMPTS[0]))
        swap = engine.swap_adapter(starter["two"])
        after = engine.submit(ask(PROMPTS[0]))
        assert swap.cancel()
        assert [running.result().token_ids, after.result().token_ids] == [alone["one"][0]] * 2
        with pytest.raises(CancelledError):
            swap.result()
        assert engine.spec.adapter == starter["one"]


def test_the_previous_adapter_is_freed(starter, tmp_path):
    large = tmp_path / "large.gguf"
    write_adapter(STARTER, tmp_path / "large", 0, rank=256)
    run_converter("convert_lora_to_gguf.py", tmp_path / "large", "--base", STARTER, "--outfile", large)
    with open_engine(starter) as engine:
        child = psutil.Process(engine.pid)
        before = child.memory_info().rss
        for _ in range(100):
            engine.swap_adapter(large).result()
        kept = child.memory_info().rss - before
    assert kept < 50 * large.stat().st_size  # instead of 100; the allocator keeps about 12


def test_an_adapter_generates_as_in_transformers(stories, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:  # strong enough to change the story, too weak to leave only noise
            torch.nn.init.normal_(weights, std=0.15)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.generate(input_ids=torch.tensor([[1]]), max_new_tokens=30, do_sample=False, eos_token_id=2)[
        0, 1:
    ]
    run_converter("convert_lora_to_gguf.py", tmp_path / "adapter", "--base", STORIES, "--outfile", tmp_path / "a.gguf")

    request = GenerateRequest(prompt="", max_tokens=30)
    with Engine(ModelSpec(gguf=STORIES_GGUF, adapter=tmp_path / "a.gguf", context=128, parallel=2)) as engine:
        [found] = engine.generate([request])
    assert found.token_ids == expected.tolist()
    assert found.token_ids != stories.generate([request])[0].token_ids
