"""The official client."""

import openai
from common import MODEL, PROMPT, TOOL, URL, Wall, main

client = openai.OpenAI(base_url=URL, api_key="none")
MESSAGES = [{"role": "user", "content": PROMPT}]


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    return {"text": answer.choices[0].message.content, "id": answer.id}


def stream():
    pieces = []
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as events:
        for event in events:
            if event.type == "content.delta":
                pieces.append(event.delta)
        final = events.get_final_completion()
    assert final.choices[0].message.content == "".join(pieces)
    return {"text": "".join(pieces), "pieces": len(pieces), "id": final.id}


def structured():
    answer = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Wall)
    assert answer.choices[0].message.parsed is not None
    return {"value": answer.choices[0].message.parsed.model_dump(), "id": answer.id}


def call(choice):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice=choice)
    [one] = answer.choices[0].message.tool_calls or []
    return {"name": one.function.name, "arguments": one.function.arguments, "id": answer.id}


def forced_tool():
    return call({"type": "function", "function": {"name": "add_wall"}})


def auto_tool():
    return call("auto")


main(globals())
