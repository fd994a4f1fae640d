"""llama.cpp through its C API: load a model, tokenize, decode a batch. Imported only in a child process.

All use of ctypes is here. llama.cpp's warnings and errors go to stderr.
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

from finetune_pipeline.inference.chat_template import ChatTemplate
from finetune_pipeline.inference.errors import ModelNotLoaded, RequestRefused
from finetune_pipeline.inference.protocol import END_TOKENS, EngineInfo, GenerateRequest, ModelSpec
from finetune_pipeline.inference.threads import SMALL_MODEL, Threads, most_threads

BATCH = 512
"""Tokens of one decode. Longer prompts are decoded in several batches, so that running completions wait little."""

MAX_COUNTED = 32_768
"""Most tokens of an answer that presence and frequency penalties count; llama.cpp allocates memory for all of them."""

_LOG_WARN, _LOG_ERROR, _LOG_CONTINUED = 3, 4, 5


class NativeLog:
    """Writes llama.cpp's warnings and errors to stderr and keeps the last errors for exceptions."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=6)
        self._level = 0
        self._callback = llama_cpp.llama_log_callback(self._write)  # a reference: ctypes does not keep it alive
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _write(self, level: int, text: bytes, _: Any) -> None:
        self._level = self._level if level == _LOG_CONTINUED else level
        line = text.decode("utf-8", "replace").rstrip()
        if self._level not in {_LOG_WARN, _LOG_ERROR} or not line:
            return
        if self._level == _LOG_ERROR:
            self.errors.append(line)
        os.write(2, f"{line}\n".encode())


class Batch:
    """Tokens of several sequences for one decode, in memory that numpy can fill.

    Attributes:
        size: most tokens.
        used: number of tokens.
        outputs: number of tokens after which logits are computed.
    """

    def __init__(self, size: int = BATCH) -> None:
        self.size = size
        self.used = 0
        self.outputs = 0
        self._token = np.zeros(size, np.int32)
        self._pos = np.zeros(size, np.int32)
        self._seq_id = np.zeros(size, np.int32)
        self._n_seq_id = np.ones(size, np.int32)
        self._logits = np.zeros(size, np.int8)
        int32 = ctypes.POINTER(ctypes.c_int32)
        first = self._seq_id.ctypes.data
        self._seq_id_pointers = (int32 * size)(*(ctypes.cast(first + 4 * i, int32) for i in range(size)))
        self.native = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(int32),
            pos=self._pos.ctypes.data_as(int32),
            n_seq_id=self._n_seq_id.ctypes.data_as(int32),
            seq_id=self._seq_id_pointers,
            logits=self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        """Remove all tokens."""
        self.used = self.outputs = self.native.n_tokens = 0

    def add(self, seq_id: int, position: int, tokens: Sequence[int], outputs: int) -> None:
        """Append tokens of a sequence, and compute the logits after the last `outputs` of them."""
        start, end = self.used, self.used + len(tokens)
        self._token[start:end] = tokens
        self._pos[start:end] = range(position, position + len(tokens))
        self._seq_id[start:end] = seq_id
        self._logits[start:end] = 0
        self._logits[end - outputs : end] = 1
        self.outputs += outputs
        self.used = self.native.n_tokens = end


