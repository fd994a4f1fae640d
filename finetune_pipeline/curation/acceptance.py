"""Which examples may train: one rule, asked by the dataset and by the sensor that counts what is new."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.quality import repetition
from finetune_pipeline.curation.quotas import Quota
from finetune_pipeline.curation.token_count import TokenCounter
from finetune_pipeline.records import Example, Turn, conversation_text
from finetune_pipeline.refusals import is_refusal
from finetune_pipeline.schemas import InvalidJsonError, Schema, compile_schema, parse_json
from finetune_pipeline.settings import CurationSettings

Validator = Callable[[str], str | None]
"""Gives None for a valid answer, else what is wrong with it."""


@dataclass(frozen=True)
class Decision:
    """Whether an example may train, and why not."""

    accepted: bool
    reason: str = "accepted"


@dataclass(frozen=True)
class Policy:
    """What the rule needs beside the example. It can be sent to other processes if its `problem` can.

    Attributes:
        problem: what is wrong with an answer; see `answer_validator`.
        tokens: counts tokens, where the settings limit them.
    """

    settings: CurationSettings
    benchmark: NearIndex
    problem: Validator
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    review_required: bool = False
    """Whether only what a reviewer approved or edited trains."""
    tokens: TokenCounter | None = None


def accept(example: Example, policy: Policy) -> Decision:
    """Decide on one example, already redacted, cheapest question first.

    A person's correction qualifies whatever its reward, which is its weight and no verdict; so does what a reviewer
    approved or edited.
    """
    glance = at_a_glance(example, policy)
    if not glance.accepted:
        return glance
    if not example.target.strip():
        return Decision(False, "answer is empty")
    if policy.problem(example.target) is not None:
        return Decision(False, INVALID)
    poor = _too_many_tokens(example, policy) or _poor_answer(example, policy.settings)
    if poor:
        return Decision(False, poor)
    overlap = _overlap(example.prompt, example.history, policy)
    return Decision(False, overlap) if overlap else Decision(True)


def _too_many_tokens(example: Example, policy: Policy) -> str:
    rules, tokens = policy.settings, policy.tokens
    if tokens is None:
        return ""
    most = rules.max_prompt_tokens
    if most is not None and tokens.more_than(conversation_text(example.prompt, example.history), most):
        return f"prompt longer than {most} tokens"
    most = rules.max_answer_tokens
    if most is not None and tokens.more_than(example.target, most):
        return f"answer longer than {most} tokens"
    return ""


def _poor_answer(example: Example, rules: CurationSettings) -> str:
    """Why an answer teaches nothing, or nothing.

    What a person wrote, or a reviewer approved, is as it should be; what a person found right may well be a refusal.
    """
    if example.corrected or example.review in APPROVED:
        return ""
    if not example.confirmed and is_refusal(example.target):
        return REFUSED
    return REPEATS if repetition(example.target) > rules.max_repetition else ""


def at_a_glance(example: Example, policy: Policy) -> Decision:
    """The part of the rule that reads no text, so that nobody has to redact what is refused anyway."""
    rules, reviewed = policy.settings, example.review in APPROVED
    if example.review == "reject":
        return Decision(False, REJECTED)
    if policy.review_required and not reviewed:
        return Decision(False, UNREVIEWED)
    if not (example.corrected or reviewed) and example.reward < rules.min_reward:
        return Decision(False, f"reward below {rules.min_reward:g}")
    # Missing confidence is not low confidence: nothing written by a person has one, nor answers of many servers.
    unsure = example.confidence is not None and example.confidence < rules.min_confidence
    if unsure and not (example.confirmed or example.corrected or reviewed):
        return Decision(False, f"confidence below {rules.min_confidence:g} and no person confirmed it")
    return _short_enough(example, rules)


def found_bad(example: Example, policy: Policy) -> bool:
    """Whether an example shows what the model should not have answered; the part of that rule that reads no text.

    It has to be the model's own answer, as far below zero as `min_reward` is above: a correction that somebody refused
    says nothing of what the model does. What is left to ask after its redaction is `near_benchmark`. Nothing of what a
    reviewer rejected trains, and where review is required, nothing that none has seen.
    """
    if example.review is not None or policy.review_required:
        return False
    disliked = example.reward < 0 and example.reward <= -policy.settings.min_reward
    own = example.output.strip() == example.target.strip() != ""
    return disliked and own and not example.corrected and _short_enough(example, policy.settings).accepted


def _short_enough(example: Example, rules: CurationSettings) -> Decision:
    if len(conversation_text(example.prompt, example.history)) > rules.max_prompt_chars:
        return Decision(False, f"prompt longer than {rules.max_prompt_chars} characters")
    if len(example.target) > rules.max_answer_chars:
        return Decision(False, f"answer longer than {rules.max_answer_chars} characters")
    return Decision(True)


APPROVED = frozenset({"approve", "edit"})
"""What a reviewer decides on an example that is to train."""
REJECTED = "rejected by a reviewer"
UNREVIEWED = "not approved by a reviewer"
CONFLICT = "same prompt, less trusted answer"
NEAR_BENCHMARK = "near-duplicate of a benchmark question"
CONTAINS_BENCHMARK = "contains, or is part of, a benchmark question"
OF_BENCHMARK = frozenset({NEAR_BENCHMARK, CONTAINS_BENCHMARK})
INVALID = "answer does not pass the output schema"
REFUSED = "answer is a refusal"
REPEATS = "answer repeats itself"


def near_benchmark(prompt: str, history: Sequence[Turn], policy: Policy) -> bool:
    """Whether a prompt, alone or with what was said before it, is near a question of the benchmark, or contains one.

    So it is too where the user asked one earlier in the conversation: its answer may stand there, and is trained on.

    Answers are not compared: the right answer of a benchmark question is that of many other questions too, and to learn
    it for those is what training is for.
    """
    return _overlap(prompt, history, policy) is not None


def _overlap(prompt: str, history: Sequence[Turn], policy: Policy) -> str | None:
    texts = {prompt, conversation_text(prompt, history), *(turn.content for turn in history if turn.role == "user")}
    if any(policy.benchmark.near(text, policy.settings.benchmark_similarity) for text in texts):
        return NEAR_BENCHMARK
    # The conversation holds all of them, and whatever question one of them does; but a prompt, or an earlier turn, may
    # be part of a question though the conversation is not.
    return CONTAINS_BENCHMARK if any(policy.benchmark.contains(text) for text in texts) else None


def answer_validator(schema: Schema | None) -> Validator:
    """What checks an answer: JSON under the schema, or for free text nothing. It can be sent to other processes.

    Args:
        schema: JSON Schema (draft 2020-12), or None for free text.
    """
    if schema is None:
        return _no_problem
    validator = _AnswerValidator(schema)
    validator.compiled  # noqa: B018  what is no schema is refused here
    return validator


def _no_problem(answer: str) -> None:
    return None


_PLAIN = """
    $schema $id title description default examples type enum const properties required additionalProperties items
    prefixItems minimum maximum exclusiveMinimum exclusiveMaximum minLength maxLength minItems maxItems minProperties
    maxProperties anyOf allOf oneOf not if then else
