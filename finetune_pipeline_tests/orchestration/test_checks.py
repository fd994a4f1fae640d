"""The descriptions of asset checks: each shows its numbers, whether it passed or not."""

from types import SimpleNamespace

from finetune_pipeline.orchestration.checks import eval_report_checks, gguf_model_checks
from finetune_pipeline.pipeline.export import ModelCheck


def test_the_agreement_check_shows_its_numbers(make_loop):
    agreement = ModelCheck("agreement", True, {"fraction": 0.95, "same": 19, "total": 20, "offenders": []})
    crashed = ModelCheck("loads_and_answers", False, {"error": "EngineError: it crashed"})
    shown = [check.description for check in gguf_model_checks(make_loop(), [agreement, crashed])]
    assert shown[0].startswith("19 of 20 answers are the same (95%), at least ")
    assert shown[1] == "EngineError: it crashed"


def test_significance_and_slices_show_their_numbers(make_loop):
    verdict = SimpleNamespace(
        promote=True, reason="gain", challenger_correct=2, champion_correct=1, required_correct=2, total=3,
        minimum_correct=0, valid=3, answers=3,
    )  # fmt: skip
    slices = (SimpleNamespace(name="walls", points=0.25), SimpleNamespace(name="doors", points=-0.5))
    comparison = SimpleNamespace(
        significance=SimpleNamespace(p_value=0.0123, method="exact McNemar"),
        slices=slices,
        regressed_slices=("doors",),
    )
    gain, significance, regressed = (
        check.description for check in eval_report_checks(make_loop(), comparison, verdict)
    )
    assert gain == "gain"
    assert significance == "p = 0.012 (exact McNemar), at most 0.05 allowed"
    assert regressed == "1 of 2 slices regressed; worst slice: doors -50.0%"
