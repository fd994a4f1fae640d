"""DPO and KTO on a tiny model."""

import json
import time

import pytest
from pydantic import ValidationError

from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.training import trainer as training
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.training.preference import load_preferences
from finetune_pipeline.training.tokenized_data import load_data
from finetune_pipeline.training.trainer import make_trainer, mean_loss, run_training

from .conftest import breaking_in_half, rows, save, weights, with_settings

TURNS = [{"role": "user", "content": "a wall"}, {"role": "assistant", "content": "How thick?"}]
WRONG = json.dumps({"height_m": 3})
GOOD = [{**row, "history": TURNS} for row in rows(32, 100)]
PAIRS = [{"prompt": row["prompt"], "history": TURNS, "chosen": row["completion"], "rejected": WRONG} for row in GOOD]
UNPAIRED = [{**row, "label": True} for row in GOOD] + [
    {**row, "completion": WRONG, "label": False} for row in GOOD[:16]
]


@pytest.fixture
def prefer(job, tmp_path):
    """Return a function that makes a DPO or KTO job, by default on the examples above."""

    def make(method, preferences=None, **settings):
        preferences = preferences or {"dpo": PAIRS, "kto": UNPAIRED}[method]
        folder = save(tmp_path / f"{method}{len(preferences)}", preferences)
        job.output.mkdir(exist_ok=True)
        changed = with_settings(job, method=method, **settings)
        return changed.model_copy(update={"preferences": folder, "system_prompt": "Answer in JSON."})

    return make


def trainer_of(job):
    tokenizer = load_tokenizer(job.base_model)
    data = load_data(job, tokenizer)
    if job.settings.method != "sft":
        data = load_preferences(job, data, tokenizer)
    return make_trainer(job, job.settings, data, tokenizer, 24, False), data


