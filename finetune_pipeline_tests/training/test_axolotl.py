"""The backend axolotl, with the real Axolotl in its own environment (scripts/axolotl_env.sh makes it)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from finetune_pipeline.artifacts import write_text
from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.settings import PROJECT_ROOT, TrainingSettings
from finetune_pipeline.training.backends.axolotl import COMMAND, Axolotl, EventReader
from finetune_pipeline.training.backends.axolotl_config import CONFIG, FOLDER, WrittenSplit, write
from finetune_pipeline.training.checkpoints import COMPLETE
from finetune_pipeline.training.child_process import train
from finetune_pipeline.training.job import CHECKPOINTS, TrainingError, TrainingFailed, finished
from finetune_pipeline.training.preference import load_preferences
from finetune_pipeline.training.tokenized_data import load_data
from finetune_pipeline.training.trainer import make_trainer
from finetune_pipeline_tests.waiting import wait_until

from .conftest import contrary, save, with_settings

# Making the environment, on first use, counts as a part of the test that asks first.
pytestmark = pytest.mark.timeout(1500)

SCHEMA = Path(__file__).with_name("axolotl_schema.py")


@pytest.fixture(scope="session")
def axolotl():
    """Path of the command; it is installed on first use, in about two minutes."""
    folder = PROJECT_ROOT / "data" / "state" / "axolotl"
    made = subprocess.run([PROJECT_ROOT / "scripts" / "axolotl_env.sh", folder], stdout=subprocess.PIPE, text=True)
    assert made.returncode == 0, "scripts/axolotl_env.sh failed; see its output above"
    return Path(made.stdout.strip())


@pytest.fixture
def configured(axolotl, monkeypatch):
    monkeypatch.setenv(COMMAND, str(axolotl))


def ask_the_schema(axolotl, *files):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    command = [axolotl.with_name("python"), SCHEMA, *files]
    asked = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert asked.returncode == 0, asked.stderr
    return json.loads(asked.stdout.splitlines()[-1])


def preferences(folder, method, count=16):
    rows = []
    for n in range(count):
        good, bad = json.dumps({"thickness_mm": 100 + n}), "I do not know."
        row = {"prompt": f"wall of {100 + n} mm", "history": []}
        if method == "dpo":
            rows.append({**row, "chosen": good, "rejected": bad})
        else:
            rows.append({**row, "completion": bad if n % 2 else good, "label": n % 2 == 0})
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:4])}).save_to_disk(folder)
    return folder


def job_by(job, tmp_path, name, **changes):
    changed = with_settings(job, **{"backend": "axolotl", "bf16": False, **changes})
    method = changed.settings.method
    chosen = preferences(tmp_path / method, method) if method != "sft" else None
    return changed.model_copy(update={"output": tmp_path / name, "preferences": chosen})


JOBS = {
    "sft": {},
    "sft_qlora": {"adapter": "qlora", "gradient_checkpointing": True, "report_to": ("wandb", "tensorboard")},
    "sft_stopping": {
        "early_stopping_patience": 2,
        "lora_target_modules": ("q_proj", "v_proj"),
        "trainable_token_indices": (5, 7),
    },
    "sft_passed": {
        "use_rslora": True,
        "use_dora": True,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "attn_implementation": "sdpa",
        "save_steps": 500,
        "warmup_steps": 3,
        "trainer_config": {"max_grad_norm": 0.5, "neftune_noise_alpha": 5.0, "max_steps": 20},
        "lora_config": {"init_lora_weights": "gaussian"},
    },
    "dpo": {"method": "dpo", "beta": 0.2},
    "dpo_alone": {"method": "dpo", "loss_type": ("sigmoid",), "bf16": True},
    "kto": {"method": "kto", "report_to": ("mlflow",)},
}


def test_settings_and_passed_fields_reach_axolotls_configuration(job, tmp_path):
    one = job_by(job, tmp_path, "out", **JOBS["sft_passed"])
    write(one, None, gpu=False)
    found = yaml.safe_load((one.output / FOLDER / CONFIG).read_text())
    expected = {
        "peft_use_rslora": True, "peft_use_dora": True, "peft_init_lora_weights": "gaussian", "lr_scheduler": "linear",
        "optimizer": "adamw_torch", "sdp_attention": True, "save_steps": 500, "eval_steps": 500, "warmup_steps": 3,
        "max_grad_norm": 0.5, "neftune_noise_alpha": 5.0, "max_steps": 20, "logging_steps": 1,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert "warmup_ratio" not in found


@pytest.mark.servers
def test_axolotls_schema_accepts_the_configurations(axolotl, job, tmp_path):
    files = []
    for name, changes in JOBS.items():
        one = job_by(job, tmp_path, name, **changes)
        write(one, tmp_path / "checkpoint-8" if name == "sft" else None, gpu=True)
        files.append(one.output / FOLDER / CONFIG)
    assert dict(zip(JOBS, ask_the_schema(axolotl, *files), strict=True)) == dict.fromkeys(JOBS)

    whole = yaml.safe_load(files[0].read_text())
    wrong = [{"learning_rate": "fast"}, {"lora_rank": 4}, {"rl": "kto"}, {"adapter": "lorra"}]
    for number, change in enumerate(wrong):
        write_text(files[0].with_name(f"wrong-{number}.yaml"), yaml.safe_dump(whole | change))
    message = ask_the_schema(axolotl, *[files[0].with_name(f"wrong-{number}.yaml") for number in range(len(wrong))])
    assert "learning_rate" in message[0]
    assert message[1] == "unknown: lora_rank"
    assert message[2] is not None  # kto needs all columns, and other data
    assert "adapter" in message[3]


def mean_loss(folder, adapter, rows):
    """Return the loss by transformers and PEFT alone, on the completion and its end token, without the line break."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    total = count = 0
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        answered = [*asked, {"role": "assistant", "content": row["completion"]}]
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False).rstrip()
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        labels = ids.clone()
        labels[:, : len(tokenizer(before, add_special_tokens=False)["input_ids"])] = -100
        tokens = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return total / count


