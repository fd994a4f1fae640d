"""A judge behind a real HTTP server: verdicts in both orders, agreement with people, and judges that fail."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_pipeline.evaluation.benchmark import load_benchmark
from finetune_pipeline.evaluation.comparison import Comparison, judge
from finetune_pipeline.evaluation.metric_table import metric_table
from finetune_pipeline.evaluation.metrics import MetricError
from finetune_pipeline.evaluation.metrics.judge import Judge, JudgeAgreement, Pair
from finetune_pipeline.evaluation.report import findings_of_report, write_report
from finetune_pipeline.evaluation.run import Contender, compare_models
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline.inference.protocol import ModelSpec
from finetune_pipeline.settings import EvaluationSettings, GateSettings, JudgeMetric
from finetune_pipeline_tests.evaluation.fakes import FakeEngines, line, write_benchmark

Says = Callable[[str, str], str | None]
"""What the judge replies to answers A and B; None is no reply in time, and "fails" an error."""


class _Endpoint(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, says: Says, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says, self.status = says, status
        self.asked: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        answers = re.findall(r"<answer_.>\n(.*?)\n</answer_.>", body["messages"][-1]["content"], re.DOTALL)
        text = self.server.says(*answers)
        if text is None:
            time.sleep(1)
            text = "A"
        self.send_response(503 if text == "fails" else self.server.status)
        self.end_headers()
        event = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
        try:
            self.wfile.write(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())
        except OSError:
            return  # the judge's client did not wait

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def endpoint(says: Says, status: int = 200) -> Iterator[_Endpoint]:
    with _Endpoint(says, status) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def settings(server: _Endpoint, **fields: Any) -> JudgeMetric:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return JudgeMetric(url=url, model="m", **{"timeout_seconds": 20, "attempts": 1, **fields})


def longer(a: str, b: str) -> str:
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "T"


SETTINGS = EvaluationSettings(benchmark="b.jsonl", metric="exact", max_tokens=32, context=256, parallel=2)


def compared(tmp_path: Path, *metrics: Any, questions: int = 6) -> Comparison:
    """Compare a champion whose answers have 5 characters with a challenger whose answers get longer from 3 to 8."""
    lines = [
        line(f"q{number}", slice=f"s{number}", prompt=f"Question {number}", expected="none")
        for number in range(questions)
    ]
    benchmark = load_benchmark(write_benchmark(tmp_path / "b.jsonl", lines), None)
    for name, length in {"old": lambda n: 5, "new": lambda n: 3 + n}.items():
        answers = {f"Question {number}": name[0] * length(number) for number in range(questions)}
        (tmp_path / f"{name}.gguf").write_text(json.dumps(answers))
    contenders = [Contender(name, ModelSpec(gguf=tmp_path / f"{name}.gguf")) for name in ("old", "new")]
    scorer = Scorer(metrics[0], None, (), metrics[1:])
    return compare_models(*contenders, benchmark, scorer, SETTINGS, "", "notes", open_engine=FakeEngines())


def test_verdicts_are_counted_as_wins_losses_and_ties(tmp_path: Path) -> None:
    with endpoint(longer) as server:
        comparison = compared(tmp_path, "exact", settings(server, criteria="long"))
        asked = len(server.asked)
        again = compared(tmp_path, "exact", settings(server, criteria="long"))
        assert asked == len(server.asked) == 12 and again.judgements == comparison.judgements  # from the cache
    (judgement,) = comparison.judgements
    assert (judgement.wins, judgement.losses, judgement.ties, judgement.inconsistent) == (3, 2, 1, 0)
    row = next(row for row in metric_table(comparison) if row.key == "metric_judge")
    assert (row.name, row.champion, row.challenger) == ("preferred by the judge", 5 / 12, 7 / 12)
    system, user = (message["content"] for message in server.asked[0]["messages"])
    assert "A good answer is long." in system and "<expected_answer>\nnone\n" in user
    assert comparison.champion.totals.correct == 0  # the gate's metric


def test_the_gate_can_count_verdicts(tmp_path: Path) -> None:
    with endpoint(longer) as server:
        comparison = compared(tmp_path, settings(server))
    write_report(tmp_path, "notes", comparison, judge(comparison, GateSettings()), GateSettings(), 0.9)
    page = (tmp_path / "report.html").read_text()
    assert "judge: 3 wins, 2 losses, 1 ties, set aside 0" in page
    assert "best constant answer, " not in page  # none is sought
    assert json.loads((tmp_path / "report.json").read_text())["judgements"][0]["wins"] == 3
    assert (comparison.champion.totals.correct, comparison.challenger.totals.correct) == (5, 7)
    assert [one.change for one in comparison.questions] == [-2, -2, 0, 2, 2, 2]
    verdict = judge(comparison, GateSettings())
    assert verdict.promote and comparison.constant.correct == 0


def test_a_slice_without_a_verdict_has_no_score(tmp_path: Path) -> None:
    with endpoint(lambda a, b: "A" if min(a, b) == "nnn" else longer(a, b)) as server:
        comparison = compared(tmp_path, settings(server))
    assert {group.name: (group.points, group.champion.total) for group in comparison.slices} == {
        "s0": (0.0, 0), "s1": (-1.0, 2), "s2": (0.0, 2), "s3": (1.0, 2), "s4": (1.0, 2), "s5": (1.0, 2),
    }  # fmt: skip
    write_report(tmp_path, "notes", comparison, judge(comparison, GateSettings()), GateSettings(), 0.9)
    assert comparison.judgements[0].inconsistent == 1
    # What is set aside is no tie, and no part of the paired test.
    assert (len(comparison.won), len(comparison.lost), comparison.ties) == (3, 1, 1)
    assert (comparison.significance.questions, comparison.significance.method) == (5, "exact McNemar")
    slices = comparison.slice_tests(GateSettings())
    assert "s0" not in {one.name for one in slices}
    assert findings_of_report(tmp_path / "report.json", GateSettings()).slices == slices


REASONED = "<think>B looks like A, but</think>\n**Verdict: {}**."


@pytest.mark.parametrize("form", ["{}", " {}.", "({})", "**{}**", "Answer: {}", REASONED])
def test_a_letter_is_read_in_usual_forms(tmp_path: Path, form: str) -> None:
    with endpoint(lambda a, b: form.format(longer(a, b))) as server:
        assert compared(tmp_path, "exact", settings(server)).judgements[0].wins == 3


@pytest.mark.parametrize(
    ("says", "inconsistent", "no_verdict"),
    [
        (lambda a, b: "A", 6, {}),  # prefers a position
        (lambda a, b: "T" if a > b else "A", 6, {}),
        (lambda a, b: "Both are fine, but A is better.", 0, {"a reply that is not A, B or T": 6}),
        (lambda a, b: "", 0, {"a reply that is not A, B or T": 6}),
        (lambda a, b: "C", 0, {"a reply that is not A, B or T": 6}),
    ],
)
def test_verdicts_that_say_nothing_are_set_aside(
    tmp_path: Path, says: Says, inconsistent: int, no_verdict: dict[str, int]
) -> None:
    with endpoint(says) as server:
        comparison = compared(tmp_path, "exact", settings(server))
        (judgement,) = comparison.judgements
        assert (judgement.wins, judgement.losses, judgement.ties) == (0, 0, 0)
        assert (judgement.inconsistent, judgement.no_verdict) == (inconsistent, no_verdict)
        assert "metric_judge" not in {row.key for row in metric_table(comparison)}  # no score, rather than 0
        with pytest.raises(MetricError, match=r"evaluation\.metric: the judge http.* cannot decide: "):
            compared(tmp_path, settings(server))


@pytest.mark.parametrize(
    ("says", "status", "reason"),
    [
        (lambda a, b: None, 200, "no reply within 0.1 seconds"),
        (longer, 500, "returned status 500"),
        (longer, 401, "returned status 401"),
        (longer, 400, "the request was refused: .* status 400"),
    ],
    ids=["silent", "broken", "no key", "refused"],
)
def test_a_judge_that_fails_decides_nothing(tmp_path: Path, says: Says, status: int, reason: str) -> None:
    with endpoint(says, status) as server:
        made = settings(server, parallel=1, timeout_seconds=0.1 if status == 200 else 20)
        (judgement,) = compared(tmp_path, "exact", made).judgements
        assert judgement.no_verdict and re.search(reason, next(iter(judgement.no_verdict)))
        assert sum(judgement.no_verdict.values()) == 6
        assert len(server.asked) == (12 if status == 400 else 5)  # after 5 failures in a row, no more are sent
        with pytest.raises(MetricError, match=f"cannot decide: .*{reason}"):
            compared(tmp_path, made)


def test_a_judge_that_is_not_there_decides_nothing(tmp_path: Path) -> None:
    nobody = JudgeMetric(url="http://127.0.0.1:9/v1", model="m", attempts=1)
    with pytest.raises(MetricError, match=r"cannot decide: .*does not answer \(ConnectError") as error:
        compared(tmp_path, nobody)
    assert ".;" not in str(error.value)


def test_a_failure_is_tried_again_and_no_failed_reply_is_kept(tmp_path: Path) -> None:
    seen: set[tuple[str, str]] = set()

    def busy_at_first(a: str, b: str) -> str:
        known = (a, b) in seen
        seen.add((a, b))
        return longer(a, b) if known else "fails"

    with endpoint(busy_at_first) as server:
        once = settings(server, parallel=1)
        assert compared(tmp_path, "exact", once).judgements[0].no_verdict
        seen.clear()
        twice = settings(server, attempts=2)
        assert compared(tmp_path, "exact", twice).judgements[0].wins == 3


def test_equal_answers_are_a_tie_without_a_question(tmp_path: Path) -> None:
    with endpoint(lambda a, b: "A") as server:
        measured = Judge(settings(server)).measure_agreement([Pair("?", '{"a": 1}', '{"a":1}')])
        assert measured == JudgeAgreement(1, 0, 0) and not server.asked  # a tie does not agree


@pytest.mark.parametrize(
    ("says", "agreement", "refused"),
    [
        (longer, JudgeAgreement(10, 8, 0), ""),
        (lambda a, b: {"A": "B", "B": "A", "T": "T"}[longer(a, b)], JudgeAgreement(10, 2, 0), "on 2 of 10 rated pairs"),
        (lambda a, b: "A", JudgeAgreement(0, 0, 10), "0 rated pairs with a consistent verdict"),
        (lambda a, b: "I like both", JudgeAgreement(0, 0, 10, "a reply that is not A, B or T"), r"not A, B or T\)"),
    ],
    ids=["agrees", "lies", "prefers a position", "prose"],
)
def test_the_gate_counts_a_judge_only_above_an_agreement(says: Says, agreement: JudgeAgreement, refused: str) -> None:
    pairs = [Pair(f"?{n}", "a" * 9, "b" * 5) for n in range(8)] + [Pair(f"!{n}", "a", "bb") for n in range(2)]
    with endpoint(says) as server:
        one = Judge(settings(server, min_pairs=10))
        assert one.measure_agreement(pairs) == agreement
    if not refused:
        one.check_agreement()
        return
    with pytest.raises(MetricError, match=refused):
        one.check_agreement()


def test_too_few_rated_pairs_are_not_enough_for_the_gate() -> None:
    one = Judge(JudgeMetric(url="http://127.0.0.1:9/v1", model="m"))
    with pytest.raises(MetricError, match=r"0 rated pairs .*at least 30 needed \(min_pairs\): rate or correct"):
        one.check_agreement()
    one.agreement = JudgeAgreement(1, 1, 0)
    with pytest.raises(MetricError, match="1 rated pair with"):
        one.check_agreement()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://127.0.0.1:99999/v1"}, "is not valid"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_an_error_before_anything_runs(fields: dict[str, str], words: str) -> None:
    with pytest.raises(MetricError, match=words):
        Scorer("exact", metrics=[JudgeMetric(**{"url": "http://127.0.0.1:9/v1", "model": "m", **fields})])
