"""Test whether llama.cpp works on this machine: run a tiny random model in F16 and in Q4_K_M, in child processes.

`python -m finetune_pipeline.inference.probe SOURCE TARGET` is the child that quantizes.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from finetune_pipeline.artifacts import package_versions
from finetune_pipeline.inference.engine import Engine, child_environment, signal_name
from finetune_pipeline.inference.errors import EngineError
from finetune_pipeline.inference.protocol import GenerateRequest, ModelSpec

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6  # llama.cpp's token types
_SPECIAL = (("<unk>", _UNKNOWN), *((text, _CONTROL) for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")))
_HIDDEN, _FFN, _LAYERS, _HEADS, _KV_HEADS = 256, 768, 4, 4, 2  # K-quants need rows of a multiple of 256
_SECONDS = 120


@dataclass(frozen=True)
class ProbeResult:
    """The result of the test.

    Attributes:
        works: a model in F16 runs.
        quantized_works: a model in Q4_K_M runs too.
        detail: a summary, or the first error with what to do.
        versions: of the packages that were used.
    """

    works: bool
    quantized_works: bool
    detail: str
    versions: dict[str, str]


def probe_engine() -> ProbeResult:
    """Run a tiny model in F16 and in Q4_K_M; takes 2 to 3 seconds and does not raise if llama.cpp fails."""
    versions = package_versions("llama-cpp-python", "gguf")
    with tempfile.TemporaryDirectory(prefix="finetune-probe-") as folder:
        plain, quantized = Path(folder) / "probe-f16.gguf", Path(folder) / "probe-q4_k_m.gguf"
        write_tiny_gguf(plain)
        problem = _run(plain)
        if problem:
            return ProbeResult(False, False, problem, versions)
        problem = _quantize(plain, quantized) or _run(quantized)
    return ProbeResult(True, problem is None, problem or "a tiny model runs in F16 and in Q4_K_M", versions)


def _run(gguf: Path) -> str | None:
    try:
        with Engine(ModelSpec(gguf=gguf, context=64, parallel=2)) as engine:
            requests = [GenerateRequest(prompt=text, max_tokens=4) for text in ("a", "b")]
            engine.generate([*requests, GenerateRequest(prompt="c", max_tokens=4, json_schema={"type": "boolean"})])
    except EngineError as error:
        return str(error)
    return None


def _quantize(source: Path, target: Path) -> str | None:
    command = [sys.executable, "-P", "-m", "finetune_pipeline.inference.probe", str(source), str(target)]
    try:
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"Quantizing a tiny model took more than {_SECONDS} s. This machine is too busy; try again later."
    if done.returncode == 0:
        return None
    how = signal_name(done.returncode) or f"status {done.returncode}"
    return (
        f"Quantizing a tiny model ended with {how}; reinstall llama-cpp-python. Its last output: {done.stderr[-500:]}"
    )


def write_tiny_gguf(path: Path, *, chat_template: str | None = CHATML, add_bos: bool = False, seed: int = 0) -> None:
    """Write a random Llama model with 2.9 M parameters in F16 and one token for each byte; 6 MB."""
    import gguf
    import numpy as np

    tokens = [*_SPECIAL, *((f"<0x{byte:02X}>", _BYTE) for byte in range(256))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("probe")
    writer.add_context_length(2048)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    writer.add_add_bos_token(add_bos)
    writer.add_add_space_prefix(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    random = np.random.default_rng(seed)
    for name, shape in _tensors(len(tokens)).items():
        values = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.05, shape)
        writer.add_tensor(name, values.astype(np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(vocabulary: int) -> dict[str, tuple[int, ...]]:
    kv = _HIDDEN // _HEADS * _KV_HEADS
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (_HIDDEN,),
        "attn_q": (_HIDDEN, _HIDDEN),
        "attn_k": (kv, _HIDDEN),
        "attn_v": (kv, _HIDDEN),
        "attn_output": (_HIDDEN, _HIDDEN),
        "ffn_norm": (_HIDDEN,),
        "ffn_gate": (_FFN, _HIDDEN),
        "ffn_up": (_FFN, _HIDDEN),
        "ffn_down": (_HIDDEN, _FFN),
    }
    layers = {f"blk.{n}.{name}.weight": shape for n in range(_LAYERS) for name, shape in layer.items()}
    return {"token_embd.weight": (vocabulary, _HIDDEN), **layers, "output_norm.weight": (_HIDDEN,)}


def main() -> int:
    """Quantize the file of the first argument to Q4_K_M; return 0 on success."""
    import llama_cpp

    source, target = (path.encode() for path in sys.argv[1:3])
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = 1
    code: int = llama_cpp.llama_model_quantize(source, target, params)
    return code


if __name__ == "__main__":
    sys.exit(main())