"""
_PLAIN_KEYWORDS = frozenset(_PLAIN.split())
"""Keywords of which nobody doubts the meaning: no patterns (each language has its own), formats or references."""


class _AnswerValidator:
    """Says what is wrong with an answer. Of a plain schema, right answers are told by a faster validator (in Rust)."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def __getstate__(self) -> dict[str, Any]:
        return {"_schema": self._schema}

    @cached_property
    def compiled(self) -> Any:
        return compile_schema(self._schema)

    @cached_property
    def fast(self) -> Any:
        if not _is_plain(self._schema):
            return None
        from jsonschema_rs import Draft202012Validator

        return Draft202012Validator(self._schema)

    def __call__(self, answer: str) -> str | None:
        try:
            value = parse_json(answer)
        except InvalidJsonError as error:
            return str(error)
        if self.fast is not None and self.fast.is_valid(value):
            return None
        first = next(self.compiled.iter_errors(value), None)
        return None if first is None else f"{first.json_path}: {first.message}"


def _is_plain(schema: Any) -> bool:
    """Whether a schema has keywords of the plain kind only."""
    if not isinstance(schema, dict):
        return isinstance(schema, bool)
    if not schema.keys() <= _PLAIN_KEYWORDS:
        return False
    parts = list(schema.get("properties", {}).values())
    parts += [part for name in ("prefixItems", "anyOf", "allOf", "oneOf") for part in schema.get(name, [])]
    parts += [schema[name] for name in ("additionalProperties", "items", "not", "if", "then", "else") if name in schema]
    return all(_is_plain(part) for part in parts)
