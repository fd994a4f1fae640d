"""The descriptions of asset checks: each shows its numbers, whether it passed or not."""

from finetune_pipeline.evaluation.gate import QualityFloor, decide
from finetune_pipeline.evaluation.report import ReportFindings
from finetune_pipeline.evaluation.significance import Significance
from finetune_pipeline.orchestration.checks import eval_report_results, gguf_model_results
from finetune_pipeline.pipeline.export import ModelCheck


def test_the_agreement_check_shows_its_numbers(make_loop):
    agreement = ModelCheck("agreement", True, {"fraction": 0.95, "same": 19, "total": 20, "offenders": []})
    crashed = ModelCheck("loads_and_answers", False, {"error": "EngineError: it crashed"})
    shown = [check.description for check in gguf_model_results(make_loop(), [agreement, crashed])]
    assert shown[0].startswith("19 of 20 answers equal those of the unmerged adapter (95%), at least ")
    assert shown[1] == "EngineError: it crashed"


def test_significance_and_slices_show_their_numbers(make_loop):
    loop = make_loop()
    significance = Significance("exact McNemar", 0.0123, 0.0, 0.5, 3)
    verdict = decide(1, 2, 3, QualityFloor(0, 3, 3, False), loop.gate, significance, ["doors"])
    found = ReportFindings(verdict, significance, {"walls": 0.25, "doors": -0.5}, ("doors",))
    shown = {name: result.description for name, result in eval_report_results(loop, found).items()}
    assert shown["gain"] == verdict.reason
    assert shown["significance"] == "p = 0.012 (exact McNemar), at most 0.05 allowed"
    assert shown["no_slice_regressed"] == "1 of 2 slices regressed; worst slice: doors -50.0 points"
