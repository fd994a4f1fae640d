"""Memory and time of a training run, estimated before it starts, part by part with its formula. No torch.

The peak is at the start of the backward pass, when all activations are kept and the first gradients appear. Activations
are counted as in Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for a Llama layer with LoRA over frozen
weights, whose linear layers keep their input for the adapter alone.
"""

import math
from dataclasses import dataclass
from typing import Literal

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.architecture import Architecture
from finetune_pipeline.training.padding_free import tokens_per_chunk

GIB = 2**30

# Constants that no formula gives. `python -m benchmarks memory` compares the estimates with measured peaks on a CPU.
PROCESS_BYTES = 590 * 10**6
"""A training process on a CPU before it holds a model: Python, torch, transformers, TRL, PEFT, datasets. Measured."""
CONTEXT_BYTES = 600 * 2**20
"""A CUDA context with cuBLAS's workspaces: assumed, 0.4 to 0.8 GiB by GPU and driver."""
LOGIT_COPIES = 4
"""The logits and their float32 copy, the softmax, and the gradient; each counted as float32."""
ALLOCATOR_OVERHEAD = 0.05
"""Fragmentation of CUDA's caching allocator, relative to all but the base weights: assumed."""
HEAP_COPIES = 5.2
"""Freed blocks that glibc's heap keeps on a CPU, in multiples of a feed-forward layer's width for each token and layer,
with gradient checkpointing or without. Measured; with MALLOC_MMAP_THRESHOLD_=1048576 in the environment most of them
vanish, at the cost of time."""
START_SECONDS = 10
"""Of a training process before its first update: imports, model, tokenizing. Measured on two idle CPU cores."""
UPDATE_SECONDS = 0.1
"""Of an update beyond its arithmetic, which counts with tiny models and batches. Measured on two idle CPU cores."""
ERROR = 0.2
"""Error of the estimate: a run that exceeds the memory by less is not refused."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a 4-bit weight: half a byte, a constant of 8 bits for 64 weights, and one of 32 bits for 256 of these (QLoRA,
Dettmers et al. 2023, arXiv 2305.14314, section 3)."""

FLOPS_PER_WEIGHT = {False: 4, True: 6}
"""For each token, without and with gradient checkpointing: forward 2, backward to the inputs 2, recomputation 2 (Kaplan
et al. 2020, arXiv 2001.08361, section 2.1, without gradients of the frozen weights)."""

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class MemoryPart:
    """A part of the memory: its bytes, and the formula in words."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak memory of a training run."""

    parts: tuple[MemoryPart, ...]  # the first one is the process or CUDA context, which exists before anything else

    @property
    def bytes(self) -> int:
        """The peak."""
        return sum(part.bytes for part in self.parts)

    @property
    def to_come(self) -> int:
        """The peak without the process or context, for a process that exists already."""
        return self.bytes - self.parts[0].bytes


@dataclass(frozen=True)
class TimeEstimate:
    """The seconds of a training run, and the formula in words."""

    seconds: float
    formula: str


