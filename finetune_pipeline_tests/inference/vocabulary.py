"""A child process that tokenizes conversations as a worker does, with a GGUF that has only a vocabulary."""

import ctypes
import json
import os
import sys

import llama_cpp

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.native import NativeLog, NativeModel
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.inference.worker import Worker


class Vocabulary(NativeModel):
    """A model without weights."""

    def __init__(self, gguf, template):
        self._log = NativeLog()
        self._template = template
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(gguf), params)
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def chat_template(self):
        return self._template

    def text(self, tokens):
        buffer = ctypes.create_string_buffer(1 << 16)
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        length = llama_cpp.llama_detokenize(self.vocab, ids, len(tokens), buffer, len(buffer), False, True)
        return buffer.raw[:length].decode("utf-8", "replace")


def read(worker, model, messages):
    """Return the tokens of a conversation and their text, or the error message."""
    try:
        text = worker._chat_template.render(messages).text
        tokens = worker._chat_template.tokens(messages)
    except RequestRefused as refused:
        return {"refused": str(refused)}
    return {
        "tokens": tokens,
        "decoded": model.text(tokens),
        "text": text,
        "parsed": model.tokenize(text),
        "control": [token for token in tokens if token in worker._chat_template._control.numbers],
    }


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    model = Vocabulary(asked["gguf"], asked["template"])
    worker = Worker.__new__(Worker)  # only what tokenizing a conversation needs
    worker._model, worker._spec = model, ModelSpec(gguf=asked["gguf"])
    json.dump([read(worker, model, messages) for messages in asked["conversations"]], sys.stdout)
