"""A dataset's rows in the forms that other tools train from. `sources` reads each of them back as the same example."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.alpaca import alpaca_row
from finetune_pipeline.artifacts import new_file
from finetune_pipeline.records import chat_messages

if TYPE_CHECKING:
    from finetune_pipeline.curation.dataset_files import DatasetExample

_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}

Writer = Callable[["DatasetExample", str], dict[str, Any]]
"""A row in a form, under a loop's system prompt."""


def alpaca(row: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """Return `instruction`, `input` and `output`; see `alpaca.alpaca_row`."""
    return {**alpaca_row(row.prompt, row.history, row.completion, system_prompt), "reward": row.reward}


def messages(row: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """The messages as OpenAI's API and chat templates have them, the answer last."""
    said = [*chat_messages(system_prompt, row.prompt, row.history), {"role": "assistant", "content": row.completion}]
    return {"messages": said, "reward": row.reward}


def sharegpt(row: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """The same as conversations of from and value."""
    said = messages(row, system_prompt)["messages"]
    turns = [{"from": _SHAREGPT[turn["role"]], "value": turn["content"]} for turn in said]
    return {"conversations": turns, "reward": row.reward}


def prompt_completion(row: "DatasetExample", system_prompt: str) -> dict[str, Any]:
    """prompt and completion, without the loop's system prompt; what was said before stands in `history`."""
    said = {"history": [turn.model_dump() for turn in row.history]} if row.history else {}
    return {"prompt": row.prompt, "completion": row.completion, **said, "reward": row.reward}


WRITERS: dict[str, Writer] = {
    "alpaca": alpaca, "messages": messages, "sharegpt": sharegpt, "prompt_completion": prompt_completion
}  # fmt: skip
"""Each form's writer, by its name."""


def write_rows(
    path: Path, rows: Iterable["DatasetExample"], form: str, system_prompt: str, *, force: bool = False
) -> int:
    """Write rows in a form: a name in .json gives a JSON array, any other one JSON object a line.

    Args:
        force: overwrite what is there.

    Returns:
        How many rows were written.

    Raises:
        FileExistsError: the file is there already, and not `force`.
        OSError: it cannot be written; nothing is left of it.
    """
    array, written = path.suffix == ".json", 0
    with new_file(path, force=force) as file:
        file.write("[\n" if array else "")
        for row in rows:
            file.write(",\n" if array and written else "")
            file.write(json.dumps(WRITERS[form](row, system_prompt), ensure_ascii=False) + ("" if array else "\n"))
            written += 1
        file.write("\n]\n" if array else "")
    return written
