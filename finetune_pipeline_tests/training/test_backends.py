"""The choice of a backend, and what each rejects before anything starts. Unsloth itself needs a GPU."""

import pytest

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.backends import BACKENDS, Availability, available_backends, choose_backend, unsloth
from finetune_pipeline.training.backends.axolotl import COMMAND, Axolotl
from finetune_pipeline.training.backends.peft import Peft
from finetune_pipeline.training.backends.unsloth import Unsloth, lora_arguments, model_arguments
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import TrainingError, finished
from finetune_pipeline.training.model import load_model, lora_config
from finetune_pipeline.training.trainer import run_training

from .conftest import weights, with_settings


class OnGpu(Unsloth):
    """Unsloth as on a machine with a GPU; nothing of it is run."""

    def check(self):
        return Availability("unsloth", True, "unsloth 1.0; trains on one GPU")


def without_gpu(monkeypatch):
    monkeypatch.setattr("finetune_pipeline.training.backends.unsloth.has_nvidia", lambda: False)


def test_every_backend_explains_its_availability(monkeypatch):
    without_gpu(monkeypatch)
    monkeypatch.delenv(COMMAND, raising=False)
    found = {backend.name: backend for backend in available_backends()}
    assert list(found) == ["peft", "qlora", "unsloth", "axolotl"]
    assert all(backend.why and (backend.available or backend.remedy) for backend in found.values())
    assert found["peft"].available
    assert "no NVIDIA GPU" in found["unsloth"].why
    assert COMMAND in found["axolotl"].why
    assert f"set {COMMAND} to its command" in found["axolotl"].remedy


def test_auto_chooses_unsloth_where_it_can_train(monkeypatch):
    without_gpu(monkeypatch)
    here, reason = choose_backend(TrainingSettings())
    assert here.name == "peft"
    assert reason == "auto: unsloth cannot run here (no NVIDIA GPU was found (no nvidia-smi))"
    there = [Peft(), OnGpu(), Axolotl()]
    assert choose_backend(TrainingSettings(), there)[0].name == "unsloth"
    assert choose_backend(TrainingSettings(backend="axolotl"), there)[0].name == "axolotl"


@pytest.mark.parametrize("setting", [{"num_processes": 2}, {"trainable_token_indices": "all"}], ids=str)
def test_auto_chooses_peft_for_what_unsloth_cannot_train(monkeypatch, setting):
    without_gpu(monkeypatch)
    backend, reason = choose_backend(TrainingSettings(**setting), [Peft(), OnGpu(), Axolotl()])
    assert backend.name == "peft"
    assert reason.startswith("auto: unsloth cannot train this")


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("axolotl", {"reward_weighted": True}, "set reward_weighted: false, or backend: peft"),
        ("axolotl", {"compute": "ray"}, "set compute: local"),
        ("axolotl", {"trainable_token_indices": "all"}, "list trainable_token_indices"),
        ("axolotl", {"mode": "incremental"}, "set mode: full"),
        ("axolotl", {"method": "kto", "early_stopping_patience": 2}, "no early stopping for kto"),
        ("unsloth", {"num_processes": 2}, "num_processes: 1"),
        ("unsloth", {"bf16": False}, "leave bf16 true"),
        ("unsloth", {"trainable_token_indices": (3,)}, "leave trainable_token_indices out"),
        ("unsloth", {"mode": "incremental"}, "set mode: full"),
        ("unsloth", {"use_dora": True}, "leave use_dora out"),
        ("unsloth", {"attn_implementation": "sdpa"}, "leave attn_implementation out"),
        ("unsloth", {"lora_config": {"lora_bias": True}}, "does not take lora_config lora_bias"),
        ("axolotl", {"lora_config": {"lora_bias": True}}, "does not take lora_config lora_bias"),
        ("axolotl", {"trainer_config": {"torch_empty_cache_steps": 5}}, "trainer_config torch_empty_cache_steps"),
        ("axolotl", {"attn_implementation": "eager"}, "has no attn_implementation: eager"),
        ("peft", {"attn_implementation": "flash_attention_2"}, "flash_attention_2 needs an NVIDIA GPU"),
        ("peft", {"attn_implementation": "flash_attention_2", "bf16": False}, "set bf16: true, or leave it out"),
    ],
)
def test_unsupported_settings_are_named_with_a_remedy(backend, changes, message):
    one = next(known for known in BACKENDS if known.name == backend)
    settings = TrainingSettings.model_validate({"backend": backend, **changes})
    assert any(message in problem for problem in one.unsupported(settings))
    assert not list(one.unsupported(TrainingSettings()))


@pytest.mark.parametrize(
    ("backend", "command", "message"),
    [
        ("unsloth", None, "unsloth cannot run here: no NVIDIA GPU was found .*; use peft"),
        ("axolotl", None, f"axolotl cannot run here: {COMMAND} is not set; install Axolotl"),
        ("axolotl", "/nowhere/axolotl", "is /nowhere/axolotl, which is not a program; install Axolotl"),
    ],
)
def test_an_unavailable_backend_is_refused_before_anything_starts(job, monkeypatch, backend, command, message):
    without_gpu(monkeypatch)
    monkeypatch.delenv(COMMAND, raising=False)
    if command:
        monkeypatch.setenv(COMMAND, command)
    with pytest.raises(TrainingError, match=message):
        train(with_settings(job, backend=backend))
    assert not job.output.exists()


def test_unsupported_settings_are_refused_before_anything_starts(job, monkeypatch, tmp_path):
    command = tmp_path / "axolotl"
    command.touch(mode=0o755)
    monkeypatch.setenv(COMMAND, str(command))
    with pytest.raises(TrainingError, match="axolotl cannot train this: it cannot sample examples by their reward"):
        train(with_settings(job, backend="axolotl", reward_weighted=True))


def test_a_model_with_an_adapter_trains_like_one_without(job, tmp_path):
    """As the backend unsloth does it: only the construction of the model differs."""
    from peft import get_peft_model

    def adapted(job, bf16):
        base = load_model(job, bf16)
        return get_peft_model(base, lora_config(job.settings, base))

    results = []
    for name, hook in [("plain", load_model), ("adapted", adapted)]:
        one = with_settings(job, num_train_epochs=1).model_copy(update={"output": tmp_path / name})
        one.output.mkdir()
        run_training(one, 0.0, load_model=hook)
        results.append((finished(one).loss_after, weights(one)))
    assert results[0] == results[1]


def test_unsloth_gets_the_settings_of_the_job(job):
    arguments = model_arguments(with_settings(job, adapter="qlora", max_length=512, gradient_checkpointing=True))
    assert arguments["model_name"] == str(job.base_model)
    assert (arguments["load_in_4bit"], arguments["load_in_16bit"], arguments["trust_remote_code"]) == (
        True,
        False,
        False,
    )
    assert (arguments["max_seq_length"], arguments["use_gradient_checkpointing"]) == (512, "unsloth")
    every = lora_arguments(job.settings)
    assert (every["r"], every["lora_alpha"], every["random_state"]) == (4, 8, 0)
    assert every["target_modules"] == list(unsloth.LINEAR_LAYERS)
    some = lora_arguments(job.settings.model_copy(update={"lora_target_modules": ("q_proj",)}))
    assert some["target_modules"] == ["q_proj"]
    passed = {"use_rslora": True, "lora_config": {"init_lora_weights": "gaussian"}}
    more = lora_arguments(job.settings.model_copy(update=passed))
    assert (more["use_rslora"], more["init_lora_weights"]) == (True, "gaussian")
