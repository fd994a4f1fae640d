"""LangChain's ChatOpenAI."""

from common import MODEL, PROMPT, TOOL, URL, Wall, main
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=MODEL, base_url=URL, api_key="none")


def chat():
    answer = model.invoke(PROMPT)
    return {"text": answer.content, "id": answer.response_metadata["id"]}


def stream():
    pieces = [str(piece.content) for piece in model.stream(PROMPT) if piece.content]
    return {"text": "".join(pieces), "pieces": len(pieces)}


def structured():
    answer = model.with_structured_output(Wall, include_raw=True).invoke(PROMPT)
    return {"value": answer["parsed"].model_dump(), "id": answer["raw"].response_metadata["id"]}


def call(choice):
    answer = model.bind_tools([TOOL], tool_choice=choice).invoke(PROMPT)
    [one] = answer.tool_calls
    return {"name": one["name"], "arguments": one["args"], "id": answer.response_metadata["id"]}


def forced_tool():
    return call("add_wall")


def auto_tool():
    return call("auto")


main(globals())
