"""The rows of a dataset as conversations in tokens, and those that the chat template rejects. Loads transformers."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_pipeline.inference.chat_template import ChatTemplate, RenderedChat, tokenizer_chat_template
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.records import Turn, chat_messages
from finetune_pipeline.training.job import Rejection, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = 5  # rows that a rejection names


@dataclass(frozen=True)
class Conversation:
    """A row in tokens.

    Attributes:
        prompt: everything before the answer, with the generation prompt.
        answers: by column, prompt and answer; their start may differ from `prompt`.
        holds_control_tokens: whether its text contains a control token, which only these tokens keep as text.
    """

    prompt: list[int]
    answers: dict[str, list[int]]
    holds_control_tokens: bool

    @property
    def length(self) -> int:
        """Number of tokens with the longest answer."""
        return max(map(len, self.answers.values()))

    def shared(self) -> int:
        """Return the number of leading tokens that the prompt and all answers share."""
        shortest = min(len(self.prompt), *map(len, self.answers.values()))
        every = [self.prompt, *self.answers.values()]
        return next((place for place in range(shortest) if len({ids[place] for ids in every}) > 1), shortest)


@dataclass(frozen=True)
class Rejected:
    """A row that the chat template rejects."""

    reason: str
    provenance: str


def messages_of(row: dict[str, Any], system_prompt: str) -> list[dict[str, str]]:
    """Return the messages before the answer of a row."""
    return chat_messages(system_prompt, row["prompt"], [Turn.model_validate(turn) for turn in row["history"]])


def conversations(
    rows: Sequence[dict[str, Any]], answers: Sequence[str], system_prompt: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[Conversation | Rejected]:
    """Tokenize rows as in service: control tokens in messages are text, only the template writes real ones.

    Args:
        rows: of a dataset, with `prompt` and `history`.
        answers: the columns that hold an answer.
        system_prompt: put before every prompt.
        tokenizer: the base model's.

    Raises:
        TrainingError: the base model has no chat template that can be used.
    """
    try:
        template = tokenizer_chat_template(tokenizer)
    except RequestRefused as error:
        raise TrainingError(str(error)) from error
    rendered = [_rendered(template, row, answers, system_prompt) for row in rows]
    whole = [texts for texts in rendered if not isinstance(texts, Rejected) and not any(text.escaped for text in texts)]
    encoded = iter(template.encode([text for texts in whole for text in texts]))  # in one batch, which is much faster
    found: list[Conversation | Rejected] = []
    for row, texts in zip(rows, rendered, strict=True):
        if isinstance(texts, Rejected):
            found.append(texts)
            continue
        cut = any(text.escaped for text in texts)
        try:
            prompt, *rest = template.encode(texts) if cut else [next(encoded) for _ in texts]
        except RequestRefused as error:
            found.append(Rejected(str(error), provenance(row)))
            continue
        found.append(Conversation(prompt, dict(zip(answers, rest, strict=True)), cut))
    return found


def _rendered(
    template: ChatTemplate, row: dict[str, Any], answers: Sequence[str], system_prompt: str
) -> list[RenderedChat] | Rejected:
    asked = messages_of(row, system_prompt)
    whole = [[*asked, {"role": "assistant", "content": row[name]}] for name in answers]
    try:
        return [template.render(asked), *(template.render(one, add_generation_prompt=False) for one in whole)]
    except RequestRefused as error:
        return Rejected(str(error), provenance(row))


def provenance(row: dict[str, Any]) -> str:
    """Return where a row comes from."""
    interaction = row.get("interaction_id")
    parts = [row.get("source"), row.get("provenance"), f"interaction {interaction}" if interaction else None]
    return ", ".join(filter(None, parts)) or "unknown"


def rejections(rejected: Iterable[Rejected], of: int, split: str) -> tuple[Rejection, ...]:
    """Count rejected rows by reason, and log the counts.

    Args:
        rejected: the rejected rows.
        of: number of all rows.
        split: train or validation.
    """
    by_reason: dict[str, list[str]] = {}
    for row in rejected:
        by_reason.setdefault(row.reason, []).append(row.provenance)
    counted = tuple(
        Rejection(split=split, reason=reason, count=len(rows), examples=tuple(rows[:_NAMED]))
        for reason, rows in by_reason.items()
    )
    for one in counted:
        print(f"left out {one.count} of {of} {split} examples: {one}", file=sys.stderr, flush=True)
    return counted
