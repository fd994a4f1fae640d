"""A base model that is a GGUF, as people have it for llama.cpp or Ollama: dequantized once into a folder for training.

transformers reads weights, configuration, tokenizer and chat template from the file; it reads the special tokens wrong
and leaves out what it has no name for, so both are corrected or rejected here. The result is cached by the file's
content.
"""

import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune_pipeline.artifacts import flush, hash_file_cached, wait_for_lock
from finetune_pipeline.export.process import ExportError, run_step
from finetune_pipeline.inference.tokenizer import without_unicode_normalization
from finetune_pipeline.settings import home
from finetune_pipeline.wording import first_line

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_FORM = 2  # number of the form of the folders; those of an earlier one are not used
_PROBLEM = "problem.txt"
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens by their names in transformers, with their names in a GGUF."""
_ENDS = ("eos", "eot", "eom")
_SHOWN = 3


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, whatever its name: Ollama's blobs are named by their hash."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def cached_folder(gguf: Path) -> Path:
    """Return the folder into which a GGUF is dequantized; it may not exist yet."""
    # The converter to GGUF and servers show the name of the folder.
    name = gguf.stem if gguf.suffix == ".gguf" else "model"
    return home() / "cache" / "gguf_bases" / f"{name}-{hash_file_cached(gguf)[:12]}-{_FORM}"


def dequantized(gguf: Path) -> Path:
    """Return the folder of a GGUF's model in Hugging Face's layout; make it if it does not exist yet.

    The weights have the GGUF's precision: F16 for quantized ones, at 2 bytes each. Tokens are compared with those of
    llama.cpp.

    Raises:
        ExportError: the file is damaged, or of an architecture, tensor type or tokenizer that cannot be read.
    """
    folder = cached_folder(gguf)
    if folder.is_dir():
        return folder
    with wait_for_lock(folder, f"reading of {gguf.name}", _log.info):
        if folder.is_dir():
            return folder
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        _log.info("reading the base model %s into %s, once", gguf, folder)
        try:
            run_step("dequantize", [str(gguf), str(draft)], f"reading the base model {gguf}")
            problem = draft / _PROBLEM
            if problem.is_file():
                raise ExportError(f"the base model {gguf} cannot be used: {problem.read_text(encoding='utf-8')}")
            for path in draft.iterdir():
                flush(path)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        flush(folder.parent)
    return folder


class _Unusable(Exception):
    """The GGUF cannot be used; the message says why and what to do."""


def dequantize_here(gguf: Path, folder: Path) -> None:
    """Write a GGUF's model into a folder in this process, or the file `problem.txt` if that is not possible."""
    with TemporaryDirectory() as alone:  # beside other files, transformers would read their configuration
        link = Path(alone) / "model.gguf"
        link.symlink_to(gguf.resolve())
        try:
            _dequantize(link, folder)
        except _Unusable as problem:
            (folder / _PROBLEM).write_text(str(problem), encoding="utf-8")


class _Metadata(NamedTuple):
    architecture: str
    tokenizer: tuple[str, str]  # llama.cpp's kind and its pre-tokenizer, such as gpt2 and smollm
    special: dict[str, int]
    ends: list[int]
    dtype: str


