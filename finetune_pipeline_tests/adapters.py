"""LoRA adapters with random weights in PEFT's format, created without training."""

import json
from pathlib import Path


def write_adapter(
    base: Path, folder: Path, seed: int, *, strength: float = 0.1, rank: int = 4, hidden: int | None = None
) -> None:
    """Write an adapter of a Llama that changes its answers, differently for each seed.

    Args:
        strength: standard deviation of the weights; 0.02 changes some answers of the starter model, 0.1 most.
        hidden: hidden size; default the base's. Another one gives an adapter that does not fit the base.
    """
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((base / "config.json").read_text())
    width, random = hidden or config["hidden_size"], np.random.default_rng(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        weights[f"{name}A.weight"] = random.normal(0, strength, (rank, width)).astype(np.float32)
        weights[f"{name}B.weight"] = random.normal(0, strength, (width, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj"],
    }
    lora |= {"base_model_name_or_path": str(base), "inference_mode": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
