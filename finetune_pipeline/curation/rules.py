"""Which examples may train: one rule, asked by the dataset and by the sensor that counts what is new."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from finetune_pipeline.curation.duplicates import NearIndex
from finetune_pipeline.curation.quotas import Quota
from finetune_pipeline.records import Example, Turn, conversation
from finetune_pipeline.schemas import Schema, Unreadable, compile_schema, parse_json
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
    """What the rule needs beside the example."""

    settings: CurationSettings
    benchmark: NearIndex
    problem: Validator
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    review_required: bool = False
    """Whether only what a reviewer approved or edited trains."""


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
        return Decision(False, "answer does not pass the output schema")
    if near_benchmark(example.prompt, example.history, policy):
        return Decision(False, NEAR_BENCHMARK)
    return Decision(True)


def at_a_glance(example: Example, policy: Policy) -> Decision:
    """The part of the rule that reads no text, so that nobody has to redact what is refused anyway."""
    rules, reviewed = policy.settings, example.review in {"approve", "edit"}
    if example.review == "reject":
        return Decision(False, REJECTED)
    if policy.review_required and not reviewed:
        return Decision(False, UNREVIEWED)
    if not (example.corrected or reviewed) and example.reward < rules.min_reward:
        return Decision(False, f"reward below {rules.min_reward:g}")
    sure = example.confidence is not None and example.confidence >= rules.min_confidence
    written = example.source is not None and example.confidence is None  # by no model whose confidence one could ask
    if not (sure or written or example.confirmed or example.corrected or reviewed):
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
    if len(conversation(example.prompt, example.history)) > rules.max_prompt_chars:
        return Decision(False, f"prompt longer than {rules.max_prompt_chars} characters")
    if len(example.target) > rules.max_answer_chars:
        return Decision(False, f"answer longer than {rules.max_answer_chars} characters")
    return Decision(True)


REJECTED = "rejected by a reviewer"
UNREVIEWED = "not approved by a reviewer"
NEAR_BENCHMARK = "near-duplicate of a benchmark question"


def near_benchmark(prompt: str, history: Sequence[Turn], policy: Policy) -> bool:
    """Whether a prompt, alone or with what was said before it, is too similar to a question of the benchmark."""
    for text in {prompt, conversation(prompt, history)}:
        nearest = policy.benchmark.nearest(text)
        if nearest is not None and nearest[1] >= policy.settings.benchmark_similarity:
            return True
    return False


def answer_validator(schema: Schema | None) -> Validator:
    """What checks an answer: JSON under the schema, or for free text nothing.

    Args:
        schema: JSON Schema (draft 2020-12), or None for free text.
    """
    if schema is None:
        return lambda answer: None
    validator = compile_schema(schema)

    def problem(answer: str) -> str | None:
        try:
            first = next(validator.iter_errors(parse_json(answer)), None)
        except Unreadable as error:
            return str(error)
        return None if first is None else f"{first.json_path}: {first.message}"

    return problem