def estimate_memory(
    architecture: Architecture,
    settings: TrainingSettings,
    device: Device,
    *,
    bf16: bool,
    tokens: int | None = None,
    micro_batch: int | None = None,
    shards: int = 1,
) -> MemoryEstimate:
    """Estimate the peak memory of a training run.

    Args:
        settings: with a preset already applied.
        bf16: whether it trains with bfloat16 autocast (on a GPU, over bfloat16 weights).
        tokens: of the longest example; default max_length.
        micro_batch: default per_device_train_batch_size.
        shards: GPUs across which the base weights are sharded (FSDP); 4-bit weights never are.
    """
    length = settings.max_length if tokens is None else min(tokens, settings.max_length)
    examples = settings.per_device_train_batch_size if micro_batch is None else micro_batch
    examples *= 2 if settings.method == "dpo" else 1  # a preference pair is two sequences
    batch_tokens = examples * length
    process = MemoryPart("process", PROCESS_BYTES, "Python, torch and the trainer's libraries (measured)")
    if device == "gpu":
        process = MemoryPart("CUDA", CONTEXT_BYTES, "context and workspaces (assumed)")
    variable = [
        _adapter(architecture, settings),
        _activations(architecture, settings, device, bf16, batch_tokens, length),
        _loss_or_gradients(architecture, settings, bf16, batch_tokens),
    ]
    if device == "gpu":
        overhead = round(ALLOCATOR_OVERHEAD * sum(part.bytes for part in variable))
        allocator = MemoryPart("allocator", overhead, f"{ALLOCATOR_OVERHEAD:.0%} of all but the base weights (assumed)")
    else:
        width = HEAP_COPIES * architecture.ffn * (2 if bf16 else 4)
        formula = (
            f"freed blocks kept: {batch_tokens:,} tokens x {architecture.layers} layers x {width:,.0f} B (measured)"
        )
        allocator = MemoryPart("allocator", round(batch_tokens * architecture.layers * width), formula)
    weights = _base_weights(architecture, settings, device, bf16, shards)
    return MemoryEstimate((process, weights, *variable, allocator))


