"""openai-agents, whose default is the Responses API."""

import asyncio
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from common import MODEL, PROMPT, URL, Wall, main
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent

set_tracing_disabled(True)
set_default_openai_client(AsyncOpenAI(base_url=URL, api_key="none"), use_for_tracing=False)
called = []


@function_tool
def add_wall(material: Literal["brick", "concrete"], thickness_mm: int) -> str:
    """Adds."""
    called.append({"material": material, "thickness_mm": thickness_mm})
    return "added"


def interaction(result):
    return result.raw_responses[0].response_id


def chat():
    result = Runner.run_sync(Agent(name="a", model=MODEL), PROMPT)
    return {"text": result.final_output, "id": interaction(result)}


def stream():
    async def run():
        result = Runner.run_streamed(Agent(name="a", model=MODEL), PROMPT)
        pieces = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
        ]
        return {"text": "".join(pieces), "pieces": len(pieces), "id": interaction(result)}

    return asyncio.run(run())


def second_turn():
    agent = Agent(name="a", model=MODEL)
    first = Runner.run_sync(agent, PROMPT)
    second = Runner.run_sync(agent, "And a door", previous_response_id=first.last_response_id)
    return {"first": first.final_output, "id": interaction(second)}


def structured():
    result = Runner.run_sync(Agent(name="a", model=MODEL, output_type=Wall), PROMPT)
    return {"value": result.final_output.model_dump(), "id": interaction(result)}


def call(choice):
    agent = Agent(
        name="a",
        model=MODEL,
        tools=[add_wall],
        model_settings=ModelSettings(tool_choice=choice),
        tool_use_behavior="stop_on_first_tool",
    )
    result = Runner.run_sync(agent, PROMPT)
    [arguments] = called
    return {"name": "add_wall", "arguments": arguments, "id": interaction(result)}


def forced_tool():
    return call("add_wall")


def auto_tool():
    return call("auto")


main(globals())
