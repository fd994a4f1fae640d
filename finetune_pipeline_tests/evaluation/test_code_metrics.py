"""Code that parses, and code that passes its tests in a sandbox; what the sandbox forbids."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_pipeline.cli import doctor
from finetune_pipeline.evaluation.metrics import MetricError, sandbox
from finetune_pipeline.evaluation.metrics.code import code_of
from finetune_pipeline.evaluation.metrics.sandbox import isolation_problem, run_in_sandbox
from finetune_pipeline.evaluation.scoring import Scorer
from finetune_pipeline_tests.evaluation.fakes import question, score

needs_sandbox = pytest.mark.skipif(isolation_problem() is not None, reason=isolation_problem() or "")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nand\n```\ny = 2\n```", "x = 1\n"),
        ("~~~\nx = 1\n~~~", "x = 1\n"),
        ("````\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
        ("```python\nx = 1", "x = 1"),  # cut off
        ("  ```py\n  x = 1\n  ```", "  x = 1\n"),
    ],
)
def test_the_first_fenced_block_is_the_code(answer: str, code: str) -> None:
    assert code_of(answer) == code


@pytest.mark.parametrize(
    ("language", "answer", "parses"),
    [
        ("python", "def f(x):\n    return x", True),
        ("python", "def f(x):\nreturn x", False),
        ("python", "# nothing\n", False),
        ("python", "", False),
        ("python", "x = '\\d'", True),
        ("python", "x\0", False),
        ("python", "(" * 5_000, False),
        ("python", "x" * 200_000, False),
        ("go", "func f() int { return 1 }", True),
        ("go", "func f( int { return 1 }", False),
        ("typescript", "const f = (x: number) => x;", True),
        ("javascript", "const f = (x: number) => x;", False),
        ("rust", "fn f() -> i32 { 1 }", True),
    ],
)
def test_code_parses_or_not(language: str, answer: str, parses: bool) -> None:
    if language != "python":
        pytest.importorskip("tree_sitter", reason='pip install "finetune-pipeline[code]"')
    scores = score(Scorer({"kind": "parses", "language": language}), "any", answer)
    assert (scores.correct, scores.total) == (int(parses), 1)


def test_another_language_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tree_sitter_go", None)
    with pytest.raises(MetricError, match=r"parses needs the extra code"):
        Scorer("exact", metrics=[{"kind": "parses", "language": "go"}])


LAST = {"expected": "def last(items):\n    return items[-1]", "tests": "assert last([1, 2]) == 2"}


@needs_sandbox
@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("```python\ndef last(items):\n    *_, one = items\n    return one\n```", 1),
        ("def last(items):\n    return items[0]", 0),
        ("def last(items) return", 0),
        ("import sys\nsys.exit(0)", 0),
        ("import os\nos._exit(0)", 0),
        ("def last(items):\n    while True: pass", 0),
        ("", 0),
    ],
)
def test_code_passes_its_tests_or_not(answer: str, passes: int) -> None:
    scorer = Scorer("exact", metrics=[{"kind": "tests", "timeout_seconds": 3}])
    (count,) = scorer.score(question(**LAST), answer).metrics
    assert (count.correct, count.total) == (passes, 1)


@needs_sandbox
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**LAST, "tests": None}, "the tests of every question, and 'q1' has none"),
        ({**LAST, "tests": "assert last([1]) == 2"}, r"'q1' does not pass its own tests \(AssertionError\)"),
    ],
)
def test_questions_are_checked_first(fields: dict[str, Any], words: str) -> None:
    Scorer("exact", metrics=["tests"], questions=[question(**LAST)])
    with pytest.raises(MetricError, match=words):
        Scorer("exact", metrics=["tests"], questions=[question(**fields)])


FILLS_THE_DISK = """
for number in range(20):
    with open(f"/tmp/{number}", "wb") as file:
        file.write(bytes(9_000_000))
"""
MANY_PROCESSES = "import os\nwhile True:\n    os.fork()"
SHARES_THE_MEMORY = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        taken = bytearray(b"x" * 60_000_000)
        time.sleep(60)
time.sleep(60)
"""


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", "ConnectionRefusedError"),
        ("open({secret!r})", "FileNotFoundError"),
        ("import os\nassert os.listdir('/home') == []", "FileNotFoundError"),
        ("open('/usr/x', 'w')", "Read-only file system"),
        ("open('/dev/x', 'w')", "Read-only file system"),
        ("x = bytearray(10**9)", "MemoryError"),
        ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (10**10, 10**10))", "not allowed to raise"),
        ("import os\nos.mkdir('/tmp/x')\nos.chroot('/tmp/x')", "Operation not permitted"),
        ("import os\nassert set(os.environ) <= {{'PWD', 'LC_CTYPE'}}\nos.kill({pid}, 9)", "ProcessLookupError"),
        ("import time\ntime.sleep(60)", "more than 3 seconds"),
        (FILLS_THE_DISK, "No space left"),
        (MANY_PROCESSES, "more than 16 processes"),
        (SHARES_THE_MEMORY, "more than 256 MB of memory"),
        ("print('x' * 10**8)", ""),
    ],
)  # fmt: skip
def test_the_sandbox_keeps_code_from_this_machine(tmp_path: Path, code: str, problem: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"]) as victim:
        if "{port}" in code or "{secret" in code or "{pid}" in code:
            code = code.format(port=server.getsockname()[1], secret=str(secret), pid=victim.pid)
        result = run_in_sandbox(code, "", 3, 256)
        assert victim.poll() is None
        victim.kill()
    assert not result.passed and problem in result.problem


def test_without_proved_isolation_the_metric_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    isolation_problem.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        with pytest.raises(MetricError, match=r"the metric tests .* is off .*bubblewrap is not installed"):
            Scorer("exact", metrics=["tests"])
        (finding,) = doctor._sandbox()
        assert not finding.works and not finding.needed and "bubblewrap is not installed" in finding.detail
    finally:
        isolation_problem.cache_clear()


@needs_sandbox
def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network namespace, code reaches a port of this machine, and the proof fails."""
    isolation_problem.cache_clear()
    command = sandbox._bubblewrap

    def with_network(program: Path) -> list[str]:
        return [*command(program), "--share-net"]

    monkeypatch.setattr(sandbox, "_bubblewrap", with_network)
    try:
        assert isolation_problem() == "code in the sandbox is not isolated: it reaches the network"
    finally:
        isolation_problem.cache_clear()
