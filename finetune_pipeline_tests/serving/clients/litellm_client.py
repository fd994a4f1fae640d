"""litellm's library, with the provider for OpenAI-compatible servers."""

import litellm
from common import MODEL, PROMPT, TOOL, URL, Wall, main

MESSAGES = [{"role": "user", "content": PROMPT}]
SERVER = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none", "messages": MESSAGES}


def chat():
    answer = litellm.completion(**SERVER)
    return {"text": answer.choices[0].message.content, "id": answer.id}


def stream():
    pieces = list(litellm.completion(**SERVER, stream=True))
    texts = [text for piece in pieces if (text := piece.choices[0].delta.content)]
    return {"text": "".join(texts), "pieces": len(texts), "id": pieces[0].id}


def structured():
    answer = litellm.completion(**SERVER, response_format=Wall)
    return {"value": Wall.model_validate_json(answer.choices[0].message.content).model_dump(), "id": answer.id}


def call(choice):
    answer = litellm.completion(**SERVER, tools=[TOOL], tool_choice=choice)
    [one] = answer.choices[0].message.tool_calls
    return {"name": one.function.name, "arguments": one.function.arguments, "id": answer.id}


def forced_tool():
    return call({"type": "function", "function": {"name": "add_wall"}})


def auto_tool():
    return call("auto")


main(globals())
