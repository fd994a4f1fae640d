"""What an answer should have been, and what it should not have been: pairs for DPO, labelled answers for KTO.

Both are drawn from examples that are redacted already, and say nothing that the training set contradicts: of one
question, the answer to learn is the same in all three.
"""

from dataclasses import dataclass

from finetune_pipeline.records import Example, Turn, conversation_text


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
        return conversation_text(self.prompt, self.history)


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
        return conversation_text(self.prompt, self.history)


def shows_a_fault(example: Example, max_answer_chars: int) -> bool:
    """Whether a person corrected the model's answer into another one."""
    usable = bool(example.output.strip()) and len(example.output) <= max_answer_chars
    return example.corrected and usable and not _same(example.output, example.target)


def _same(answer: str, other: str) -> bool:
    return answer.strip() == other.strip()
