"""The Alpaca format: `instruction`, `input`, `output`, and `history` as a list of [prompt, answer] pairs."""

from collections.abc import Sequence
from typing import Any

from finetune_pipeline.records import Turn
from finetune_pipeline.wording import kind_of


def alpaca_row(prompt: str, history: Sequence[Turn], answer: str, system_prompt: str) -> dict[str, Any]:
    """Return a conversation as an Alpaca row.

    The system prompt is the instruction, and the prompt the input; without a system prompt, the prompt is the
    instruction. A system message in the history replaces the loop's system prompt, and is repeated in `system`.
    """
    has_own_system = bool(history) and history[0].role == "system"
    system = history[0].content if has_own_system else system_prompt
    row: dict[str, Any] = {"instruction": system or prompt, "input": prompt if system else "", "output": answer}
    if has_own_system:
        row["system"] = system
    if pairs := _pairs(history[1:] if has_own_system else history):
        row["history"] = pairs
    return row


def alpaca_prompt(instruction: Any, input: Any, system: Any = None) -> str:
    """Return the prompt of an Alpaca row: the instruction, a blank line, and the input if there is one.

    If the row repeats its instruction in `system`, the input alone is the prompt.

    Raises:
        ValueError: one of them is not a text.
    """
    given = {"instruction": instruction, "input": input, "system": system}
    for name, value in given.items():
        if not isinstance(value, str) and (value is not None or name == "instruction"):
            raise ValueError(f"{name}: found {kind_of(value)}, expected a text")
    parts = ("" if input and instruction == system else instruction, input or "")
    return "\n\n".join(part for part in parts if part)


def history_messages(history: Any) -> Any:
    """Return a history of [prompt, answer] pairs as messages. Anything else is returned unchanged."""
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        return history
    sides = [side for pair in history for side in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text} for role, text in sides if text not in (None, "")]


def _pairs(history: Sequence[Turn]) -> list[list[str]]:
    """Return turns as [prompt, answer] pairs. Consecutive turns of one side are joined."""
    pairs: list[list[str]] = []
    previous = ""
    for turn in history:
        side = "assistant" if turn.role == "assistant" else "user"
        if not pairs or (side == "user" and previous == "assistant"):
            pairs.append(["", ""])
        text = pairs[-1][side == "assistant"]
        pairs[-1][side == "assistant"] = f"{text}\n{turn.content}" if previous == side else turn.content
        previous = side
    return pairs
