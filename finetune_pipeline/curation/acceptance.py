"""The acceptance policy: which examples may train. Curation asks it, and so does the count of new examples."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.records import Example, Turn, conversation_text, same_answer
from finetune_pipeline.refusals import is_refusal
from finetune_pipeline.schemas import Validator
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline.words import is_sign, visible_form, words

APPROVED = frozenset({"approve", "edit"})
"""Decisions of a reviewer by which an example may train."""

REJECTED = "rejected by a reviewer"
UNREVIEWED = "not approved by a reviewer"
CONFLICT = "same prompt, less trusted answer"
NEAR_BENCHMARK = "near-duplicate of a benchmark question"
CONTAINS_BENCHMARK = "contains, or is part of, a benchmark question"
BENCHMARK_REASONS = frozenset({NEAR_BENCHMARK, CONTAINS_BENCHMARK})
INVALID = "answer does not pass the output schema"
REFUSAL = "answer is a refusal"
REPETITIVE = "answer repeats itself"


@dataclass(frozen=True)
class Quota:
    """The most that a source may give: a number of examples, and a fraction of the dataset (0 to 1)."""

    max_examples: int | None = None
    max_fraction: float = 1.0


@dataclass(frozen=True)
class Policy:
    """Everything that decides which examples may train. It can be pickled if its `problem` can.

    Attributes:
        benchmark: an index of the benchmark's questions.
        problem: what is wrong with an answer; see `answer_validator`.
        quotas: source -> its quota.
        review_required: only examples that a reviewer approved or edited may train.
        tokens: counts tokens, where the settings limit them.
    """

    settings: CurationSettings
    benchmark: NearIndex
    problem: Validator
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    review_required: bool = False
    tokens: "TokenCounter | None" = None


@dataclass(frozen=True)
class Decision:
    """The decision on whether an example may train, with the reason if not."""

    accepted: bool
    reason: str = "accepted"


# --- Examples ---------------------------------------------------------------------------------------------------------


def accept(example: Example, policy: Policy) -> Decision:
    """Decide on a redacted example, with the cheapest filters first.

    A correction by a person, and an example that a reviewer approved or edited, may train with any reward.
    """
    settings = policy.settings
    decision = quick_filters(example, policy)
    if not decision.accepted:
        return decision
    if not visible_form(example.target):
        return Decision(False, "answer is empty")
    if policy.problem(example.target) is not None:
        return Decision(False, INVALID)
    if policy.tokens is not None:
        most = settings.max_prompt_tokens
        prompt = conversation_text(example.prompt, example.history)
        if most is not None and policy.tokens.more_than(prompt, most):
            return Decision(False, f"prompt longer than {most} tokens")
        most = settings.max_answer_tokens
        if most is not None and policy.tokens.more_than(example.target, most):
            return Decision(False, f"answer longer than {most} tokens")
    # What a person wrote or a reviewer approved is taken as it is; an answer that a person confirmed may be a refusal.
    if not (example.corrected or example.review in APPROVED):
        if not example.confirmed and is_refusal(example.target):
            return Decision(False, REFUSAL)
        if repeated_fraction(example.target) > settings.max_repetition:
            return Decision(False, REPETITIVE)
    overlap = benchmark_overlap(example.prompt, example.history, policy)
    return Decision(True) if overlap is None else Decision(False, overlap)


def quick_filters(example: Example, policy: Policy) -> Decision:
    """Decide by everything but the content of the texts, so that most refused examples need no redaction."""
    settings, approved = policy.settings, example.review in APPROVED
    if example.review == "reject":
        return Decision(False, REJECTED)
    if policy.review_required and not approved:
        return Decision(False, UNREVIEWED)
    if not example.qualifies(settings.min_reward):
        return Decision(False, f"reward below {settings.min_reward:g}")
    # Missing confidence is not low confidence: answers by people and by many servers have none.
    unsure = example.confidence is not None and example.confidence < settings.min_confidence
    if unsure and not (example.confirmed or example.corrected or approved):
        return Decision(False, f"confidence below {settings.min_confidence:g} and no person confirmed it")
    return _length_filter(example, settings)


def is_undesirable(example: Example, policy: Policy) -> bool:
    """Return True if the output of an example is an undesirable answer, by everything but the content of its texts.

    It has to be the model's own answer, as a refused correction says nothing about the model, and its reward as far
    below zero as `min_reward` is above. Reviewed examples are never undesirable, and where review is required, none is.
    The caller still has to redact it and to ask `benchmark_overlap`.
    """
    if example.review is not None or policy.review_required:
        return False
    disliked = example.reward < 0 and example.reward <= -policy.settings.min_reward
    own = bool(example.output.strip()) and same_answer(example.output, example.target)
    return disliked and own and not example.corrected and _length_filter(example, policy.settings).accepted


def has_rejected_output(example: Example, max_answer_chars: int) -> bool:
    """Return True if a person corrected the model's output to another answer: the two make a preference pair.

    The same JSON in another notation is the same answer. A pair of it would teach the notation only.
    """
    usable = bool(example.output.strip()) and len(example.output) <= max_answer_chars
    return example.corrected and usable and not same_answer(example.output, example.target)


def _length_filter(example: Example, settings: CurationSettings) -> Decision:
    if len(conversation_text(example.prompt, example.history)) > settings.max_prompt_chars:
        return Decision(False, f"prompt longer than {settings.max_prompt_chars} characters")
    if len(example.target) > settings.max_answer_chars:
        return Decision(False, f"answer longer than {settings.max_answer_chars} characters")
    return Decision(True)


def benchmark_overlap(prompt: str, history: Sequence[Turn], policy: Policy) -> str | None:
    """Return how a prompt overlaps with a benchmark question, one of BENCHMARK_REASONS, or None.

    The prompt is compared alone and with the turns before it. So is each earlier turn of the user, since its answer
    stands in the conversation and is trained on.

    Answers are not compared: the right answer to a benchmark question is the right answer to many other questions too,
    which training is meant to teach.
    """
    texts = {prompt, conversation_text(prompt, history), *(turn.content for turn in history if turn.role == "user")}
    if any(policy.benchmark.near(text, policy.settings.benchmark_similarity) for text in texts):
        return NEAR_BENCHMARK
    # All texts, not just the conversation: a prompt or turn may be part of a question though the conversation is not.
    return CONTAINS_BENCHMARK if any(policy.benchmark.contains(text) for text in texts) else None


# --- Answers ----------------------------------------------------------------------------------------------------------

_RUN_WORDS = 10
_RUN_SIGNS = 25  # about as many words; parallel sentences share runs of 10 signs
_MIN_WORDS = 30
_MAX_WORD_CHARS = 20  # on average; no language has such long words


def repeated_fraction(text: str) -> float:
    """Return the fraction of a text (0 to 1, by characters) in n-grams that occurred before: 10 words or 25 signs.

    This is one of the measures by which Rae et al. (2021, "Scaling Language Models: Methods, Analysis & Insights from
    Training Gopher", table A1) filter pages, there for word 5-grams to 10-grams. A text of fewer than 30 words has 0.
    A text of symbols, or of endless words, is measured by its characters instead of its words. Characters and the signs
    of scripts without spaces need longer runs: 10 of them are only a few words.
    """
    if len(text) < _MIN_WORDS:
        return 0.0
    found = words(text)
    run_length = _RUN_SIGNS if 2 * sum(map(is_sign, found)) > len(found) else _RUN_WORDS
    if len(text) > _MAX_WORD_CHARS * len(found):
        characters = "".join(text.split())
        if len(characters) > _MAX_WORD_CHARS * len(found):
            found, run_length = list(characters), _RUN_SIGNS
    if len(found) < _MIN_WORDS:
        return 0.0
    seen: Counter[tuple[str, ...]] = Counter()
    repeated = [False] * len(found)
    for start in range(len(found) - run_length + 1):
        run = tuple(found[start : start + run_length])
        seen[run] += 1
        if seen[run] > 1:
            repeated[start : start + run_length] = [True] * run_length
    total = sum(map(len, found))
    return sum(len(word) for word, again in zip(found, repeated, strict=True) if again) / total


# --- Tokens -----------------------------------------------------------------------------------------------------------

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer's file in a model's folder.

    Raises:
        CurationError: the folder has neither tokenizer.json nor tokenizer.model.
    """
    path = next((folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CurationError(
            f"{folder} has neither of {', '.join(_TOKENIZER_FILES)}, so tokens cannot be counted; remove "
            "curation.max_prompt_tokens and max_answer_tokens, or choose a base model with one of these files"
        )
    return path


class TokenCounter:
    """Counts tokens with a base model's tokenizer, without torch or transformers; pickling it copies the file along."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer's file of a model's folder.

        Raises:
            CurationError: the folder has neither tokenizer.json nor tokenizer.model.
        """
        path = tokenizer_file(folder)
        self._name, self._content = path.name, path.read_bytes()

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_content": self._content}

    @cached_property
    def _encode(self) -> Callable[[str], Any]:
        if self._name == "tokenizer.json":
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_buffer(self._content)
            return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_proto=self._content)
        return lambda text: model.encode(text)

    def more_than(self, text: str, limit: int) -> bool:
        """Return True if a text has more tokens than `limit`."""
        if text.isascii() and len(text) < limit:
            return False  # no token of ASCII text is shorter than a character
        return self.count(text) > limit

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without the chat template's."""
        return len(self._encode(text))