def _base_weights(
    architecture: Architecture, settings: TrainingSettings, device: Device, bf16: bool, shards: int
) -> MemoryPart:
    size = 2 if bf16 else 4
    if settings.adapter == "qlora":
        others = architecture.parameters - architecture.linear
        # PEFT's preparation of a 4-bit model casts everything that is not in 4 bits to float32.
        return MemoryPart(
            "base weights",
            round(architecture.linear * NF4_BYTES + others * 4),
            f"{_billions(architecture.linear)} x {NF4_BYTES:.3f} B (NF4) + embeddings {_billions(others)} x 4 B",
        )
    formula = f"{_billions(architecture.parameters)} x {size} B"
    if shards == 1:
        return MemoryPart("base weights", architecture.parameters * size, formula)
    # FSDP gathers the layer that computes, meanwhile the next one, and the embeddings.
    gathered = 2 * architecture.linear // architecture.layers + architecture.embeddings
    formula += f" / {shards} GPUs + {_billions(gathered)} x {size} B gathered"
    return MemoryPart("base weights", (architecture.parameters // shards + gathered) * size, formula)


def _adapter(architecture: Architecture, settings: TrainingSettings) -> MemoryPart:
    trained = architecture.trained(settings)
    formula = f"{_billions(trained)} x 16 B (weight, gradient, AdamW's two moments, in float32)"
    copy = 0
    if architecture.trained_tokens(settings):
        copy = architecture.embeddings * 4
        formula += " + a float32 copy of the embeddings"
    return MemoryPart("adapter", trained * 16 + copy, formula)


def _activations(
    architecture: Architecture, settings: TrainingSettings, device: Device, bf16: bool, tokens: int, length: int
) -> MemoryPart:
    """Estimate what autograd keeps from the forward pass for the backward pass."""
    layer = layer_bytes(architecture, settings, bf16, length)
    casts = 0
    if device == "cpu" and bf16 and settings.adapter == "lora":
        casts = 2 * architecture.linear // architecture.layers  # autocast keeps a bfloat16 copy of a layer's weights
    ends = 4 * architecture.hidden * tokens * 3  # the embeddings, the last norm, its output
    if not settings.gradient_checkpointing:
        kept = architecture.layers * (layer * tokens + casts) + ends
        return MemoryPart("activations", round(kept), f"{architecture.layers} layers x {tokens:,} tokens x {layer:,} B")
    stream = (2 if device == "gpu" and bf16 and settings.adapter == "lora" else 4) * architecture.hidden
    kept = tokens * (architecture.layers * stream + layer) + casts + ends
    formula = f"{tokens:,} tokens x ({architecture.layers} layers x {stream:,} B + one recomputed layer {layer:,} B)"
    return MemoryPart("activations", round(kept), formula)


def layer_bytes(architecture: Architecture, settings: TrainingSettings, bf16: bool, length: int) -> int:
    """Return the bytes that a decoder layer keeps for each token.

    In float32: the residual stream before and after attention, each also normalized (4 hidden); query, key and value as
    attention takes them, and its result (4 heads); gate, its activation, up, and their product (4 ffn); the inner
    values of the adapters (7 ranks) and the mask (length). With bfloat16 the stream stays in float32, the rest is
    halved, and each adapted layer that shares its input keeps its own bfloat16 copy of it.
    """
    hidden, queries, ffn = architecture.hidden, architecture.heads * architecture.head_dim, architecture.ffn
    inner = 4 * queries + 4 * ffn + len(architecture.projections) * settings.lora_r + length
    if bf16:
        return 4 * architecture.norms * hidden + 2 * (5 * hidden + inner)
    return 4 * ((2 + architecture.norms) * hidden + inner)


def _loss_or_gradients(architecture: Architecture, settings: TrainingSettings, bf16: bool, tokens: int) -> MemoryPart:
    """Estimate the transient memory: the logits of the loss or, where that is more, the gradients of one layer.

    SFT computes logits in chunks. TRL's DPO and KTO compute all of them, and so does SFT with padded batches and
    trained embeddings that are the output layer too.
    """
    wrapped_output = settings.trainable_token_indices and architecture.tied and not architecture.padding_free
    chunk = tokens
    if settings.method not in {"dpo", "kto"} and not wrapped_output:
        chunk = min(tokens_per_chunk(architecture.vocabulary), tokens)
    logits = chunk * architecture.vocabulary * 4 * LOGIT_COPIES
    size = 2 if bf16 else 4
    gradients = tokens * 3 * architecture.ffn * size
    if settings.adapter == "qlora":  # a layer's weights are dequantized too
        gradients += max(inputs * outputs for inputs, outputs in architecture.projections.values()) * size
    if logits >= gradients:
        formula = f"{LOGIT_COPIES} x logits of {chunk} tokens x {architecture.vocabulary:,} tokens of vocabulary x 4 B"
        return MemoryPart("loss", logits, formula)
    formula = f"of one feed-forward layer: {tokens:,} tokens x 3 x {architecture.ffn:,} x {size} B"
    return MemoryPart("gradients", gradients, formula)


def count_flops(architecture: Architecture, settings: TrainingSettings, tokens: int, length: int) -> float:
    """Return the floating-point operations of training on `tokens` tokens in examples of `length`."""
    # Attention: 2 x 2 x length x width forward, half of it masked; the backward pass takes twice as many.
    width = architecture.heads * architecture.head_dim
    attention = architecture.layers * 2 * length * width * (4 if settings.gradient_checkpointing else 3)
    base = FLOPS_PER_WEIGHT[settings.gradient_checkpointing] * architecture.linear
    output = 6 * architecture.vocabulary * architecture.hidden
    return float(tokens) * (base + output + attention + 6 * architecture.trained(settings))


def estimate_time(
    architecture: Architecture, settings: TrainingSettings, *, examples: int, tokens: int, rate: float, source: str
) -> TimeEstimate:
    """Estimate how long a training run takes, without its validations.

    Args:
        settings: with a preset already applied.
        tokens: of the mean example.
        rate: floating-point operations per second that training reaches.
        source: where that rate comes from, in words.
    """
    trained = math.ceil(settings.num_train_epochs * examples) * tokens
    work = count_flops(architecture, settings, trained, tokens)
    update = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    updates = math.ceil(settings.num_train_epochs * math.ceil(examples / update))
    return TimeEstimate(
        START_SECONDS + updates * UPDATE_SECONDS + work / rate,
        f"{settings.num_train_epochs:g} epochs x {examples:,} examples x {tokens:,} tokens, {work:.2g} operations "
        f"({FLOPS_PER_WEIGHT[settings.gradient_checkpointing]} for each weight and token, and attention), at "
        f"{rate / 1e12:.3g} TFLOP/s: {source}; {START_SECONDS} s to start, and {UPDATE_SECONDS:g} s for each of "
        f"{updates:,} updates",
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
