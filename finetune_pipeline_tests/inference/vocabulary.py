"""A child process that tokenizes conversations as a worker does, with a GGUF that has only a vocabulary."""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.native import NativeVocabulary


class Vocabulary(NativeVocabulary):
    """A model without weights, with another chat template than the file's if one is given."""

    def __init__(self, gguf, template):
        super().__init__(gguf)
        self._template = template

    def chat_template(self):
        return super().chat_template() if self._template is None else self._template

    def text(self, tokens):
        buffer = ctypes.create_string_buffer(1 << 16)
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        length = llama_cpp.llama_detokenize(self.vocab, ids, len(tokens), buffer, len(buffer), False, True)
        return buffer.raw[:length].decode("utf-8", "replace")


def read(model, messages):
    """Return the tokens of a conversation and their text, or the error message."""
    try:
        text = model.template.render(messages).text
        tokens = model.template.tokens(messages)
    except RequestRefused as refused:
        return {"refused": str(refused)}
    return {
        "tokens": tokens,
        "decoded": model.text(tokens),
        "text": text,
        "parsed": model.tokenize(text),
        "control": [token for token in tokens if token in model.template._control.numbers],
    }


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    model = Vocabulary(Path(asked["gguf"]), asked["template"])
    json.dump([read(model, messages) for messages in asked["conversations"]], sys.stdout)
