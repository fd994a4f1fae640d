"""Export formats: a dataset's examples as other tools read them. `sources` reads each back as the same example."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.alpaca import alpaca_row
from finetune_pipeline.artifacts import new_file
from finetune_pipeline.records import chat_messages

if TYPE_CHECKING:
    from finetune_pipeline.curation.dataset_files import DatasetExample

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}

Writer = Callable[["DatasetExample", str], dict[str, Any]]
"""Returns the row of an example under a loop's system prompt."""


class UnwritableExampleError(ValueError):
    """A format cannot hold an example."""


def alpaca(example: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """Return `instruction`, `input` and `output`; see `alpaca.alpaca_row`."""
    row = alpaca_row(example.prompt, example.history, example.completion, system_prompt)
    return {**row, "reward": example.reward}


def messages(example: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """Return `messages` as in OpenAI's API and in chat templates, the completion last."""
    turns = chat_messages(system_prompt, example.prompt, example.history)
    return {"messages": [*turns, {"role": "assistant", "content": example.completion}], "reward": example.reward}


def chatml(example: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """Return `text`: the messages with ChatML's control tokens.

    Raises:
        UnwritableExampleError: a message contains such a token, so that its text would end or begin a turn.
    """
    turns = messages(example, system_prompt)["messages"]
    if any(token in turn["content"] for turn in turns for token in _CHATML_TOKENS):
        raise UnwritableExampleError
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return {"text": text, "reward": example.reward}


def sharegpt(example: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """Return `conversations`: the messages as `from` and `value`."""
    row = messages(example, system_prompt)
    turns = [{"from": _SHAREGPT_ROLES[turn["role"]], "value": turn["content"]} for turn in row["messages"]]
    return {"conversations": turns, "reward": example.reward}


def prompt_completion(example: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """Return `prompt` and `completion` without the system prompt, and `history` if the prompt has earlier turns."""
    history = {"history": [turn.model_dump() for turn in example.history]} if example.history else {}
    return {"prompt": example.prompt, "completion": example.completion, **history, "reward": example.reward}


WRITERS: dict[str, Writer] = {
    "alpaca": alpaca, "chatml": chatml, "messages": messages, "sharegpt": sharegpt,
    "prompt_completion": prompt_completion,
}  # fmt: skip
"""Format -> its writer."""


def export_examples(
    path: Path, examples: Iterable["DatasetExample"], format: str, system_prompt: str, *, force: bool = False
) -> int:
    """Write examples in a format: a JSON array if the name ends in .json, else JSON lines.

    Args:
        force: overwrite an existing file.

    Returns:
        The number of examples written.

    Raises:
        FileExistsError: the file exists already, and not `force`.
        OSError: the file cannot be written; nothing of it is left.
    """
    array, written = path.suffix == ".json", 0
    with new_file(path, force=force) as file:
        file.write("[\n" if array else "")
        for row in export_rows(examples, format, system_prompt):
            file.write(",\n" if array and written else "")
            file.write(row + ("" if array else "\n"))
            written += 1
        file.write("\n]\n" if array else "")
    return written


def export_rows(examples: Iterable["DatasetExample"], format: str, system_prompt: str) -> Iterator[str]:
    """Yield the rows of examples in a format as JSON; an example that the format cannot hold is left out."""
    for example in examples:
        with suppress(UnwritableExampleError):
            yield json.dumps(WRITERS[format](example, system_prompt), ensure_ascii=False)
