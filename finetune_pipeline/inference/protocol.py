"""What callers send to a model and get from it, and how it crosses the pipe as JSON lines.

From parent to child, one object a line. The first is `load`; the end of the stream means "exit":

    {"op": "load", "spec": ModelSpec}                      {"op": "tokenize", "id": 1, "text": ...}
    {"op": "generate", "id": 2, "request": ..., "stream": false}
    {"op": "render", "id": 3, "messages": [...]}           {"op": "encode", "id": 5, "messages": [...]}
    {"op": "swap", "id": 4, "adapter": path or null}       {"op": "cancel", "id": 2}
    {"op": "current"}

From child to parent:

    {"id": 2, "result": ...}   {"id": 2, "delta": Delta}    {"id": 2, "error": "RequestRefused", "message": ...}
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

END_TOKENS = "finetune.end_token_ids"
"""Key in a GGUF: ids of all tokens that end an answer, separated by commas. llama.cpp has keys for three of them."""

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

    At temperature 0 only the penalties, `logit_bias` and `ignore_eos` change the answer. The order is llama.cpp's
    (logit_bias, penalties, top_k, typical_p, min_p, temperature, top_p), except that top_p follows the temperature.

    Messages are tokenized as text, including control tokens in them. A raw prompt is for trusted text, such as a
    rendered template: control tokens in it are parsed, and it gets a beginning-of-sequence token if the file asks for
    one (`tokenizer.ggml.add_bos_token`) and the prompt does not start with it.
    """

    messages: list[Message] | None = None
    prompt: str | None = None
    max_tokens: int = Field(ge=0, description="0 only with score_prompt.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy decoding.")
    top_p: float = Field(default=1.0, ge=0, le=1, description="Probability mass to sample from, after temperature.")
    seed: int | None = Field(
        default=None, ge=0, lt=SEEDS, description="Seed above temperature 0; default: a random one."
    )
    top_k: int = Field(default=0, ge=0, description="Number of most probable tokens to sample from; 0: all.")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Smallest probability, as a fraction of the most probable token's."
    )
    typical_p: float = Field(default=1.0, gt=0, le=1, description="Probability mass of locally typical tokens.")
    repeat_penalty: float = Field(
        default=1.0, gt=0, description="Divides positive logits of the last tokens of prompt and answer; 1: none."
    )
    repeat_last_n: int = Field(default=64, ge=0, description="Tokens that repeat_penalty looks back at.")
    presence_penalty: float = Field(default=0.0, description="Subtracted from the logits of the answer's tokens.")
    frequency_penalty: float = Field(default=0.0, description="The same, times how often the token occurred.")
    logit_bias: dict[int, float | None] = Field(
        default_factory=dict, description="Added to the logits of these tokens; null excludes the token."
    )
    ignore_eos: bool = Field(default=False, description="Never end before max_tokens or a stop text.")
    logprobs: bool = Field(default=False, description="Deltas carry their tokens.")
    top_logprobs: int = Field(default=0, ge=0, le=20, description="Most probable tokens to report at each position.")
    stop: tuple[str, ...] = Field(default=(), description="Texts that end the completion; they are not part of it.")
    json_schema: dict[str, Any] | None = Field(
        default=None, description="Constrain the completion to JSON of this schema."
    )
    prefill: str = Field(default="", description="Beginning of the answer, which the completion continues.")
    score_prompt: bool = Field(default=False, description="Return the log-probabilities of the raw prompt's tokens.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further variables of the chat template."
    )

    @model_validator(mode="after")
    def _has_one_input(self) -> "GenerateRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either `messages` or `prompt`, exactly one")
        if self.score_prompt and (self.prompt is None or self.prefill):
            raise ValueError("only a raw prompt can be scored")
        if not self.max_tokens and not self.score_prompt:
            raise ValueError("max_tokens must be at least 1, except for a prompt that is only scored")
        if "" in self.stop:
            raise ValueError("an empty stop text would end every completion at once; leave it out")
        if self.json_schema is not None and (self.prefill or self.ignore_eos):
            raise ValueError("a completion with a json_schema can neither have a prefill nor ignore its end")
        return self

    def pick_seed(self) -> int | None:
        """Return the seed for one completion: the given one, or a random one; None at temperature 0."""
        if self.temperature == 0:
            return None
        return secrets.randbelow(SEEDS) if self.seed is None else self.seed


class TopLogprob(Record):
    """One of the most probable tokens at a position; `text` has a replacement character for incomplete bytes."""

    text: str
    bytes: list[int]
    logprob: float


class Tokens(Record):
    """Tokens of an answer, in parallel lists; `top_logprobs` is empty unless the request asks for it."""

    token_texts: list[str] = Field(default_factory=list)
    token_logprobs: list[float] = Field(
        default_factory=list,
        description="Natural log of each token's probability before sampling parameters and schema.",
    )
    top_logprobs: list[list[TopLogprob]] = Field(
        default_factory=list, description="The most probable tokens, best first."
    )


class Delta(Tokens):
    """Text that became final, and its tokens if the request asks for log-probabilities."""

    text: str


class PromptTokens(Record):
    """Tokens of a scored prompt, in parallel lists, without a beginning-of-sequence token that was added.

    The first token of a sequence has no log-probability.
    """

    token_texts: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[list[TopLogprob]]


class Completion(Tokens):
    """A finished completion with its tokens.

    The joined token texts are the text, except that the text ends before a stop text. The end-of-generation token is
    not included. A token that is an incomplete part of a character has an empty text; the token that completes the
    character has it.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = Field(
        default=0, description="Tokens of the prompt that were in the KV cache, from a request with the same beginning."
    )
    prompt_seconds: float = Field(description="Wall time from its first batch until its first token was sampled.")
    generation_seconds: float = Field(description="Wall time from its first token until its end.")
    confidence: float | None = Field(description="Lowest probability among the tokens of its values.")
    seed: int | None = Field(default=None, description="The seed that was used; None at temperature 0.")
    scored: PromptTokens | None = Field(default=None, description="The prompt, if the request asks for its scores.")


class EngineInfo(Record):
    """The loaded model, and the build of llama.cpp that runs it."""

    n_params: int
    n_vocab: int
    context_train: int = Field(description="Context length that the model was trained with.")
    context: int = Field(description="Tokens of one sequence: the spec's context, at most context_train.")
    build: str = Field(description="Versions of llama-cpp-python and llama.cpp.")
    threads: int
    own_ends: list[int] = Field(
        default=[], description="Tokens that end a completion here only: a GGUF has keys for three ends."
    )
