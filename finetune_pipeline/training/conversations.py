"""Dataset rows as tokenized conversations, and the rows that the chat template rejects. Loads transformers."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_pipeline.inference.chat_template import RenderedChat, tokenizer_chat_template
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.records import Turn, chat_messages
from finetune_pipeline.training.job import Rejection, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token without a loss, in PyTorch and Hugging Face."""

_THOUGHTS = (
    "its completion has thoughts (</think>), which the chat template writes before the answer, but models answer "
    "without thoughts in service; remove them from the completion"
)
_NAMED_ROWS = 5  # rows that a rejection names


@dataclass(frozen=True)
class TokenizedRow:
    """A row's conversation as token ids.

    Attributes:
        prompt: everything before the completion, with the generation prompt.
        conversations: by column of a completion, the prompt with that completion. Their first tokens may differ from
            `prompt`, since a template may write a finished turn differently.
        holds_control_tokens: the text contains a control token of the model, which only these ids keep as text.
    """

    prompt: list[int]
    conversations: dict[str, list[int]]
    holds_control_tokens: bool

    @property
    def length(self) -> int:
        """Number of tokens of the longest conversation."""
        return max(map(len, self.conversations.values()))

    def shared(self) -> int:
        """Return the number of leading tokens that the prompt and all conversations share."""
        every = [self.prompt, *self.conversations.values()]
        same = (len(set(tokens)) == 1 for tokens in zip(*every, strict=False))
        return next((index for index, shared in enumerate(same) if not shared), min(map(len, every)))

    def labels(self) -> list[int]:
        """Return the labels of the only conversation: its tokens from the first one that differs from the prompt."""
        [ids] = self.conversations.values()
        start = max(self.shared(), 1)  # no token precedes the first one to predict it from
        return [IGNORE_INDEX] * start + ids[start:]


@dataclass(frozen=True)
class RejectedRow:
    """A row that the chat template rejects."""

    reason: str
    provenance: str


def messages_of(row: dict[str, Any], system_prompt: str) -> list[dict[str, str]]:
    """Return a row's messages before the completion."""
    return chat_messages(system_prompt, row["prompt"], [Turn.model_validate(turn) for turn in row["history"]])


def tokenize_rows(
    rows: Sequence[dict[str, Any]], completions: Sequence[str], system_prompt: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[TokenizedRow | RejectedRow]:
    """Tokenize rows as in service: only the template writes control tokens; in messages their text stays text.

    Args:
        rows: with `prompt`, `history` and the columns of `completions`.

    Raises:
        TrainingError: the base model has no usable chat template, or one that writes no end of an answer.
    """
    try:
        template = tokenizer_chat_template(tokenizer)
        end = template.end_token()
    except RequestRefused as error:
        raise TrainingError(str(error)) from error

    def render(row: dict[str, Any]) -> list[RenderedChat] | RejectedRow:
        messages = messages_of(row, system_prompt)
        finished = [[*messages, {"role": "assistant", "content": row[name]}] for name in completions]
        try:
            prompt = template.render(messages)
            conversations = [template.render(conversation, add_generation_prompt=False) for conversation in finished]
        except RequestRefused as error:
            return RejectedRow(str(error), provenance_of(row))
        if any("</think>" in row[name] for name in completions) and not all(
            conversation.text.startswith(prompt.text) for conversation in conversations
        ):
            return RejectedRow(_THOUGHTS, provenance_of(row))
        return [prompt, *conversations]

    rendered = [render(row) for row in rows]
    # Texts without control tokens are encoded in one batch, which is much faster.
    plain = [
        texts for texts in rendered if not isinstance(texts, RejectedRow) and not any(text.escaped for text in texts)
    ]
    encoded = iter(template.encode([text for texts in plain for text in texts]))
    tokenized: list[TokenizedRow | RejectedRow] = []
    for row, texts in zip(rows, rendered, strict=True):
        if isinstance(texts, RejectedRow):
            tokenized.append(texts)
            continue
        escaped = any(text.escaped for text in texts)
        try:
            prompt, *conversations = template.encode(texts) if escaped else [next(encoded) for _ in texts]
        except RequestRefused as error:
            tokenized.append(RejectedRow(str(error), provenance_of(row)))
            continue
        conversations = [_ended(ids, end, tokenizer.eos_token_id) for ids in conversations]
        tokenized.append(TokenizedRow(prompt, dict(zip(completions, conversations, strict=True)), escaped))
    return tokenized


def _ended(ids: list[int], end_of_turn: int, end_of_sequence: int | None) -> list[int]:
    """Return a finished conversation with the end of sequence, which some templates do not write after the last turn.

    A server that knows only this end, and not the end of turn, stops there.
    """
    after = ids[len(ids) - ids[::-1].index(end_of_turn) :]
    if end_of_sequence is None or end_of_sequence in {end_of_turn, *after}:
        return ids
    return [*ids, end_of_sequence]


def provenance_of(row: dict[str, Any]) -> str:
    """Return where a row comes from, in words."""
    interaction = row.get("interaction_id")
    parts = [row.get("source"), row.get("provenance"), f"interaction {interaction}" if interaction else None]
    return ", ".join(filter(None, parts)) or "unknown"


def count_rejections(rejected: Iterable[RejectedRow], rows: int, split: str) -> tuple[Rejection, ...]:
    """Count the rejected ones among `rows` rows of a split by reason, and log the counts."""
    by_reason: dict[str, list[str]] = {}
    for row in rejected:
        by_reason.setdefault(row.reason, []).append(row.provenance)
    counted = tuple(
        Rejection(split=split, reason=reason, count=len(found), examples=tuple(found[:_NAMED_ROWS]))
        for reason, found in by_reason.items()
    )
    for one in counted:
        print(f"left out {one.count} of {rows} {split} examples: {one}", file=sys.stderr, flush=True)
    return counted
