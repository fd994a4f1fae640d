"""instructor, whose default mode forces a tool."""

from typing import Literal

import instructor
from common import MODEL, PROMPT, URL, main
from openai import OpenAI
from pydantic import BaseModel

official = OpenAI(base_url=URL, api_key="none")
client = instructor.from_openai(official)
MESSAGES = [{"role": "user", "content": PROMPT}]


class add_wall(BaseModel):
    """Adds."""

    material: Literal["brick", "concrete"]
    thickness_mm: int


def chat():
    """Return an answer without a response model, which instructor passes on."""
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, response_model=None)
    return {"text": answer.choices[0].message.content, "id": answer.id}


def stream():
    """Return what instructor streams: the fields of the object as they come."""
    parts = list(client.chat.completions.create_partial(model=MODEL, messages=MESSAGES, response_model=add_wall))
    return {"value": parts[-1].model_dump(), "pieces": len(parts)}


def structured():
    value, answer = client.chat.completions.create_with_completion(
        model=MODEL, messages=MESSAGES, response_model=add_wall, max_retries=0
    )
    return {"value": value.model_dump(), "id": answer.id}


def forced_tool():
    _, answer = client.chat.completions.create_with_completion(
        model=MODEL, messages=MESSAGES, response_model=add_wall, max_retries=0
    )
    [one] = answer.choices[0].message.tool_calls
    return {"name": one.function.name, "arguments": one.function.arguments, "id": answer.id}


def auto_tool():
    """Return one of several tools, which instructor leaves to the model."""
    parallel = instructor.from_openai(official, mode=instructor.Mode.PARALLEL_TOOLS)
    from collections.abc import Iterable

    [one] = parallel.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=Iterable[add_wall], max_retries=0
    )
    return {"name": type(one).__name__, "arguments": one.model_dump()}


main(globals())
