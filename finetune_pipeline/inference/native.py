"""llama.cpp through its low-level API: load a model, tokenize, decode a batch of sequences. Only in a child process.

Everything that touches ctypes is here. llama.cpp's chatter goes to stderr from the level of warnings on.
"""

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil
from numpy.typing import NDArray

from finetune_pipeline.inference.errors import ModelNotLoaded
from finetune_pipeline.inference.protocol import EngineInfo, ModelSpec
from finetune_pipeline.inference.threads import Threads, most_threads

BATCH = 512
"""Tokens of one decode: a long prompt goes in by chunks of this, so that running answers wait little."""

_LOG_WARN, _LOG_ERROR, _LOG_CONTINUED = 3, 4, 5


class NativeLog:
    """Passes llama.cpp's warnings and errors on to stderr and keeps the last errors for messages."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=6)
        self._level = 0
        self._callback = llama_cpp.llama_log_callback(self._take)  # held: ctypes does not keep it alive
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _: Any) -> None:
        self._level = self._level if level == _LOG_CONTINUED else level
        line = text.decode("utf-8", "replace").rstrip()
        if self._level not in {_LOG_WARN, _LOG_ERROR} or not line:
            return
        if self._level == _LOG_ERROR:
            self.errors.append(line)
        os.write(2, f"{line}\n".encode())


class Batch:
    """Tokens of several sequences for one decode, in memory that numpy can fill."""

    def __init__(self, size: int = BATCH) -> None:
        self.size = size
        self.used = 0
        self.outputs = 0
        self._token = np.zeros(size, np.int32)
        self._pos = np.zeros(size, np.int32)
        self._sequence = np.zeros(size, np.int32)
        self._count = np.ones(size, np.int32)
        self._logits = np.zeros(size, np.int8)
        int32 = ctypes.POINTER(ctypes.c_int32)
        first = self._sequence.ctypes.data
        self._sequences = (int32 * size)(*(ctypes.cast(first + 4 * i, int32) for i in range(size)))
        self.native = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(int32),
            pos=self._pos.ctypes.data_as(int32),
            n_seq_id=self._count.ctypes.data_as(int32),
            seq_id=self._sequences,
            logits=self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    @property
    def free(self) -> int:
        """Tokens that still fit."""
        return self.size - self.used

    def clear(self) -> None:
        """Empty it for the next decode."""
        self.used = self.outputs = self.native.n_tokens = 0

    def add(self, sequence: int, position: int, tokens: Sequence[int], *, output: bool) -> None:
        """Append tokens of a sequence; with `output`, the logits after the last of them are computed."""
        start, end = self.used, self.used + len(tokens)
        self._token[start:end] = tokens
        self._pos[start:end] = range(position, position + len(tokens))
        self._sequence[start:end] = sequence
        self._logits[start:end] = 0
        self._logits[end - 1] = output
        self.outputs += output
        self.used = self.native.n_tokens = end


class NativeModel:
    """A loaded model with its context.

    Raises:
        ModelNotLoaded: the file cannot be used, or memory does not suffice.
    """

    def __init__(self, spec: ModelSpec) -> None:
        check_file(spec.gguf)
        self._log = NativeLog()
        self._spec = spec
        llama_cpp.llama_backend_init()
        self._model = self._load()
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.context = min(spec.context, llama_cpp.llama_model_n_ctx_train(self._model) or spec.context)
        most = spec.threads or most_threads(llama_cpp.llama_model_n_params(self._model))
        self.threads = Threads(most, fixed=spec.fixed_threads)
        self._context = self._new_context()
        self._adapter: Adapter | None = None
        if spec.adapter:
            self.use(self.load_adapter(spec.adapter))
        self._pieces: dict[int, bytes] = {}

    def _load(self) -> Any:
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False  # repacked weights crash on processors with AMX in some builds
        model = llama_cpp.llama_model_load_from_file(os.fsencode(self._spec.gguf), params)
        if not model:
            raise self._not_loaded("it is truncated, damaged, of an architecture that this llama.cpp does not know, or")
        return model

    def _new_context(self) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context * self._spec.parallel
        params.n_seq_max = self._spec.parallel
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self.threads.most
        # Fixed, never `auto`: it changes the last digits, and answers must not depend on where they are computed.
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        # Each sequence has cells of its own: faster than one buffer for all (2,100 against 1,400 to 2,000 tokens/s with
        # 8 sequences of a 3 M model), and an answer depends less on who else is in the batch.
        params.kv_unified = False
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise self._not_loaded(f"{self._spec.parallel} sequences of {self.context} tokens")
        self._memory = llama_cpp.llama_get_memory(context)
        return context

    def load_adapter(self, path: Path) -> "Adapter":
        """Read a LoRA adapter; answers go on as before until `use`.

        llama.cpp compares architecture, names and shapes: an adapter of another base of the same shape passes.

        Raises:
            ModelNotLoaded: the file is missing, no adapter, or belongs to a model of another shape.
        """
        check_file(path)
        self._log.errors.clear()  # what was said of an earlier file is not about this one
        native = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not native:
            raise ModelNotLoaded(
                f"{path} cannot be applied to {self._spec.gguf}: {self._said()}. The adapter must have been trained "
                "on this very base model and converted by convert_lora_to_gguf.py with --base; make it again from there"
            )
        return Adapter(path, native)

    def use(self, adapter: "Adapter | None") -> None:
        """Answer with this adapter at scale 1, or with None by the base alone, and free the one before.

        Only while no answer is in the making: what a sequence has seen was computed with the adapter before.
        """
        if adapter:
            natives = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter.native)
            llama_cpp.llama_set_adapters_lora(self._context, natives, 1, (ctypes.c_float * 1)(1.0))
        else:
            llama_cpp.llama_set_adapters_lora(self._context, None, 0, None)
        llama_cpp.llama_memory_clear(self._memory, False)
        if self._adapter:
            self._adapter.close()
        self._adapter = adapter

    def _not_loaded(self, reason: str) -> ModelNotLoaded:
        size = self._spec.gguf.stat().st_size / 1e6
        available = psutil.virtual_memory().available / 1e6
        return ModelNotLoaded(
            f"llama.cpp cannot load {self._spec.gguf} ({size:.1f} MB): {self._said()}. Either {reason} does not fit "
            f"into memory ({available:.0f} MB free). Make the file again, or use a smaller model, context or parallel"
        )

    def _said(self) -> str:
        return "; ".join(self._log.errors) or "llama.cpp gave no reason"

    def info(self) -> EngineInfo:
        """What is loaded, and what runs it."""
        description = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, description, 256)
        return EngineInfo(
            description=description.value.decode(),
            n_params=llama_cpp.llama_model_n_params(self._model),
            n_vocab=self.n_vocab,
            context_train=llama_cpp.llama_model_n_ctx_train(self._model),
            context=self.context,
            size_bytes=llama_cpp.llama_model_size(self._model),
            chat_template=self.chat_template(),
            build=f"llama-cpp-python {llama_cpp.__version__}, llama.cpp {llama_cpp.llama_version().decode()}",
            system=llama_cpp.llama_print_system_info().decode().strip(),
            threads=self.threads.most,
        )

    def chat_template(self) -> str | None:
        """The template that came with the model, if any."""
        template = llama_cpp.llama_model_chat_template(self._model, None)
        return template.decode() if template else None

    def metadata(self, key: str) -> str | None:
        """A value of the GGUF's header as text (`true` and `false` for booleans)."""
        value = ctypes.create_string_buffer(256)
        found = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), value, 256)
        return value.value.decode("utf-8", "replace") if found >= 0 else None

    @property
    def bos(self) -> int | None:
        """The beginning-of-sequence token, where the model has one."""
        token = llama_cpp.llama_vocab_bos(self.vocab)
        return token if token >= 0 else None

    @property
    def eos(self) -> int | None:
        """The end-of-sequence token, where the model has one."""
        token = llama_cpp.llama_vocab_eos(self.vocab)
        return token if token >= 0 else None

    @property
    def adds_bos(self) -> bool:
        """The file asks that raw texts start with the beginning-of-sequence token."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self.vocab))

    @property
    def strips_space(self) -> bool:
        """A SentencePiece model with a dummy prefix: a text's first token carries a space that is not the text's."""
        prefix = self.metadata("tokenizer.ggml.add_space_prefix") or "true"
        return self.metadata("tokenizer.ggml.model") == "llama" and prefix == "true"

    def token_text(self, token: int | None) -> str:
        """A special token as it stands in texts; empty for None."""
        return "" if token is None else llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")

    def tokens_found_first(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return text and id of the tokens that are matched before a text is split: control tokens, then the others."""
        kinds = [llama_cpp.llama_vocab_get_attr(self.vocab, token) for token in range(self.n_vocab)]
        never_text = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        control = [token for token, kind in enumerate(kinds) if kind & never_text]
        others = [token for token, kind in enumerate(kinds) if kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED]
        return {self.token_text(token): token for token in control}, {self.token_text(token): token for token in others}

    @cached_property
    def max_prompt_bytes(self) -> int:
        """Bytes beyond which a text has more tokens than the context, however it is tokenized."""
        longest = max(len(llama_cpp.llama_vocab_get_text(self.vocab, token)) for token in range(self.n_vocab))
        return self.context * longest

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, special tokens in it read as such, nothing added."""
        data = text.encode(errors="replace")
        room = len(data) + 8
        while True:
            tokens = (llama_cpp.llama_token * room)()
            count: int = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, room, False, True)
            if count >= 0:
                return list(tokens[:count])
            room = -count  # a vocabulary without spaces makes three tokens of one

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; control tokens stand for none."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token)
        return piece

    def _read_piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 64, 0, False)
        if length < 0:  # it needs so much room
            buffer = ctypes.create_string_buffer(-length)
            length = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, -length, 0, False)
        return buffer.raw[:length]

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def is_marker(self, token: int) -> bool:
        """Return whether a token is a control token, or one that was added and looks like one (`<|im_start|>`)."""
        kind = llama_cpp.llama_vocab_get_attr(self.vocab, token)
        if kind & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN):
            return True
        piece = self.piece(token)
        return bool(kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED) and piece[:1] + piece[-1:] == b"<>"

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Run a batch; returns one row of logits for each output of it, in its order, valid until the next decode."""
        before = self.threads.now
        if self.threads.look() != before:
            llama_cpp.llama_set_n_threads(self._context, self.threads.now, self.threads.now)
        code = llama_cpp.llama_decode(self._context, batch.native)
        if code != 0:  # cannot happen while every sequence keeps to its context
            raise RuntimeError(f"llama_decode returned {code} for {batch.used} tokens")
        if not batch.outputs:
            return np.empty((0, self.n_vocab), np.float32)
        rows: NDArray[np.float32] = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self._context), (batch.outputs, self.n_vocab)
        )
        return rows

    def forget(self, sequence: int) -> None:
        """Free the cells of a sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)


class Adapter:
    """A LoRA adapter in memory, read for one model."""

    def __init__(self, path: Path, native: Any) -> None:
        self.path = path
        self.native = native

    def close(self) -> None:
        """Free it; no answer may use it any more."""
        llama_cpp.llama_adapter_lora_free(self.native)


def check_file(path: Path) -> None:
    """Refuse a file that cannot be a GGUF before llama.cpp sees it.

    Raises:
        ModelNotLoaded: it is missing, a folder, or starts otherwise.
    """
    if not path.is_file():
        raise ModelNotLoaded(f"{path} is not there, or is no file; give the path of an existing GGUF file")
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise ModelNotLoaded(
            f"{path} is not a GGUF file: it starts with {start!r} instead of b'GGUF'; convert the model with "
            "llama.cpp's convert_hf_to_gguf.py, or download the file again"
        )


@cache
def _candidate_type() -> np.dtype[Any]:
    return np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """A llama.cpp sampler, applied to logits held by numpy."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def apply(self, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> tuple[NDArray[Any], int]:
        """Put candidates through it: what is left of them (ids, logits, probabilities) and the selected one's index."""
        candidates = np.zeros(len(ids), _candidate_type())
        candidates["id"], candidates["logit"] = ids, logits
        array = llama_cpp.llama_token_data_array(
            data=candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data)),
            size=len(ids),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._native, ctypes.byref(array))
        return candidates[: array.size], array.selected

    def close(self) -> None:
        """Free it."""
        llama_cpp.llama_sampler_free(self._native)


def draw(temperature: float, top_p: float, seed: int) -> Sampler:
    """A sampler that draws a token: temperature first, then top_p, as most APIs mean them."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(temperature))
    if top_p < 1:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(top_p, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return Sampler(chain)
