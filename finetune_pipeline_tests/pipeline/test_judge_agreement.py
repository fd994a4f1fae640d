"""The agreement of a judge with the people whose ratings are stored, and the metrics that `finetune check` refuses."""

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.evaluation.metrics import MetricError
from finetune_pipeline.feedback import store
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.pipeline.check_loop import check_loop
from finetune_pipeline.pipeline.judge_agreement import scorer_with_agreement
from finetune_pipeline_tests.conftest import feedback, interaction
from finetune_pipeline_tests.evaluation.test_judge import endpoint, longer

EVENTS = [
    event
    for number in range(5)
    for event in (
        interaction(f"q{number}", prompt=f"mail ann.lee@example.org about {number}", output="no"),
        feedback(f"on q{number}", f"q{number}", "correction", correction="a longer answer" if number else "-"),
    )
]


def judged(make_loop, server, *, gate, **fields):
    judge = {"kind": "judge", "url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "attempts": 1, **fields}
    return make_loop(evaluation={"metric": judge} if gate else {"metric": "exact", "metrics": [judge]})


def test_a_judge_is_compared_with_corrections_that_are_redacted_first(make_loop):
    with endpoint(longer) as server:
        loop = judged(make_loop, server, gate=True, min_pairs=5)
        with connect().write() as connection:
            store.record(connection, loop.name, EVENTS, default_reward)
        said = []
        scorer = scorer_with_agreement(loop, said.append)
        assert said == ["judge: agrees with people on 4 of 5 rated pairs (80%)"]
        assert scorer.metric.agreement.agreed == 4
        sent = [body["messages"][-1]["content"] for body in server.asked]
        assert len(sent) == 10 and not any("ann.lee" in text for text in sent)


def test_the_gate_refuses_a_judge_and_a_further_metric_does_not(make_loop):
    with endpoint(longer) as server:
        with pytest.raises(MetricError, match=r"0 rated pairs .* at least 30 needed"):
            scorer_with_agreement(judged(make_loop, server, gate=True), lambda text: None)
        said = []
        scorer_with_agreement(judged(make_loop, server, gate=False), said.append)
        assert said == ["judge: its agreement with people is unknown: no rated pair has a consistent verdict"]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ({"kind": "function", "function": "nowhere.tone"}, "the function nowhere.tone of the metric function cannot"),
        ({"kind": "judge", "url": "http://a/v1", "model": "m", "api_key_env": "NO_KEY"}, "NO_KEY is not set"),
        ({"kind": "parameters", "weights": {"no.path": 2}}, "choose a metric of texts, such as exact"),
    ],
)
def test_a_check_names_a_metric_that_cannot_be_used(make_loop, metric, words):
    loop = make_loop(evaluation={"metric": "exact", "metrics": [metric]})
    assert any(words in problem for problem in check_loop(loop, download=False))
