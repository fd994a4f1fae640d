"""What callers send to a model and get from it, and how it crosses the pipe as JSON lines.

From parent to child, one object a line. The first is `load`; the end of the stream means "exit":

    {"op": "load", "spec": ModelSpec}                      {"op": "tokenize", "id": 1, "text": ...}
    {"op": "generate", "id": 2, "request": ..., "stream": false}
    {"op": "render", "id": 3, "messages": [...]}           {"op": "encode", "id": 5, "messages": [...]}
    {"op": "swap", "id": 4, "adapter": path or null}       {"op": "cancel", "id": 2}
    {"op": "current"}

From child to parent:

    {"id": 2, "result": ...}   {"id": 2, "delta": "text"}   {"id": 2, "error": "RequestRefused", "message": ...}
    {"id": 4, "result": null, "adapter": path or null}      later completions are generated with this adapter
    {"heartbeat": true}                                     the child makes progress; sent while there is work
    {"current": 2}                                          id of the request whose token is being sampled, or 0
"""

import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from finetune_pipeline.records import Message, Record

LOAD_ID = 0
"""The id under which the child answers `load`."""

SEEDS = 2**32 - 1
"""Seeds are below this: llama.cpp reads the highest 32-bit number as "a random seed each time"."""


class ModelSpec(Record):
    """The model to load, and the resources it may use."""

    gguf: Path
    adapter: Path | None = Field(default=None, description="LoRA adapter as GGUF, applied at scale 1.")
    context: int = Field(default=2048, ge=16, description="Tokens of prompt and completion, for each sequence.")
    parallel: int = Field(default=8, ge=1, le=64, description="Sequences decoded together.")
    threads: int | None = Field(default=None, ge=1, description="Most threads; default: chosen by the model's size.")
    fixed_threads: bool = Field(
        default=False, description="Always use that many threads, also under background load; for timing."
    )
    stuck_seconds: float = Field(
        default=120, ge=1, description="Time without progress after which the process is killed as stuck."
    )


class GenerateRequest(Record):
    """A request for one completion: either `messages`, rendered by the model's chat template, or a raw `prompt`.

    Messages are tokenized as text, including control tokens in them. A raw prompt is for trusted text, such as a
    rendered template: control tokens in it are parsed, and it gets a beginning-of-sequence token if the file asks for
    one (`tokenizer.ggml.add_bos_token`) and the prompt does not start with it.
    """

    messages: list[Message] | None = None
    prompt: str | None = None
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy decoding.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Probability mass to sample from, after temperature.")
    seed: int | None = Field(
        default=None, ge=0, lt=SEEDS, description="Seed above temperature 0; default: a random one."
    )
    stop: tuple[str, ...] = Field(default=(), description="Texts that end the completion; they are not part of it.")
    json_schema: dict[str, Any] | None = Field(
        default=None, description="Constrain the completion to JSON of this schema."
    )

    @model_validator(mode="after")
    def _has_one_input(self) -> "GenerateRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either `messages` or `prompt`, exactly one")
        if "" in self.stop:
            raise ValueError("an empty stop text would end every completion at once; leave it out")
        return self

    def pick_seed(self) -> int | None:
        """Return the seed for one completion: the given one, or a random one; None at temperature 0."""
        if self.temperature == 0:
            return None
        return secrets.randbelow(SEEDS) if self.seed is None else self.seed


class Completion(Record):
    """A finished completion with its tokens.

    The joined token texts are the text, except that the text ends before a stop text. The end-of-generation token is
    not included. A token that is an incomplete part of a character has an empty text; the token that completes the
    character has it.
    """

    text: str
    token_ids: list[int]
    token_texts: list[str]
    token_logprobs: list[float] = Field(
        description="Natural log of each token's probability before temperature, top_p and schema."
    )
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    prompt_seconds: float = Field(description="Wall time from its first batch until its first token was sampled.")
    generation_seconds: float = Field(description="Wall time from its first token until its end.")
    confidence: float | None = Field(description="Lowest probability among the tokens of its values.")
    seed: int | None = Field(default=None, description="The seed that was used; None at temperature 0.")


class EngineInfo(Record):
    """The loaded model, and the build of llama.cpp that runs it."""

    n_params: int
    n_vocab: int
    context_train: int = Field(description="Context length that the model was trained with.")
    context: int = Field(description="Tokens of one sequence: the spec's context, at most context_train.")
    build: str = Field(description="Versions of llama-cpp-python and llama.cpp.")
    threads: int
