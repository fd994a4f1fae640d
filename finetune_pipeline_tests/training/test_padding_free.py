"""Packed examples learn exactly what they learn alone."""

import copy
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from finetune_pipeline.inference.tokenizer import load_tokenizer
from finetune_pipeline.training import padding_free
from finetune_pipeline.training.conversations import IGNORE_INDEX
from finetune_pipeline.training.tokenized_data import load_data
from finetune_pipeline.training.trainer import make_trainer, mean_loss, run_training

from .conftest import with_settings

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral, a window of 5 tokens": MistralConfig(**SHAPE, sliding_window=5),
    "gemma3, every other layer a window": Gemma3TextConfig(
        **SHAPE, sliding_window=5, layer_types=["sliding_attention", "full_attention"], attn_implementation="eager"
    ),
}
BFLOAT16_ERROR = 0.06  # relative: it has 8 bits of precision


def examples(seed=0):
    """Return examples of 12, 3 and 9 tokens, of which the last 4, 1 and 5 have labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length, labeled in ((12, 4), (3, 1), (9, 5)):
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (length - labeled) + ids[length - labeled :]})
    return made


def gradients(model, losses):
    model.zero_grad()
    loss = sum(losses)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, example):
    """Return the sum of an example's losses, computed by transformers."""
    ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
    logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")


def together(model, batch):
    labels = batch.pop("labels")
    head = model.get_output_embeddings()
    if not hasattr(head, "predicted_tokens"):
        padding_free.patch_head(head)
    with padding_free.predict(head, labels):
        return padding_free.summed_loss(model(**batch, use_cache=False), labels, 1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, BFLOAT16_ERROR)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_each_example_alone(family, dtype, close, checkpointing):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).to(dtype).train()
    assert padding_free.supports(model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that attention is far from uniform
    expected_loss, expected = gradients(model, [alone(model, example) for example in examples()])
    model.set_attn_implementation(padding_free.register_attention())
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss, found = gradients(model, [together(model, padding_free.collate(examples()))])
    assert loss == pytest.approx(expected_loss, rel=close)
    assert found.keys() == expected.keys()
    wanted, got = (torch.cat([each[name].float().flatten() for name in expected]) for each in (expected, found))
    assert (got - wanted).norm() <= close * wanted.norm()


def test_an_example_is_independent_of_the_rest_of_its_batch():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"]))
    model.set_attn_implementation(padding_free.register_attention())
    kept, *_ = examples()
    results = []
    for seed in (1, 2):  # other neighbors
        batch = padding_free.collate([*examples(seed)[1:], kept])
        batch.pop("labels")
        results.append(model(**batch).logits[0, -4:])
    assert torch.equal(*results)


def test_logits_are_computed_only_where_a_completion_token_is_predicted():
    batch = padding_free.collate(examples())
    ids = [token for example in examples() for token in example["input_ids"]]
    assert batch["input_ids"].tolist() == [[*ids, *[0] * (128 - len(ids))]]
    assert int(batch["tokens"]) == len(ids) == 24
    assert batch["position_ids"].tolist() == [[*range(12), *range(3), *range(9), *range(104)]]
    kept = [(index, label) for index, label in zip(batch["logits_to_keep"], batch["labels"][0], strict=True)]
    predicted = [(int(index), int(label)) for index, label in kept if label != IGNORE_INDEX]
    assert [ids[index + 1] for index, _ in predicted] == [label for _, label in predicted]
    assert (len(predicted), len(kept)) == (4 + 1 + 5, 16)


def test_batches_have_few_shapes():
    batches = [[{"input_ids": [1] * n, "labels": [1] * n} for n in range(start, start + 24)] for start in range(40, 70)]
    shapes = [padding_free.collate(batch) for batch in batches]
    assert all(one["input_ids"].shape[1] % 128 == one["labels"].shape[1] % 16 == 0 for one in shapes)
    assert len({one["input_ids"].shape for one in shapes}) < 8  # of 30 batches with as many lengths


def test_the_mean_loss_equals_that_of_single_examples(job):
    tokens = load_tokenizer(job.base_model)
    data = load_data(job, tokens)
    job.output.mkdir()
    trainer = make_trainer(job, with_settings(job, per_device_train_batch_size=3).settings, data, tokens, 24, False)
    plain = AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32)
    with torch.no_grad():
        total = sum(float(alone(plain, row)) for row in data.validation)
    tokens_counted = sum(label != IGNORE_INDEX for row in data.validation for label in row["labels"])
    assert mean_loss(trainer, data.validation) == pytest.approx(total / tokens_counted, rel=1e-5)


def test_accumulation_weighs_every_completion_token_the_same(job, tmp_path):
    tokens = load_tokenizer(job.base_model)
    data = load_data(job, tokens)
    found = []
    for batch_size, accumulation in ((6, 1), (2, 3)):
        sized = with_settings(
            job, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, num_train_epochs=1
        )
        sized = sized.model_copy(update={"output": tmp_path / str(batch_size)})
        torch.manual_seed(0)
        trainer = make_trainer(sized, sized.settings, data, tokens, 11, False)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(found[0]) == len(found[1]) == 11
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_only_tested_architectures_are_packed():
    from transformers import Gemma2Config, Gemma3Config, GptOssConfig, MambaConfig

    assert all(padding_free.supports(config) for config in FAMILIES.values())
    # A recurrent state; attention sinks; soft-capped logits; a vision tower.
    assert not any(
        padding_free.supports(config()) for config in (MambaConfig, GptOssConfig, Gemma2Config, Gemma3Config)
    )


def test_logits_are_computed_in_chunks(monkeypatch):
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    batch = padding_free.collate(examples())
    batch.pop("tokens")
    whole = gradients(model, [together(model, dict(batch))])
    monkeypatch.setattr(padding_free, "tokens_per_chunk", lambda vocabulary: 3)
    parts = gradients(model, [together(model, dict(batch))])
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[1].keys() == whole[1].keys()
    for name, gradient in parts[1].items():
        torch.testing.assert_close(gradient, whole[1][name])


def test_other_architectures_train_with_padded_batches(job, padded_base):
    from trl import SFTTrainer

    tokens, model = load_tokenizer(padded_base), AutoModelForCausalLM.from_pretrained(padded_base)
    assert model.config.attn_logit_softcapping  # which no attention kernel here supports
    softcapped = job.model_copy(update={"base_model": padded_base})
    softcapped.output.mkdir()

    data = load_data(softcapped, tokens)
    trainer = make_trainer(softcapped, softcapped.settings, data, tokens, 24, False)
    assert type(trainer) is SFTTrainer
    with torch.no_grad():
        total = sum(float(alone(model, row)) for row in data.validation)
    tokens_counted = sum(label != IGNORE_INDEX for row in data.validation for label in row["labels"])
    assert mean_loss(trainer, data.validation) == pytest.approx(total / tokens_counted, rel=1e-4)
    result = run_training(softcapped, time.monotonic())
    assert result.loss_after < result.loss_before * 0.98
    assert result.tokens_per_second > 0
