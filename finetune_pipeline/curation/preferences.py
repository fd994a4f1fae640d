"""What an answer should have been, and what it should not have been: pairs for DPO, labelled answers for KTO.

Both are drawn from examples that are redacted already, and say nothing that the training set contradicts: of one
question, the answer to learn is the same in all three.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune_pipeline.records import Example, Turn, conversation, text_hash

PAIRS = "pairs"
LABELLED = "labelled"
PAIR_COLUMNS = {
    "prompt": "string", "history": "turns", "chosen": "string", "rejected": "string", "interaction_id": "string"
}  # fmt: skip
LABELLED_COLUMNS = {
    "prompt": "string", "history": "turns", "completion": "string", "label": "bool", "interaction_id": "string"
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A corrected answer beside the one that the model gave."""

    prompt: str
    history: tuple[Turn, ...]
    chosen: str
    rejected: str
    interaction_id: str

    @property
    def question(self) -> str:
        """The prompt with what was said before it."""
        return conversation(self.prompt, self.history)


@dataclass(frozen=True)
class Labelled:
    """An answer that was found good (label true) or bad."""

    prompt: str
    history: tuple[Turn, ...]
    completion: str
    label: bool
    interaction_id: str | None

    @property
    def question(self) -> str:
        """The prompt with what was said before it."""
        return conversation(self.prompt, self.history)


def pairs(accepted: Iterable[Example], targets: Mapping[str, str], max_answer_chars: int) -> list[Pair]:
    """At most one pair a question: the most trusted correction that agrees with the training set.

    Args:
        accepted: examples that may train, the most trusted first.
        targets: what the training set answers, by text_hash of the question.
        max_answer_chars: a longer answer of the model makes no pair.
    """
    found: dict[str, Pair] = {}
    for example in accepted:
        key = text_hash(conversation(example.prompt, example.history))
        if shows_a_fault(example, max_answer_chars) and _same(example.target, targets[key]):
            pair = Pair(example.prompt, example.history, example.target, example.output, str(example.interaction_id))
            found.setdefault(key, pair)
    return [found[key] for key in sorted(found)]


def undesirable(
    accepted: Iterable[Example], bad: Iterable[Example], targets: Mapping[str, str], max_answer_chars: int
) -> list[Labelled]:
    """At most one bad answer a question: what a person corrected first, then the worst rewarded, then the newest.

    Args:
        accepted: examples that may train; the model's answers that were corrected among them are bad ones.
        bad: examples whose answer was found bad.
        targets: as for `pairs`; an answer that the training set teaches is never a bad one.
        max_answer_chars: longer answers of the model are left out.
    """
    candidates = [*(example for example in accepted if shows_a_fault(example, max_answer_chars)), *bad]
    found: dict[str, Labelled] = {}
    for example in sorted(candidates, key=_how_bad, reverse=True):
        key = text_hash(conversation(example.prompt, example.history))
        if not _same(example.output, targets.get(key)):
            answer = Labelled(example.prompt, example.history, example.output, False, str(example.interaction_id))
            found.setdefault(key, answer)
    return [found[key] for key in sorted(found)]


def shows_a_fault(example: Example, max_answer_chars: int) -> bool:
    """Whether a person corrected the model's answer into another one."""
    usable = bool(example.output.strip()) and len(example.output) <= max_answer_chars
    return example.corrected and usable and not _same(example.output, example.target)


def _how_bad(example: Example) -> tuple[bool, float, int]:
    return example.corrected, -example.reward, example.sequence


def _same(answer: str, other: str | None) -> bool:
    return other is not None and answer.strip() == other.strip()
