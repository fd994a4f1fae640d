"""A tiny Llama with random weights and the starter model's real tokenizer, and a small dataset for it."""

import json
import shutil
from pathlib import Path

import pytest

from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings
from finetune_pipeline.training.job import JobConfig

STARTER = PROJECT_ROOT / "data" / "starter_model"


def random_model(folder, kind, **sizes):
    """Make a model with random weights, and with the tokenizer and chat template of the starter model."""
    if not (STARTER / "tokenizer_config.json").exists():
        pytest.skip(f"{STARTER} is not there; run git checkout data/starter_model")
    import torch
    import transformers

    folder.mkdir()
    for path in [*STARTER.glob("tokenizer*"), *STARTER.glob("chat_template.jinja")]:
        shutil.copyfile(path, folder / path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **sizes, **special)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of the tiny base model."""
    return random_model(
        tmp_path_factory.mktemp("base") / "tiny", "Llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def padded_base(tmp_path_factory):
    """Folder of a tiny Gemma 2, which trains on padded batches and has tied embeddings."""
    return random_model(
        tmp_path_factory.mktemp("padded") / "tiny", "Gemma2", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip


def rows(count, start=0):
    numbers = range(start, start + count)
    return [
        {"prompt": f"wall of {n} mm", "history": [], "completion": json.dumps({"thickness_mm": n})} for n in numbers
    ]


def save(folder: Path, train, validation=()):
    from datasets import Dataset, DatasetDict

    empty = Dataset.from_dict({"prompt": [], "history": [], "completion": []})
    splits = {"train": Dataset.from_list(train), "validation": Dataset.from_list(validation) if validation else empty}
    DatasetDict(splits).save_to_disk(folder, num_shards=dict.fromkeys(splits, 1))
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Folder of 64 training examples and 8 validation examples."""
    return save(tmp_path_factory.mktemp("dataset") / "d", rows(64, 100), rows(8, 300))


@pytest.fixture
def job(base, dataset, tmp_path):
    """A job of 24 steps, which takes a second."""
    # In float32, so that one and two processes, and uninterrupted and resumed runs, can be compared closely.
    settings = TrainingSettings(
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        lora_r=4,
        lora_alpha=8,
        save_steps=0.25,
        bf16=False,
    )
    return JobConfig(base_model=base, dataset=dataset, output=tmp_path / "out", settings=settings)


def weights(job):
    return (job.output / "adapter" / "adapter_model.safetensors").read_bytes()


def with_settings(job, **changes):
    return job.model_copy(update={"settings": job.settings.model_copy(update=changes)})


def breaking_in_half(kind):
    """Wrap ProgressCallback so that training ends one step after its half."""

    def make(*arguments):
        def on_step_begin(args, state, control, **_):
            if state.global_step == state.max_steps // 2 + 1:
                raise KeyboardInterrupt

        callback = kind(*arguments)
        callback.on_step_begin = on_step_begin
        return callback

    return make


def contrary(job, folder):
    """Return the job on a dataset with contradicting validation examples, whose loss rises in training."""
    wrong = [{**row, "completion": json.dumps({"thickness_mm": 77})} for row in rows(8, 100)]
    return job.model_copy(update={"dataset": save(folder / "contrary", rows(32, 100), wrong)})
