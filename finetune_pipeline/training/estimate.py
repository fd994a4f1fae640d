"""How much memory and time a training takes, reckoned before it starts, part by part with its formula. No torch.

The peak is at the beginning of the backward pass: what is kept for it is whole, and the gradients begin. The counts
of activations follow Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for a layer of Llama's kind with a LoRA
adapter over frozen weights, whose linear layers keep their input for the adapter alone.
"""

import math
from dataclasses import dataclass
from typing import Literal

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.architecture import Architecture
from finetune_pipeline.training.padding_free import tokens_at_a_time

GIB = 2**30

# What no formula gives: measured on a CPU by `python -m benchmarks memory`, which shows by how much they are off.
PROCESS_BYTES = 590 * 10**6
"""A CPU's training process before it holds a model: Python, torch, transformers, TRL, PEFT, datasets."""
CONTEXT_BYTES = 600 * 2**20
"""A CUDA context with cuBLAS's workspaces: an assumption, 0.4 to 0.8 GiB by card and driver."""
LOGIT_COPIES = 4
"""Logits as they come and in float32, their softmax, and the gradient: as if each were in float32."""
ALLOCATOR_SHARE = 0.05
"""What CUDA's allocator loses between blocks, over all that comes and goes: an assumption."""
HEAP_COPIES = 5.2
"""Freed blocks that glibc's heap keeps on a CPU: so many of a feed-forward layer's width for each token and layer, with
checkpointing or without. Measured; with MALLOC_MMAP_THRESHOLD_=1048576 in the environment most of them vanish, for
more time."""
ERROR = 0.2
"""The estimate's own error: a need within it is no reason to refuse."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a 4-bit weight: half a byte, a block's constant in 8 bits, a constant of 256 such in 32 (QLoRA, Dettmers et al.
2023, arXiv 2305.14314, section 3)."""

BACKWARD_FLOPS = {False: 4, True: 6}
"""Operations for each weight and token, without and with gradient checkpointing: forward 2, backward to the inputs 2,
the second forward 2 (Kaplan et al. 2020, arXiv 2001.08361, section 2.1, without the gradients of frozen weights)."""

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Part:
    """A part of the memory: its bytes, and in words how they were reckoned."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of a training.

    Attributes:
        parts: what it consists of; the first is the process or the CUDA context, there before anything is loaded.
    """

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """The peak."""
        return sum(part.bytes for part in self.parts)

    @property
    def to_come(self) -> int:
        """The peak without the process or context, for one that stands already."""
        return self.bytes - self.parts[0].bytes


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a training, and in words how they were reckoned."""

    seconds: float
    formula: str


def memory(
    architecture: Architecture,
    settings: TrainingSettings,
    device: Device,
    *,
    bf16: bool,
    tokens: int | None = None,
    micro_batch: int | None = None,
    shards: int = 1,
) -> MemoryEstimate:
    """The peak of a training.

    Args:
        architecture: of the base model.
        settings: of the training, settled.
        device: where it trains.
        bfloat16: whether it trains with bfloat16 autocast (on a GPU, over bfloat16 weights).
        tokens: of the longest example; default max_length.
        micro_batch: examples in memory at once; default per_device_train_batch_size.
        shards: cards that the base's weights are dealt out to (FSDP); weights in 4 bits never are.
    """
    length = settings.max_length if tokens is None else min(tokens, settings.max_length)
    batch = settings.per_device_train_batch_size if micro_batch is None else micro_batch
    batch *= 2 if settings.method == "dpo" else 1  # a pair is two examples
    parts = [
        _process(device),
        _weights(architecture, settings, device, bf16, shards),
        _adapter(architecture, settings),
        _activations(architecture, settings, device, bf16, batch, length),
        _working(architecture, settings, bf16, batch * length),
    ]
    return MemoryEstimate((*parts, _allocator(architecture, device, bf16, batch * length, parts[2:])))


def _process(device: Device) -> Part:
    if device == "gpu":
        return Part("CUDA", CONTEXT_BYTES, "context and workspaces (assumed)")
    return Part("process", PROCESS_BYTES, "Python, torch and the trainer's libraries (measured)")


def _weights(architecture: Architecture, settings: TrainingSettings, device: Device, bf16: bool, shards: int) -> Part:
    each = 2 if device == "gpu" and bf16 else 4
    if settings.adapter == "lora" and shards > 1:
        # FSDP puts the layer that computes together, the next one meanwhile, and the embeddings.
        whole = 2 * architecture.linear // architecture.layers + architecture.embeddings
        formula = (
            f"{_billions(architecture.parameters)} x {each} B / {shards} cards + {_billions(whole)} x {each} B whole"
        )
        return Part("base weights", (architecture.parameters // shards + whole) * each, formula)
    if settings.adapter == "lora":
        return Part("base weights", architecture.parameters * each, f"{_billions(architecture.parameters)} x {each} B")
    others = architecture.parameters - architecture.linear
    # PEFT's preparation of a 4-bit model turns all that is not in 4 bits into float32.
    return Part(
        "base weights",
        round(architecture.linear * NF4_BYTES + others * 4),
        f"{_billions(architecture.linear)} x {NF4_BYTES:.3f} B (NF4) + embeddings {_billions(others)} x 4 B",
    )


def _adapter(architecture: Architecture, settings: TrainingSettings) -> Part:
    trained = architecture.trained(settings)
    formula = f"{_billions(trained)} x 16 B (weight, gradient, AdamW's two means, float32)"
    copies = 0
    if architecture.trained_tokens(settings):
        copies = architecture.embeddings * 4
        formula += " + the embeddings anew in float32"
    return Part("adapter", trained * 16 + copies, formula)


def _activations(
    architecture: Architecture, settings: TrainingSettings, device: Device, bf16: bool, batch: int, length: int
) -> Part:
    """What is kept from the forward pass for the backward pass."""
    tokens = batch * length
    layer = layer_bytes(architecture, settings, bf16, length)
    weights = cast_bytes(architecture, settings, device, bf16)
    ends = 4 * architecture.hidden * tokens * 3  # the embeddings, the last normalisation, its output
    if not settings.gradient_checkpointing:
        kept = architecture.layers * (layer * tokens + weights) + ends
        return Part("activations", round(kept), f"{architecture.layers} layers x {tokens:,} tokens x {layer:,} B")
    stream = (2 if device == "gpu" and bf16 and settings.adapter == "lora" else 4) * architecture.hidden
    kept = tokens * (architecture.layers * stream + layer) + weights + ends
    formula = f"{tokens:,} tokens x ({architecture.layers} layers x {stream:,} B + one whole layer {layer:,} B)"
    return Part("activations", round(kept), formula)


def layer_bytes(architecture: Architecture, settings: TrainingSettings, bf16: bool, length: int) -> int:
    """Bytes that one decoder layer keeps for each token.

    In float32: the residual stream before and after attention and both normalised (4 hidden), query, key and value as
    attention takes them and its result (4 heads), gate, its activation, up and their product (4 ffn); the adapters'
    inner values (7 ranks) and the mask (length). With bfloat16 the stream stays in float32, the rest is halved, and
    each adapted layer that shares its input keeps its own bfloat16 copy of it.
    """
    hidden, queries, ffn = architecture.hidden, architecture.heads * architecture.head_dim, architecture.ffn
    inner = 4 * queries + 4 * ffn + len(architecture.projections) * settings.lora_r + length
    stream = 2 + architecture.norms - 2
    if bf16:
        return 4 * stream * hidden + 2 * (5 * hidden + inner)
    return 4 * ((2 + stream) * hidden + inner)


def cast_bytes(architecture: Architecture, settings: TrainingSettings, device: Device, bf16: bool) -> int:
    """The bfloat16 copy of a layer's float32 weights, which autocast keeps for the backward pass on a CPU."""
    if device == "cpu" and bf16 and settings.adapter == "lora":
        return 2 * architecture.linear // architecture.layers
    return 0


