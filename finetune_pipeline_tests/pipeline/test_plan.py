"""The plan of a training."""

from finetune_pipeline.pipeline.plan import plan_training
from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.architecture import architecture_of

MISTRAL = architecture_of("mistralai/Mistral-7B-v0.3")


def test_a_plan_chooses_what_fits_and_keeps_what_is_set():
    given = TrainingSettings(lora_r=4)
    plan = plan_training(MISTRAL, given, examples=1000, vram=12)
    assert plan.machine.bytes == 12 * 2**30 * 0.95
    assert plan.refusal == "" and plan.chosen.time.seconds > 0
    assert plan.chosen.memory.bytes <= plan.machine.bytes
    assert (plan.chosen.settings.adapter, plan.chosen.settings.lora_r) == ("qlora", 4)
    shown = [(one.settings.adapter, one.settings.gradient_checkpointing) for one in plan.options]
    assert shown == [("lora", False), ("lora", True), ("qlora", False), ("qlora", True)]
    assert all((one.time is None) == (one.memory.bytes > plan.machine.bytes) for one in plan.options)
    assert plan.options[0].time is None  # base weights of 16 bits need more than 12 GB


def test_a_plan_that_fits_nothing_says_why():
    plan = plan_training(MISTRAL, TrainingSettings(), examples=10, preset="8gb", length=65536)
    assert plan.chosen is None
    assert "does not fit preset 8gb" in plan.refusal and "65536 tokens" in plan.refusal


def test_the_settings_preset_counts_unless_a_size_is_named():
    given = TrainingSettings(preset="24gb")
    of = {vram: plan_training(MISTRAL, given, examples=10, vram=vram).machine.bytes for vram in (None, 8)}
    assert of == {None: 24 * 2**30 * 0.95, 8: 8 * 2**30 * 0.95}
