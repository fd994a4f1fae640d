"""What is asked of a model and what it answers: the values that callers use, and that cross the pipe as JSON lines.

Parent to child, one object a line; the first is `load`, the end of the stream means "exit":

    {"op": "load", "spec": ModelSpec}                     {"op": "tokenize", "id": 1, "text": ...}
    {"op": "generate", "id": 2, "request": ..., "stream": false}
    {"op": "render", "id": 3, "messages": [...]}          {"op": "encode", "id": 5, "messages": [...]}
    {"op": "swap", "id": 4, "adapter": path or null}      {"op": "cancel", "id": 2}
    {"op": "where"}

Child to parent:

    {"id": 2, "result": ...}   {"id": 2, "piece": "text"}   {"id": 2, "error": "RequestRefused", "message": ...}
    {"id": 4, "result": null, "adapter": path or null}      from here on all answers are by this adapter
    {"beat": true}                                          there is progress; sent repeatedly while there is work
    {"at": 2}                                               answer to `where`: whose token is being chosen, 0: none
"""

import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from finetune_pipeline.records import Message, Record

LOAD_ID = 0
"""The id under which the child answers `load`."""

SEEDS = 2**32 - 1
"""Seeds are 0 or above, and below this: llama.cpp reads the highest 32-bit number as "a random seed each time"."""


class ModelSpec(Record):
    """Which model runs, and how much of it at once."""

    gguf: Path
    adapter: Path | None = Field(default=None, description="A LoRA adapter as GGUF, applied at scale 1.")
    context: int = Field(default=2048, ge=16, description="Tokens of prompt and answer together, for each sequence.")
    parallel: int = Field(default=8, ge=1, le=64, description="Sequences decoded together.")
    threads: int | None = Field(default=None, ge=1, description="At most this many; None chooses by the model's size.")
    fixed_threads: bool = Field(default=False, description="Always use that many, also beside other work: for timing.")
    stuck_seconds: float = Field(
        default=120, ge=1, description="Time without progress after which the process counts as stuck and is ended."
    )


class GenerateRequest(Record):
    """One thing to answer: either `messages`, put through the model's chat template, or `prompt`, a raw text.

    Messages are tokenized as text, including control tokens in them. A raw prompt is for trusted text, such as a
    rendered template: it starts with the beginning-of-sequence token if the file asks for one
    (`tokenizer.ggml.add_bos_token`) and the text does not already start with it; special tokens in it are parsed.
    """

    messages: list[Message] | None = None
    prompt: str | None = None
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0, description="0 takes the most probable token always.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Share of probability to draw from, after temperature.")
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=SEEDS,
        description="Seed of the sampling; None picks a random one. Only above temperature 0.",
    )
    stop: tuple[str, ...] = Field(default=(), description="Texts that end the answer; they are not part of it.")
    json_schema: dict[str, Any] | None = Field(
        default=None, description="The answer is JSON of this schema; one that cannot be enforced is refused by name."
    )

    @model_validator(mode="after")
    def _has_one_input(self) -> "GenerateRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either `messages` or `prompt`, exactly one")
        if "" in self.stop:
            raise ValueError("an empty stop text would end every answer at once; leave it out")
        return self

    def pick_seed(self) -> int | None:
        """Return the seed for one answer: the given one, or a random one; None at temperature 0."""
        if self.temperature == 0:
            return None
        return secrets.randbelow(SEEDS) if self.seed is None else self.seed


class Completion(Record):
    """An answer, token by token.

    The texts of the tokens joined are the text, except that the text ends before a stop text. The token that ends an
    answer is not among them. A token that is only a part of a character has an empty text; the part that completes
    it has the character.
    """

    text: str
    token_ids: list[int]
    token_texts: list[str]
    token_logprobs: list[float] = Field(
        description="Natural log of the probability that the model itself gave to each chosen token: before "
        "temperature, top_p and schema."
    )
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    prompt_seconds: float = Field(
        description="From its start in the batch until its first token was chosen; wall time."
    )
    generation_seconds: float = Field(description="From its first token until its end; wall time, shared by the batch.")
    confidence: float | None = Field(description="Lowest probability among the tokens of the values; see `confidence`.")
    seed: int | None = Field(default=None, description="The seed that it was sampled with; None at temperature 0.")


class EngineInfo(Record):
    """What runs: the model as its file describes it, and the build of llama.cpp that runs it."""

    description: str = Field(description="llama.cpp's own, such as `llama 3B Q4_K - Medium`.")
    n_params: int
    n_vocab: int
    context_train: int = Field(description="Tokens that the model was trained for.")
    context: int = Field(description="Tokens that a sequence may have here: the spec's, at most context_train.")
    size_bytes: int = Field(description="Bytes of all tensors.")
    chat_template: str | None
    build: str = Field(description="Versions of llama-cpp-python and llama.cpp.")
    system: str = Field(description="What llama.cpp was built to use of the processor.")
    threads: int