class NativeVocabulary:
    """The vocabulary of a GGUF: its tokenizer, special tokens and chat template.

    Args:
        gguf: the file.
        weights: load the weights too; a file that was converted with --vocab-only has none.

    Raises:
        ModelNotLoaded: the file cannot be used.
    """

    def __init__(self, gguf: Path, *, weights: bool = False) -> None:
        check_file(gguf)
        self._log = NativeLog()
        self._gguf = gguf
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False  # repacked weights crash on processors with AMX in some builds
        params.vocab_only = not weights
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(gguf), params)
        if not self._model:
            raise self._not_loaded("The file is truncated, damaged, of an unknown architecture, or")
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self._token_bytes: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}

    def _not_loaded(self, reason: str) -> ModelNotLoaded:
        size = self._gguf.stat().st_size / 1e6
        available = psutil.virtual_memory().available / 1e6
        return ModelNotLoaded(
            f"llama.cpp cannot load {self._gguf} ({size:.1f} MB): {self._last_errors()}. {reason} does not fit "
            f"into memory ({available:.0f} MB free). Convert it again, or use a smaller model, context or parallel."
        )

    def _last_errors(self) -> str:
        return "; ".join(self._log.errors) or "llama.cpp gave no reason"

    def chat_template(self) -> str | None:
        """Return the model's chat template, if it has one."""
        template = llama_cpp.llama_model_chat_template(self._model, None)
        return template.decode() if template else None

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template with its tokenizer.

        Raises:
            RequestRefused: the model has none, or an invalid one.
        """
        source = self.chat_template()
        if source is None:
            raise RequestRefused(
                f"{self._gguf} has no chat template (tokenizer.chat_template), so messages cannot be rendered. "
                "Send a plain `prompt`, or put chat_template.jinja beside the tokenizer and convert the model again."
            )
        named = {"bos_token": self.bos, "eos_token": self.eos}
        variables = {name: self.token_text(token) for name, token in named.items() if token is not None}
        control, user_defined = self.special_tokens()
        return ChatTemplate(
            source, variables, control, user_defined, lambda texts: [self.tokenize(text) for text in texts]
        )

    def metadata(self, key: str) -> str | None:
        """Return a metadata value of the GGUF as text (`true` and `false` for booleans)."""
        size = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), ctypes.create_string_buffer(1), 1) + 1
        value = ctypes.create_string_buffer(max(1, size))
        found = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), value, max(1, size))
        return value.value.decode("utf-8", "replace") if found >= 0 else None

    @property
    def bos(self) -> int | None:
        """The beginning-of-sequence token, if the model has one."""
        return self._declared("bos", llama_cpp.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> int | None:
        """The end-of-sequence token, if the model has one."""
        return self._declared("eos", llama_cpp.llama_vocab_eos(self.vocab))

    def _declared(self, name: str, token: int) -> int | None:
        """Return a special token, or None if it is an ordinary one that llama.cpp takes for a file that names none.

        For a byte-level BPE that is token 11.
        """
        if token < 0:
            return None
        never_text = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        declared = self.metadata(f"tokenizer.ggml.{name}_token_id") is not None
        return token if declared or llama_cpp.llama_vocab_get_attr(self.vocab, token) & never_text else None

    @property
    def adds_bos(self) -> bool:
        """Return whether the file asks that raw texts start with the beginning-of-sequence token."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self.vocab))

    @property
    def strips_space(self) -> bool:
        """Return whether the tokenizer is SentencePiece with a dummy prefix, an extra space before the first token."""
        prefix = self.metadata("tokenizer.ggml.add_space_prefix") or "true"
        return self.metadata("tokenizer.ggml.model") == "llama" and prefix == "true"

    def token_text(self, token: int | None) -> str:
        """Return the text by which a token is written in templates; empty for None."""
        return "" if token is None else llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")

    def special_tokens(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return text and id of the tokens that are matched before a text is split: control, then user-defined ones."""
        kinds = [llama_cpp.llama_vocab_get_attr(self.vocab, token) for token in range(self.n_vocab)]
        never_text = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        control = [token for token, kind in enumerate(kinds) if kind & never_text]
        user = [token for token, kind in enumerate(kinds) if kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED]
        return {self.token_text(token): token for token in control}, {self.token_text(token): token for token in user}

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; control tokens in it are parsed, and nothing is added."""
        data = text.encode(errors="replace")
        size = len(data) + 8
        while True:
            tokens = (llama_cpp.llama_token * size)()
            count: int = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, size, False, True)
            if count >= 0:
                return list(tokens[:count])
            size = -count  # a vocabulary without a space token makes three tokens of each space

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; none for control tokens."""
        found = self._token_bytes.get(token)
        if found is None:
            buffer = ctypes.create_string_buffer(64)
            length = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 64, 0, False)
            if length < 0:  # the buffer is too small; -length is the size needed
                buffer = ctypes.create_string_buffer(-length)
                length = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, -length, 0, False)
            found = self._token_bytes[token] = buffer.raw[:length]
        return found

    def is_end_of_generation(self, token: int) -> bool:
        """Return whether a token ends a completion.

        These are the tokens that llama.cpp stops at, and those that the export found in the base model.
        """
        found = self._ends.get(token)
        if found is None:
            found = token in self._listed_ends
            if not found and llama_cpp.llama_vocab_is_eog(self.vocab, token):
                found = self.eos is not None or token != llama_cpp.llama_vocab_eos(self.vocab)
            self._ends[token] = found
        return found

    @cached_property
    def end_tokens(self) -> list[int]:
        """All tokens that end a completion."""
        return [token for token in range(self.n_vocab) if self.is_end_of_generation(token)]

    @cached_property
    def _listed_ends(self) -> frozenset[int]:
        return frozenset(map(int, filter(None, (self.metadata(END_TOKENS) or "").split(","))))

    @property
    def own_ends(self) -> list[int]:
        """The tokens that end a completion here, but not in other servers: llama.cpp has keys for three."""
        return sorted(token for token in self._listed_ends if not llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def is_control(self, token: int) -> bool:
        """Return whether a token is a control token, or a user-defined one that looks like one (`<|im_start|>`)."""
        kind = llama_cpp.llama_vocab_get_attr(self.vocab, token)
        if kind & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN):
            return True
        text = self.token_bytes(token)
        return bool(kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED) and text[:1] + text[-1:] == b"<>"


class NativeModel(NativeVocabulary):
    """A loaded model with its context.

    Raises:
        ModelNotLoaded: the file cannot be used, or does not fit into memory.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec.gguf, weights=True)
        self._spec = spec
        self.context = min(spec.context, llama_cpp.llama_model_n_ctx_train(self._model) or spec.context)
        self.threads = Threads(spec.threads or most_threads(), fixed=spec.fixed_threads)
        small = llama_cpp.llama_model_n_params(self._model) < SMALL_MODEL
        self._alone = 1 if small and not spec.threads else None  # threads for a single token; None: as for several
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context * spec.parallel
        params.n_seq_max = spec.parallel
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = self._alone or self.threads.most
        params.n_threads_batch = self.threads.most
        # Fixed, not `auto`: it changes the last digits of the logits, which must be the same on every machine.
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        # Each sequence has its own KV cache: faster than one buffer for all (2,100 against 1,400 to 2,000 tokens/s with
        # 8 sequences of a 3 M model), and a completion depends less on what else is in the batch.
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise self._not_loaded(f"The KV cache of {spec.parallel} sequences of {self.context} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._adapter: NativeAdapter | None = None
        if spec.adapter:
            self.set_adapter(self.load_adapter(spec.adapter))

    def load_adapter(self, path: Path) -> "NativeAdapter":
        """Load a LoRA adapter; it is not used before `set_adapter`.

        llama.cpp compares architecture, tensor names and shapes, so an adapter of another base model with the same
        shapes is not detected.

        Raises:
            ModelNotLoaded: the file is missing, not an adapter, or belongs to a model of another shape.
        """
        check_file(path)
        self._log.errors.clear()  # errors about earlier files
        native = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not native:
            raise ModelNotLoaded(
                f"{path} cannot be applied to {self._gguf}: {self._last_errors()}. The adapter must have been "
                "trained on this base model and converted by convert_lora_to_gguf.py with --base; convert it again."
            )
        return NativeAdapter(path, native)

    def set_adapter(self, adapter: "NativeAdapter | None") -> None:
        """Use this adapter at scale 1, or None, and free the previous one.

        Call it only while no request is running: the KV cache was computed with the previous adapter.
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

    def info(self) -> EngineInfo:
        """Return a description of the model and of the build that runs it."""
        return EngineInfo(
            n_params=llama_cpp.llama_model_n_params(self._model),
            n_vocab=self.n_vocab,
            context_train=llama_cpp.llama_model_n_ctx_train(self._model),
            context=self.context,
            build=f"llama-cpp-python {llama_cpp.__version__}, llama.cpp {llama_cpp.llama_version().decode()}",
            threads=self.threads.most,
            own_ends=self.own_ends,
        )

    @cached_property
    def max_prompt_bytes(self) -> int:
        """Size above which a text has more tokens than the context, however it is tokenized."""
        longest = max(len(llama_cpp.llama_vocab_get_text(self.vocab, token)) for token in range(self.n_vocab))
        return self.context * longest

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Decode a batch and return a row of logits for each output in it; valid until the next decode."""
        before = self.threads.now
        if self.threads.update() != before:
            llama_cpp.llama_set_n_threads(self._context, self._alone or self.threads.now, self.threads.now)
        code = llama_cpp.llama_decode(self._context, batch.native)
        if code != 0:  # impossible while every sequence fits into its context
            raise RuntimeError(f"llama_decode returned {code} for {batch.used} tokens")
        if not batch.outputs:
            return np.empty((0, self.n_vocab), np.float32)
        rows: NDArray[np.float32] = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self._context), (batch.outputs, self.n_vocab)
        )
        return rows

    @cached_property
    def shares_beginnings(self) -> bool:
        """Return whether a sequence can continue from the beginning of another one; recurrent models have a state."""
        return not (llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model))

    def keep_beginning(self, seq_id: int, length: int) -> int:
        """Remove what follows the first tokens of a sequence; return how many tokens it has then."""
        if length and self.shares_beginnings and llama_cpp.llama_memory_seq_rm(self._memory, seq_id, length, -1):
            return length
        self.clear_sequence(seq_id)
        return 0

    def copy_beginning(self, source: int, target: int, length: int) -> int:
        """Replace a sequence by the first tokens of another one; return how many tokens it has then."""
        self.clear_sequence(target)
        # Sequences with a KV cache each can only be copied as a whole. The data follow at the next decode.
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        return self.keep_beginning(target, length)

    def clear_sequence(self, seq_id: int) -> None:
        """Remove a sequence from the KV cache."""
        llama_cpp.llama_memory_seq_rm(self._memory, seq_id, -1, -1)