@pytest.mark.servers
@pytest.mark.usefixtures("configured")
def test_axolotl_is_killed_resumes_and_leaves_an_adapter(job, tmp_path):
    from datasets import load_from_disk

    broken = job_by(job, tmp_path, "broken", num_train_epochs=20, save_steps=0.125)
    write_text(broken.output / "job.json", broken.model_dump_json())
    process = subprocess.Popen([sys.executable, "-m", "finetune_pipeline.training", broken.output / "job.json"])
    checkpoints = broken.output / CHECKPOINTS
    wait_until(lambda: list(checkpoints.glob(f"checkpoint-*/{COMPLETE}")))
    (command,) = [child for child in psutil.Process(process.pid).children() if "axolotl" in " ".join(child.cmdline())]
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not command.is_running() or command.status() == psutil.STATUS_ZOMBIE)
    assert finished(broken) is None

    seen = []
    result = train(broken, seen.append)
    assert result.resumed_from in range(20, 160, 20)
    assert result.steps == seen[-1].step == result.curve[-1].step == 160
    assert result.curve[0].step <= 4  # including the steps before the kill
    assert finished(broken) == result
    validation_rows = list(load_from_disk(str(broken.dataset / "validation")))
    assert result.loss_before == pytest.approx(mean_loss(broken.base_model, None, validation_rows), abs=1e-4)
    assert result.loss_after == pytest.approx(
        mean_loss(broken.base_model, broken.output / "adapter", validation_rows), abs=1e-3
    )
    assert result.loss_after < result.loss_before * 0.95
    assert json.loads((broken.output / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    left = {path.name for path in broken.output.iterdir()}
    assert left == {"adapter", "job.json", "progress.jsonl", "result.json", "training.log"}


@pytest.mark.servers
@pytest.mark.usefixtures("configured")
def test_axolotl_keeps_the_weights_with_the_lowest_validation_loss(job, tmp_path):
    from datasets import load_from_disk

    one = contrary(job_by(job, tmp_path, "out", num_train_epochs=16, save_steps=0.125, learning_rate=6e-2), tmp_path)
    result = train(one)
    losses = {point.step: point.loss for point in result.validation}
    # On some processors rounding makes the last of these losses the lowest one.
    assert result.best_step == min(losses, key=losses.__getitem__) and len(losses) == 8 and result.steps == 64
    validation_rows = list(load_from_disk(str(one.dataset / "validation")))
    assert result.loss_after == pytest.approx(losses[result.best_step])
    assert result.loss_after == pytest.approx(
        mean_loss(one.base_model, one.output / "adapter", validation_rows), rel=1e-3
    )


@pytest.mark.servers
@pytest.mark.usefixtures("configured")
def test_a_non_finite_loss_ends_axolotl_at_once(job, tmp_path):
    one = job_by(job, tmp_path, "out", learning_rate=1e30)
    with pytest.raises(TrainingFailed, match=r"^the loss became .* diverged"):
        train(one)
    assert not list((one.output / CHECKPOINTS).glob(f"checkpoint-*/{COMPLETE}"))


@pytest.mark.parametrize(
    "event",
    [
        {"event": "log", "step": 3, "steps": 9, "epoch": 0.1, "eval_loss": float("nan")},
        {"event": "save", "step": 3, "finite": False},
    ],
)
def test_non_finite_values_in_axolotls_events_end_the_run(job, event):
    write_text(job.output / FOLDER / "events.jsonl", "")
    reader = EventReader(job, WrittenSplit(examples=1, tokens=1))
    checkpoint = job.output / CHECKPOINTS / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    write_text(reader.path, json.dumps(event) + "\n")
    with pytest.raises(TrainingError, match="became nan by step 3"):
        reader.read()
    assert not (checkpoint / COMPLETE).exists()


@pytest.mark.parametrize(
    "script", ["echo loading; echo 'torch.OutOfMemoryError: CUDA out of memory. Tried'; exit 1", "kill -9 $$"]
)
def test_out_of_memory_in_axolotl_says_which_batch_size_to_set(job, tmp_path, monkeypatch, script):
    write_text(tmp_path / "bin" / "axolotl", f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "axolotl").chmod(0o755)
    monkeypatch.setenv(COMMAND, str(tmp_path / "bin" / "axolotl"))
    job.output.mkdir()
    message = r"memory ran out with a micro-batch of 8 \((.*CUDA|.*SIGKILL).*set per_device_train_batch_size: 4 and "
    message += "gradient_accumulation_steps: 2"
    with pytest.raises(TrainingError, match=message):
        Axolotl().run(job, 0.0)


@pytest.mark.servers
@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_axolotl_learns_from_preferences(job, tmp_path, method):
    result = train(job_by(job, tmp_path, "out", method=method, num_train_epochs=3, save_steps=500))
    assert (result.method, result.steps, result.examples) == (method, 6, 16)
    assert result.loss_after < result.loss_before


@pytest.mark.servers
@pytest.mark.usefixtures("configured")
def test_axolotls_last_lines_are_in_the_error(job, tmp_path):
    with pytest.raises(TrainingFailed, match=r"axolotl ended with status 1(.|\n)*no_such_layer"):
        train(job_by(job, tmp_path, "out", lora_target_modules=("no_such_layer",)))


def test_only_the_completion_of_a_conversation_has_labels(job, tmp_path):
    turns = [{"role": "user", "content": "a wall"}, {"role": "assistant", "content": "How thick?"}]
    dataset = save(tmp_path / "d", [{"prompt": "150 mm", "history": turns, "completion": "{}"}])
    one = job.model_copy(update={"dataset": dataset, "system_prompt": "Be short.", "output": tmp_path / "out"})
    written = write(one, None, gpu=True)
    (line,) = [json.loads(text) for text in (one.output / FOLDER / "train.jsonl").read_text().splitlines()]
    row = load_data(one, load_tokenizer(one.base_model)).train[0]  # as peft reads it
    assert (line["input_ids"], line["labels"]) == (row["input_ids"][:-1], row["labels"][:-1])  # without a line break
    assert load_tokenizer(one.base_model).decode([label for label in line["labels"] if label >= 0]) == "{}<|im_end|>"
    assert (written.examples, written.too_long) == (1, 0)


def test_a_preferred_completion_is_the_rest_of_the_template(job, tmp_path):
    settings = TrainingSettings(method="dpo", max_length=512)
    chosen = preferences(tmp_path / "pairs", "dpo", 4)
    one = job.model_copy(update={"settings": settings, "preferences": chosen, "output": tmp_path / "out"})
    write(one, None, gpu=False)
    line = json.loads((one.output / FOLDER / "train.jsonl").read_text().splitlines()[0])
    assert line == {
        "prompt": "<|im_start|>user\nwall of 100 mm<|im_end|>\n<|im_start|>assistant\n",
        "chosen": '{"thickness_mm": 100}<|im_end|>',
        "rejected": "I do not know.<|im_end|>",
    }


OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_text_of_the_generation_prompt_only_is_left_out(job, tmp_path, method):
    base = shutil.copytree(job.base_model, tmp_path / "base")
    (base / "chat_template.jinja").write_text(OPENED)
    one = job_by(job, tmp_path, "out", method=method).model_copy(update={"base_model": base})
    write(one, None, gpu=False)
    written = [json.loads(line) for line in (one.output / FOLDER / "train.jsonl").read_text().splitlines()]
    tokens = load_tokenizer(base)
    data = load_preferences(one, load_data(one, tokens), tokens)
    read = make_trainer(one, one.settings, data, tokens, 24, False).train_dataset
    names = ("prompt", "chosen", "rejected") if method == "dpo" else ("prompt", "completion")
    assert written[0]["prompt"].endswith("<|im_start|>assistant\n")
    ours = {tuple(line[name] for name in names) for line in written}
    assert ours == {tuple(_text(tokens, row, name) for name in names) for row in read}


def _text(tokens, row, name):
    text = tokens.decode(row[f"{name}_ids"])
    return text if name == "prompt" else text.rstrip()


def test_the_length_of_a_preference_is_that_of_its_longest_completion(job, tmp_path):
    base = shutil.copytree(job.base_model, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + OPENED)
    tokens = load_tokenizer(base)
    answers = {"chosen": "1 2 3 4 5 6 7", "rejected": "concrete concrete concrete"}  # of 13 tokens, and of 3
    row = {"prompt": "wall?", "history": [], **answers}
    one = job_by(job, tmp_path, "out", method="dpo")
    one = one.model_copy(update={"base_model": base, "preferences": save(tmp_path / "one", [row, row])})
    message = [{"role": "user", "content": "wall?"}, {"role": "assistant", "content": answers["chosen"]}]
    length = len(tokens.apply_chat_template(message, return_dict=True)["input_ids"])
    assert write(with_settings(one, max_length=length), None, gpu=False).examples == 2
    short = with_settings(one, max_length=length - 1)
    with pytest.raises(TrainingError, match="nothing is left to train on"):
        write(short, None, gpu=False)
    data = load_data(one, tokens)
    assert len(load_preferences(with_settings(one, max_length=length), data, tokens).train) == 2
    with pytest.raises(TrainingError, match="nothing is left to train on"):
        load_preferences(short, data, tokens)