def _dequantize(gguf: Path, folder: Path) -> None:
    metadata = _read_metadata(gguf)
    tokenizer = _tokenizer(gguf, metadata)
    _compare_tokens(gguf, tokenizer)

    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=metadata.dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:  # transformers and gguf raise anything
        raise _Unusable(
            f"transformers cannot read its weights ({type(error).__name__}: {first_line(str(error))}); set base_model "
            "to the original model in Hugging Face's format"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise _Unusable(
            f"{len(missing)} weights of the architecture {metadata.architecture} are not found in it, such as "
            f"{', '.join(missing[:_SHOWN])}; set base_model to the original model in Hugging Face's format"
        )
    ids = {f"{name}_token_id": id for name, id in metadata.special.items() if name != "unk"}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": metadata.ends})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_metadata(gguf: Path) -> _Metadata:
    """Return what is needed of a GGUF's metadata; raise if transformers cannot read the file as it is meant."""
    from gguf import GGUFReader, quants
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        reader = GGUFReader(gguf)
    except Exception as error:  # numpy's errors for a file that is too short
        if "GGMLQuantizationType" in str(error):
            raise _Unusable(
                f"it has a tensor type that is not known ({error}); take another quantization of the model"
            ) from error
        raise _Unusable(f"it is damaged or cut short ({first_line(str(error))}); download it again") from error
    size = gguf.stat().st_size
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if end > size:
        raise _Unusable(f"it is cut short: its tensors end at byte {end:,}, and it has {size:,}; download it again")
    if not reader.tensors:
        raise _Unusable("it has no weights; take a GGUF with the whole model")
    architecture = _value(reader, "general.architecture")
    original = "set base_model to the original model in Hugging Face's format"
    readable = [name for name in GGUF_SUPPORTED_ARCHITECTURES if name != "general"]
    if architecture not in readable:
        raise _Unusable(
            f"its architecture is {architecture!r}, and transformers reads {', '.join(readable)} from GGUFs; {original}"
        )
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            quants.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            raise _Unusable(
                f"its tensor {tensor.name} has the type {tensor.tensor_type.name}, which cannot be dequantized; take "
                "another quantization of the model"
            ) from None
    scaling = _value(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise _Unusable(
            f"it scales its position embeddings ({scaling or 'rope_freqs'}), which transformers does not read from a "
            f"GGUF, so the trained model would be another one; {original}"
        )
    if _value(reader, "tokenizer.ggml.model") is None or "tokenizer.ggml.tokens" not in reader.fields:
        raise _Unusable(f"it has no tokenizer; take a complete GGUF of the model, or {original}")
    if _value(reader, "tokenizer.chat_template") is None:
        raise _Unusable(
            "it has no chat template, which marks where a prompt ends and an answer begins; take the GGUF of an "
            "instruction-tuned model"
        )
    matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    special = {
        name: id
        for name, key in _SPECIAL_TOKENS.items()
        if (id := _value(reader, f"tokenizer.ggml.{key}_token_id")) is not None
    }
    ends = [_value(reader, f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    kind, pre = (str(_value(reader, f"tokenizer.ggml.{key}") or "") for key in ("model", "pre"))
    return _Metadata(
        architecture,
        (kind, pre),
        special,
        list(dict.fromkeys(id for id in ends if id is not None)),
        "float32" if "F32" in matrices else "bfloat16" if "BF16" in matrices else "float16",
    )


def _value(reader: "GGUFReader", key: str) -> Any:
    """Return a value of a GGUF's metadata; None if it has none."""
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _tokenizer(gguf: Path, metadata: _Metadata) -> "PreTrainedTokenizerBase":
    """Return the tokenizer with the special tokens that the metadata name."""
    from transformers import AutoTokenizer

    try:
        tokenizer = without_unicode_normalization(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
    except Exception as error:  # transformers raises anything
        raise _Unusable(
            f"transformers cannot read its tokenizer ({type(error).__name__}: {first_line(str(error))}); set "
            "base_model to the original model in Hugging Face's format"
        ) from error
    for name in _SPECIAL_TOKENS:  # transformers takes the one with the lowest id for several of them
        id = metadata.special.get(name)
        setattr(tokenizer, f"{name}_token", None if id is None else tokenizer.convert_ids_to_tokens(id))
    kind, pre = metadata.tokenizer
    if kind == "gpt2":
        make_byte_level(tokenizer, pre)
    return tokenizer


def make_byte_level(tokenizer: "PreTrainedTokenizerBase", pre: str) -> None:
    """Correct a byte-level tokenizer that transformers read as one of a Llama with SentencePiece.

    With the byte fallback of SentencePiece, llama.cpp's converter would write a vocabulary of that kind, with which
    llama.cpp ends the process at the first text.
    """
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    model = backend.model
    if not getattr(model, "byte_fallback", False):
        return
    model.byte_fallback = model.fuse_unk = False
    backend.model = model
    backend.decoder = decoders.ByteLevel()
    if pre == "smollm":  # the converter recognizes it by how it splits digits
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)


def _compare_tokens(gguf: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise if training would read other tokens than llama.cpp reads with the GGUF's own tokenizer."""
    from finetune_pipeline.export.parity import compare_tokens, parity_conversations
    from finetune_pipeline.inference.errors import EngineError, RequestRefused
    from finetune_pipeline.inference.native import NativeVocabulary

    try:
        encode = NativeVocabulary(gguf).template.tokens
        parity = compare_tokens(tokenizer, encode, parity_conversations(tokenizer, ""))
    except RequestRefused as error:
        raise _Unusable(f"its chat template cannot be used: {error}") from error
    except EngineError as error:
        raise _Unusable(f"llama.cpp cannot use its tokenizer: {error}") from error
    if not parity.compared:
        raise _Unusable("its chat template rejects every conversation; take the GGUF of an instruction-tuned model")
    if parity.differences:
        pairs = dict.fromkeys(difference.first_pair(tokenizer) for difference in parity.differences)
        raise _Unusable(
            f"training would read other tokens than llama.cpp does, in {len(parity.differences)} of "
            f"{sum(parity.compared.values())} test conversations: {'; '.join([*pairs][:_SHOWN])}. Set base_model to "
            "the original model in Hugging Face's format"
        )