class NativeAdapter:
    """A LoRA adapter in memory, loaded for one model."""

    def __init__(self, path: Path, native: Any) -> None:
        self.path = path
        self.native = native

    def close(self) -> None:
        """Free its memory; it must not be in use."""
        llama_cpp.llama_adapter_lora_free(self.native)


def check_file(path: Path) -> None:
    """Check that a file exists and starts as a GGUF does.

    Raises:
        ModelNotLoaded: it does not.
    """
    if not path.is_file():
        raise ModelNotLoaded(f"{path} does not exist or is not a file; give the path of a GGUF file.")
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise ModelNotLoaded(
            f"{path} is not a GGUF file: it starts with {start!r} instead of b'GGUF'. Convert the model with "
            "llama.cpp's convert_hf_to_gguf.py, or download the file again."
        )


@cache
def _candidate_type() -> np.dtype[Any]:
    return np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class NativeSampler:
    """A llama.cpp sampler that is applied to logits in numpy arrays."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def apply(self, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> tuple[NDArray[Any], int]:
        """Return the remaining candidates (id, logit, p), and the index of the selected one."""
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

    def accept(self, token: int) -> None:
        """Count a token for the penalties."""
        llama_cpp.llama_sampler_accept(self._native, token)

    def close(self) -> None:
        """Free its memory."""
        llama_cpp.llama_sampler_free(self._native)


def sampler_chain(request: GenerateRequest, seed: int | None, prompt: Sequence[int], n_vocab: int) -> NativeSampler:
    """Return a sampler for the parameters of a request; without a seed it selects the most probable token.

    Args:
        prompt: tokens of the prompt, which count for repeat_penalty. The other penalties count the answer's tokens
            only, as in OpenAI's API.
    """
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(chain, sampler)

    biased = [(token, bias) for token, bias in request.logit_bias.items() if bias]
    if biased:
        biases = (llama_cpp.llama_logit_bias * len(biased))(*biased)
        add(llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biased), biases))
    if request.repeat_penalty != 1 and request.repeat_last_n:
        last_n = request.repeat_last_n
        repeat = llama_cpp.llama_sampler_init_penalties(n_vocab, last_n, request.repeat_penalty, 0.0, 0.0)
        for token in prompt[-last_n:]:
            llama_cpp.llama_sampler_accept(repeat, token)
        add(repeat)
    if request.frequency_penalty or request.presence_penalty:
        frequency, presence = request.frequency_penalty, request.presence_penalty
        counted = min(request.max_tokens, MAX_COUNTED)
        add(llama_cpp.llama_sampler_init_penalties(n_vocab, counted, 1.0, frequency, presence))
    if seed is None:
        add(llama_cpp.llama_sampler_init_greedy())
        return NativeSampler(chain)
    if request.top_k:
        add(llama_cpp.llama_sampler_init_top_k(request.top_k))
    if request.typical_p < 1:
        add(llama_cpp.llama_sampler_init_typical(request.typical_p, 1))
    if request.min_p:
        add(llama_cpp.llama_sampler_init_min_p(request.min_p, 1))
    add(llama_cpp.llama_sampler_init_temp(request.temperature))
    if request.top_p < 1:  # after the temperature, as in most APIs
        add(llama_cpp.llama_sampler_init_top_p(request.top_p, 1))
    add(llama_cpp.llama_sampler_init_dist(seed))
    return NativeSampler(chain)