@pytest.mark.parametrize(("method", "examples", "steps"), [("dpo", 32, 12), ("kto", 48, 18)])
def test_it_learns_and_reports_metrics(prefer, method, examples, steps):
    job = prefer(method)
    result = run_training(job, time.monotonic())
    assert (result.method, result.examples, result.steps) == (method, examples, steps)
    assert result.loss_after < result.loss_before  # of chosen and desirable completions
    assert result.train_loss < result.curve[0].loss
    lines = [json.loads(line) for line in (job.output / "progress.jsonl").read_text().splitlines()]
    assert (lines[-1]["step"], lines[-1]["steps"]) == (steps, steps)
    assert lines[-1]["tokens_per_second"] > 0
    config = json.loads((job.output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


@pytest.fixture
def sft_adapter(job, tmp_path):
    """Folder of an adapter that was trained by SFT."""
    first = with_settings(job, num_train_epochs=1, save_steps=500).model_copy(
        update={"output": tmp_path / "sft_adapter"}
    )
    first.output.mkdir()
    run_training(first, time.monotonic())
    return first.output / "adapter"


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("on_top", [False, True], ids=["from the base", "warm start"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_an_interrupted_run_ends_with_the_same_weights(prefer, method, on_top, adapter, tmp_path, monkeypatch, request):
    whole = prefer(method, save_steps=1 / 6, adapter=adapter)
    if on_top:
        whole = whole.model_copy(update={"initial_adapter": request.getfixturevalue("sft_adapter")})
    steps = run_training(whole, time.monotonic()).steps
    broken = whole.model_copy(update={"output": tmp_path / "broken"})
    broken.output.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(training, "ProgressCallback", breaking_in_half(training.ProgressCallback))
        with pytest.raises(KeyboardInterrupt):
            run_training(broken, time.monotonic())
    assert run_training(broken, time.monotonic()).resumed_from == steps // 2  # the middle of the second epoch
    assert weights(broken) == weights(whole)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_of_a_warm_start_is_a_copy_of_the_adapter(prefer, job, method, tmp_path):
    import torch

    settings = {"trainable_token_indices": (5, 6)}
    first = with_settings(job, num_train_epochs=1, save_steps=500, **settings)
    first = first.model_copy(update={"output": tmp_path / "sft_adapter"})
    first.output.mkdir()
    run_training(first, time.monotonic())
    trainer, _ = trainer_of(prefer(method, **settings).model_copy(update={"initial_adapter": first.output / "adapter"}))
    model, ids = trainer.model.eval(), torch.tensor([[5, 6, 7, 8]])

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits

    own = logits()
    with model.disable_adapter():
        assert not torch.allclose(logits(), own, atol=1e-3)  # the base differs
    assert not [name for name, values in model.named_parameters() if values.requires_grad and ".ref" in name]
    model.set_adapter("ref")
    assert torch.equal(logits(), own)


def test_over_4_bit_weights_the_policy_starts_as_the_reference(prefer, sft_adapter):
    trainer, _ = trainer_of(prefer("dpo", adapter="qlora").model_copy(update={"initial_adapter": sft_adapter}))
    pairs = {name: weight for name, weight in trainer.model.named_parameters() if ".default." in name}
    for name, weight in pairs.items():
        assert weight.requires_grad and weight.equal(trainer.model.get_parameter(name.replace(".default.", ".ref.")))


def test_all_methods_read_the_same_tokens_and_measure_the_same_loss(prefer, job, tmp_path):
    dataset = save(tmp_path / "sft", GOOD, GOOD[:8])
    made = {}
    for method in ("sft", "dpo", "kto"):
        one = job if method == "sft" else prefer(method)
        made[method] = trainer_of(one.model_copy(update={"dataset": dataset, "system_prompt": "Answer in JSON."}))
    sft, dpo, kto = (made[method][0].train_dataset for method in ("sft", "dpo", "kto"))
    sft_adapter = [(row["input_ids"], sum(label != -100 for label in row["labels"])) for row in sft]
    assert [(row["prompt_ids"] + row["chosen_ids"], len(row["chosen_ids"])) for row in dpo] == sft_adapter
    good = [(row["prompt_ids"] + row["completion_ids"], len(row["completion_ids"])) for row in kto if row["label"]]
    assert sorted(good) == sorted(sft_adapter)
    losses = [mean_loss(trainer, data.validation) for trainer, data in made.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) == pytest.approx(losses[2], rel=1e-5)


def test_the_losses_are_those_that_were_set(prefer):
    dpo, _ = trainer_of(prefer("dpo", beta=0.3, loss_weights=(1.0, 0.5)))
    assert (dpo.beta, dpo.loss_types, dpo.loss_weights, dpo.ref_model) == (0.3, ["sigmoid", "sft"], [1.0, 0.5], None)
    plain, _ = trainer_of(prefer("dpo", loss_type=("sigmoid",)))
    assert plain.loss_types == ["sigmoid"]
    unpaired = prefer("kto", loss_type=("apo_zero_unpaired",), num_train_epochs=1)
    assert trainer_of(unpaired)[0].loss_type == "apo_zero_unpaired"
    assert run_training(unpaired, time.monotonic()).steps > 0
    kto, _ = trainer_of(prefer("kto", beta=0.3))
    assert kto.loss_type == "kto"
    assert (kto.beta, kto.desirable_weight, kto.undesirable_weight) == (0.3, 1.0, 2.0)  # 32 good, 16 bad


def test_pairs_with_a_long_completion_are_left_out_and_counted(prefer):
    long = {**PAIRS[0], "rejected": WRONG * 30}
    _, data = trainer_of(prefer("dpo", [*PAIRS, long], max_length=128))
    assert (len(data.train), data.too_long) == (32, 1)
    with pytest.raises(TrainingError, match="nothing is left to train on by dpo: of 1 rows"):
        trainer_of(prefer("dpo", [long], max_length=128))


def test_unusable_preferences_are_refused_with_the_reason(prefer, job, tmp_path):
    with pytest.raises(TrainingError, match=r"32 desirable and 0 undesirable ones to train on; set method: sft"):
        trainer_of(prefer("kto", UNPAIRED[:32]))
    with pytest.raises(TrainingError, match="needs 2 or more on each device, not 1;"):
        trainer_of(prefer("kto", per_device_train_batch_size=1))
    with pytest.raises(TrainingError, match=r"method dpo needs .*nothing, which is missing; curate the data again"):
        trainer_of(prefer("dpo").model_copy(update={"preferences": tmp_path / "nothing"}))
    values = job.model_dump() | {"settings": {"method": "auto"}}
    with pytest.raises(ValidationError, match=r"training\.method_choice\.choose_method"):
        type(job).model_validate(values)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_weights_with_the_lowest_preference_loss_are_kept(prefer, method):
    """The validation set prefers the opposite of the training set, so its loss rises from the start."""
    job = prefer(method, num_train_epochs=8, save_steps=0.25, learning_rate=5e-2)
    if method == "dpo":
        contrary = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS[:8]]
    else:
        contrary = [{**row, "label": not row["label"]} for row in [*UNPAIRED[:4], *UNPAIRED[-4:]]]
    mixed = save(job.preferences.parent / "contrary", {"dpo": PAIRS, "kto": UNPAIRED}[method], contrary)
    result = run_training(job.model_copy(update={"preferences": mixed}), time.monotonic())
    losses = {point.step: point.loss for point in result.validation}
    assert len(losses) == 4
    assert result.best_step == min(losses, key=losses.__getitem__) < result.steps
    assert result.loss_after != pytest.approx(losses[result.best_step])  # which is the loss per completion token


def test_without_a_validation_set_the_last_preference_weights_are_kept(prefer, capsys):
    result = run_training(prefer("dpo", early_stopping_patience=1), time.monotonic())
    assert not result.validation
    assert result.best_step == result.steps
    assert (
        "early_stopping_patience does nothing: the dataset has too few validation examples" in capsys.readouterr().err
    )