def _working(architecture: Architecture, settings: TrainingSettings, bf16: bool, tokens: int) -> Part:
    """What comes and goes: the loss's logits or, where that is more, one layer's gradients.

    Of answers to learn the logits are made for some tokens at a time; TRL's DPO and KTO make them for all. So does its
    SFT where rows are filled up and trained embeddings are the output layer too, which is then no bare one.
    """
    plain = settings.trainable_token_indices and architecture.tied and not architecture.shares_rows
    whole = settings.method in {"dpo", "kto"} or plain
    chunk = tokens if whole else min(tokens_at_a_time(architecture.vocabulary), tokens)
    logits = chunk * architecture.vocabulary * 4 * LOGIT_COPIES
    each = 2 if bf16 else 4
    layer = tokens * 3 * architecture.ffn * each
    if settings.adapter == "qlora":
        layer += max(inputs * outputs for inputs, outputs in architecture.projections.values()) * each
    if logits >= layer:
        words = f"{LOGIT_COPIES} x logits of {chunk} tokens x {architecture.vocabulary:,} words x 4 B"
        return Part("loss", logits, words)
    return Part(
        "gradients", layer, f"of one feed-forward layer: {tokens:,} tokens x 3 x {architecture.ffn:,} x {each} B"
    )


def _allocator(architecture: Architecture, device: Device, bf16: bool, tokens: int, passing: list[Part]) -> Part:
    if device == "gpu":
        lost = round(ALLOCATOR_SHARE * sum(part.bytes for part in passing))
        return Part("allocator", lost, f"{ALLOCATOR_SHARE:.0%} of all but the base's weights (assumed)")
    each = 2 if bf16 else 4
    kept = round(HEAP_COPIES * tokens * architecture.layers * architecture.ffn * each)
    words = f"{tokens:,} tokens x {architecture.layers} layers x {HEAP_COPIES} x {architecture.ffn:,} x {each} B"
    return Part("allocator", kept, f"freed blocks kept: {words} (measured)")


def flops(architecture: Architecture, settings: TrainingSettings, tokens: int, length: int) -> float:
    """Operations of training on `tokens` tokens in examples of `length`."""
    passes = BACKWARD_FLOPS[settings.gradient_checkpointing]
    output = architecture.vocabulary * architecture.hidden
    # Scores and mixture: 2 x 2 x length x width forward, half of it masked, twice as much back.
    width = architecture.heads * architecture.head_dim
    attention = architecture.layers * 2 * length * width * (4 if settings.gradient_checkpointing else 3)
    adapter = 6 * architecture.trained(settings)
    return float(tokens) * (passes * architecture.linear + 6 * output + attention + adapter)


def time(
    architecture: Architecture, settings: TrainingSettings, *, examples: int, tokens: int, rate: float, source: str
) -> TimeEstimate:
    """How long a training takes, without its start and its evaluations.

    Args:
        architecture: of the base model.
        settings: of the training, settled.
        examples: in the dataset.
        tokens: of the mean example.
        rate: floating-point operations a second that the training reaches.
        source: where that rate is from, in words.
    """
    whole = math.ceil(settings.num_train_epochs * examples) * tokens
    work = flops(architecture, settings, whole, tokens)
    passes = BACKWARD_FLOPS[settings.gradient_checkpointing]
    return TimeEstimate(
        work / rate,
        f"{settings.num_train_epochs:g} epochs x {examples:,} examples x {tokens:,} tokens, {work:.2g} operations "
        f"({passes} for each weight and token, and attention), at {rate / 1e12:.3g} TFLOP/s: {source}",
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
