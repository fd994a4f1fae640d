"""The descriptions of asset checks: each shows its numbers, whether it passed or not."""

import re

import dagster as dg
import pytest

from finetune_pipeline.evaluation.gate import BudgetState, QualityFloor, decide
from finetune_pipeline.evaluation.regression import RegressionCounts, regression_test
from finetune_pipeline.evaluation.report import ReportFindings
from finetune_pipeline.evaluation.significance import PairedScores, compare_slices, paired_test
from finetune_pipeline.orchestration.checks import eval_report_results, gguf_model_results
from finetune_pipeline.pipeline.export import ModelCheck, judge_check


def test_the_agreement_check_shows_its_numbers(make_loop):
    agreement = ModelCheck("agreement", True, {"fraction": 0.95, "same": 19, "total": 20, "offenders": []})
    crashed = ModelCheck("loads_and_answers", False, {"error": "EngineError: it crashed"})
    shown = [check.description for check in gguf_model_results(make_loop(), [agreement, crashed])]
    assert shown[0].startswith("19 of 20 answers equal those of the unmerged adapter (95%), at least ")
    assert shown[1] == "EngineError: it crashed"


@pytest.mark.parametrize(
    ("difference", "margin", "prompts", "passed", "shown"),
    [
        (-0.01, 0.05, 128, True, "equivalent: -1.0 points on 128 questions, 90% interval "),
        (-0.04, 0.05, 128, False, "undecided: -4.0 points on 128 questions, .* margin 5; about .* would show equiv"),
        (-0.01, 0.02, 128, True, "too few questions to tell: -1.0 points on 128 .* margin 2; about .* would show"),
        (-0.01, 0.05, 40, True, "too few questions to tell: -1.0 points on 40 questions, .* about .* would show"),
        (-0.06, 0.05, 40, False, "too few questions to tell: -6.0 points on 40 questions, "),
        (-0.30, 0.05, 128, False, "not equivalent: -30.0 points on 128 questions"),
    ],
)
def test_a_stored_score_is_tested_with_the_margin_of_today(make_loop, difference, margin, prompts, passed, shown):
    loop = make_loop(export={"equivalence_margin": margin})
    metrics = {"prompts": prompts, "score": 0.7, "reference_score": 0.7 - difference, "difference": difference}
    stored = ModelCheck("score_equivalence", not passed, {**metrics, "deviation": 0.1})
    judged = judge_check(loop, stored)
    [result] = gguf_model_results(loop, [judged])
    assert judged.passed == result.passed == passed
    assert re.match(shown, result.description)
    assert result.metadata["margin (points)"].value == 100 * margin


def test_a_mismatch_of_tokens_names_the_kinds_of_conversations_and_blocks(make_loop):
    metrics = {"conversations": {"several turns": 4}, "refused": 0, "differing": {"several turns": 3}, "offenders": []}
    [result] = gguf_model_results(make_loop(), [ModelCheck("tokenizer_parity", False, metrics)])
    assert result.description.endswith("other tokens in llama.cpp than in training: several turns (3)")
    assert result.severity == dg.AssetCheckSeverity.ERROR


def test_verdict_significance_and_slices_show_their_numbers(make_loop):
    loop = make_loop(gate={"significance": "required"})
    scores = PairedScores([1] * 30 + [0] * 30, [1] * 30 + [1] * 6 + [0] * 24, 60)
    slices = {"walls": scores, "doors": PairedScores([1] * 40, [0] * 40, 40)}
    found, tests = paired_test(scores), compare_slices(slices, 0.05, 0.05)
    verdict = decide(30, 36, 60, QualityFloor(0, 60, 60, False), loop.gate, found, tests, BudgetState(True, 4))
    suite = regression_test(RegressionCounts(40, 40, 30, 12, 2), 0.1, 0.05)
    results = eval_report_results(loop, ReportFindings(verdict, found, tests, suite))
    shown = {name: result.description for name, result in results.items()}
    # Dagster renders Markdown, which joins lines that are no list.
    assert shown["gain"] == f"inconclusive: {verdict.markdown}"
    statement, empty, *others = shown["gain"].split("\n")
    assert empty == ""
    assert [line.removeprefix("- ") for line in others] == verdict.reason.split("\n")[1:]
    assert others[0].startswith("- inconclusive: ") and others[-1] == (
        "- error budget: 4 further comparisons until it is renewed"
    )
    assert statement.startswith("inconclusive: challenger 36 of 60 correct, champion 30: gain 20.0%, 5% needed; ")
    assert shown["significance"] == verdict.evidence
    assert shown["significance"].startswith(
        "6 questions won, 0 lost, 54 equal: p = 0.016 by exact McNemar, at most 0.0042"
    )
    assert shown["no_slice_regressed"].startswith(
        "slice doors regressed: -100.0 points on 40 questions, more than the 5"
    )
    assert shown["fixed_corrections_held"].startswith("12 of 30 fixed corrections broken, 10% tolerated: p = 1.5e-05")
    assert results["fixed_corrections_held"].metadata["broken"].value == 12
    assert results["fixed_corrections_held"].severity == dg.AssetCheckSeverity.WARN
    required = loop.model_copy(update={"gate": loop.gate.model_copy(update={"regression": "required"})})
    strict = eval_report_results(required, ReportFindings(verdict, found, tests, suite))["fixed_corrections_held"]
    assert strict.severity == dg.AssetCheckSeverity.ERROR
    assert not any(result.passed for result in results.values())
    assert results["gain"].metadata["decision"].value == "inconclusive"
    without = eval_report_results(loop, ReportFindings(verdict, found, tests))["fixed_corrections_held"]
    assert without.passed and without.description == "no promotion has fixed a correction yet"
    metadata = {name: value.value for name, value in results["significance"].metadata.items()}
    assert metadata["tests left in the error budget"] == 4
    assert metadata["more questions needed"] == verdict.more_questions
