"""pydantic-ai, whose default is the Responses API; the variant `chat` uses chat completions."""

import asyncio
import sys
from typing import Literal

from common import MODEL, PROMPT, URL, Wall, main
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel, OpenAIResponsesModelSettings
from pydantic_ai.providers.openai import OpenAIProvider

Model = OpenAIChatModel if sys.argv[2:] == ["chat"] else OpenAIResponsesModel
model = Model(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))


def chat():
    result = Agent(model).run_sync(PROMPT)
    return {"text": result.output, "id": result.response.provider_response_id}


def stream():
    async def run():
        async with Agent(model).run_stream(PROMPT) as result:
            # By default, what comes within 0.1 s is one piece.
            pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
            return {"text": "".join(pieces), "pieces": len(pieces), "id": result.response.provider_response_id}

    return asyncio.run(run())


def second_turn():
    first = Agent(model).run_sync(PROMPT)
    settings = OpenAIResponsesModelSettings(openai_previous_response_id="auto")
    second = Agent(model, model_settings=settings).run_sync("And a door", message_history=first.all_messages())
    return {"first": first.output, "id": second.response.provider_response_id}


def structured():
    result = Agent(model, output_type=Wall, retries=0).run_sync(PROMPT)
    return {"value": result.output.model_dump(), "id": result.response.provider_response_id}


def forced_tool():
    """Return the call of the output tool, which pydantic-ai requires."""
    result = Agent(model, output_type=ToolOutput(Wall, name="add_wall"), retries=0).run_sync(PROMPT)
    [one] = result.response.tool_calls
    return {"name": one.tool_name, "arguments": one.args_as_dict(), "id": result.response.provider_response_id}


def auto_tool():
    called = []
    agent = Agent(model)

    @agent.tool_plain
    def add_wall(material: Literal["brick", "concrete"], thickness_mm: int) -> str:
        """Adds."""
        called.append({"material": material, "thickness_mm": thickness_mm})
        return "added"

    agent.run_sync(PROMPT)
    [arguments] = called
    return {"name": "add_wall", "arguments": arguments}


main(globals())
