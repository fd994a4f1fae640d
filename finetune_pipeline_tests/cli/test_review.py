"""`finetune review` as people use it: by click's runner, and at a real terminal."""

import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import termios

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.database import tables as t
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import find_interaction, record
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.review_queue import rejection_reason
from finetune_pipeline.settings import PROJECT_ROOT, load_loop
from finetune_pipeline_tests.conftest import feedback, interaction, uid
from finetune_pipeline_tests.waiting import wait_until

LOOP = "aec_parser"
ANSWER = '{"element":"wall","material":"brick","thickness_mm":250}'


@pytest.fixture(autouse=True)
def five(own_home):
    """Five answers that the model was not sure of, the least sure first."""
    events = [
        interaction(f"{n}", prompt=f"please add wall number {n} by the river", output=ANSWER, confidence=n / 10)
        for n in range(1, 6)
    ]
    assert loop_files.policy(load_loop(LOOP)).problem(ANSWER) is None
    put(*events)


def put(*events):
    with connect().write() as connection:
        record(connection, LOOP, [one.model_copy(update={"loop": LOOP}) for one in events], default_reward)


def review(keys, *options, code=0, **environment):
    result = CliRunner().invoke(
        finetune, ["review", "--loop", LOOP, "--reviewer", "rita", *options], input=keys, env=environment
    )
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def decided():
    """(interaction, decision, reviewer, target), oldest first."""
    d = t.review_decisions.c
    names = {str(uid(str(n))): str(n) for n in range(1, 6)}
    with connect().read() as connection:
        rows = connection.execute(sa.select(t.review_decisions).order_by(d.ingest_offset)).all()
    return [(names[row.interaction_id], row.decision, row.reviewer, row.target) for row in rows]


def example(name):
    with connect().read() as connection:
        return find_interaction(connection, uid(name)).example


def editor(folder, *contents):
    """A program that writes these contents, one at each call; the last one again and again."""
    for number, text in enumerate(contents):
        (folder / f"content-{number}").write_text(text)
    path = folder / "editor"
    path.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "calls = len(list(folder.glob('seen-*')))\n"
        "shutil.copy(sys.argv[1], folder / f'seen-{calls}')\n"
        f"shutil.copyfile(folder / f'content-{{min(calls, {len(contents) - 1})}}', sys.argv[1])\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_each_key_does_what_it_says_and_nothing_is_shown_twice():
    said = review("ars")
    assert "1 of 5   priority 0.9" in said and "3 of 5" in said and "4 of 5" in said
    assert "why         confidence 0.10, below 0.85" in said
    assert "prompt      please add wall number 1 by the river" in said and ANSWER in said
    assert said.endswith("1 approved, 1 rejected, 1 skipped; 2 of this queue left\n")
    assert decided() == [("1", "approve", "rita", ANSWER), ("2", "reject", "rita", ANSWER)]
    again = review("q")
    assert "1 of 3" in again and "wall number 3" in again  # what was skipped waits for the next session
    assert "nothing decided; 3 of this queue left" in again
    assert "1 of 2" in review("q", "--limit", "2")


def test_history_and_feedback_are_shown_and_cannot_control_the_terminal():
    history = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello\nthere"}]
    put(interaction("5b", prompt="\x1b[2Jpaint it", output="{}", confidence=0.01, history=history, source="vault",
                    provenance="a.md"), feedback("s", "5b", "success", score=90))  # fmt: skip
    said = review("q")
    assert "\x1b" not in said and "\\u001b[2Jpaint it" in said
    assert "system      Be short." in said and "user        hello\n              there" in said
    assert "from        vault, a.md, 2026-01-01" in said and "feedback    success +0.90" in said


def test_an_answer_that_breaks_the_schema_cannot_be_approved():
    put(interaction("bad", prompt="a wall of air", output='{"element": "air"}', confidence=0.01))
    said = review("arq")
    assert "it cannot train as it is ($" in said
    with connect().read() as connection:
        (row,) = connection.execute(sa.select(t.review_decisions)).all()
    assert (row.decision, row.target) == ("reject", '{"element": "air"}')


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"max_answer_chars": 30}, "answer longer than 30 characters"),
        ({"max_answer_tokens": 5}, "answer longer than 5 tokens"),
        ({"max_prompt_tokens": 3}, "prompt longer than 3 tokens"),
    ],
)
def test_an_answer_that_cannot_train_is_reported_at_once(own_home, limits, why):
    loop = load_loop(LOOP)
    curation = loop.curation.model_copy(update=limits)
    policy = loop_files.policy(loop.model_copy(update={"curation": curation}))
    asked = interaction("1", prompt="please add wall number 1 by the river", output=ANSWER)
    assert rejection_reason(asked, ANSWER, loop_files.policy(loop)) is None
    assert rejection_reason(asked, ANSWER, policy) == why
    question = next(iter(loop_files.benchmark(loop).questions)).prompt
    leak = asked.model_copy(update={"prompt": question})
    assert rejection_reason(leak, ANSWER, loop_files.policy(loop)) == "near-duplicate of a benchmark question"


def test_an_edit_must_fit_the_schema_and_can_be_fixed(tmp_path):
    fixed = {"element": "wall", "material": "brick", "thickness_mm": 300}
    program = editor(tmp_path, "{ not json", '{"element": "air"}', json.dumps(fixed, indent=4))
    said = review("eeeq", VISUAL="", EDITOR=program)
    assert "it cannot train like this: not JSON" in said and "it cannot train like this: $" in said
    assert decided() == [("1", "edit", "rita", json.dumps(fixed, separators=(",", ":")))]  # as the model writes it
    assert json.loads((tmp_path / "seen-0").read_text()) == json.loads(ANSWER)
    assert (tmp_path / "seen-1").read_text().strip() == "{ not json"  # what was typed is not lost
    assert (example("1").corrected, example("1").review) == (True, "edit")


def test_an_abandoned_or_failed_edit_decides_nothing(tmp_path):
    program = editor(tmp_path, "{ not json")
    assert review("exq", VISUAL="", EDITOR=program).count("1 of 5") == 2
    assert "Editing failed" in review("eq", VISUAL="", EDITOR="false")
    assert "nothing was saved" in review("eq", VISUAL="", EDITOR="true")
    assert decided() == []
    same = editor(tmp_path, ANSWER)
    review("eq", VISUAL="", EDITOR=same)
    assert [row[1] for row in decided()] == ["approve"]  # nothing was changed


def test_undo_goes_back_step_by_step_and_into_earlier_sessions():
    said = review("asu" + "u" + "r" + "q")
    assert [row[:2] for row in decided()] == [("1", "approve"), ("1", "undo"), ("1", "reject")]
    assert said.count("1 of 5") == 2 and said.count("2 of 5") == 3
    assert "1 rejected; 4 of this queue left" in said
    again = review("uaq")
    assert [row[:2] for row in decided()][3:] == [("1", "undo"), ("1", "approve")]
    assert "1 of 5" in again and "was undone" not in again
    assert "1 approved, 1 undone; 4 of this queue left" in again
    assert example("1").review == "approve"
    assert "1 undone; 5 of this queue left" in review("u" + "u" + "q")
    assert example("1") is None
    assert "there is no decision of yours to undo" in review("uq")


def test_an_example_that_another_reviewer_decided_is_passed_over(monkeypatch):
    from finetune_pipeline.cli import review as module
    from finetune_pipeline.feedback.review import load_candidates, record_decision

    keys = iter("aq")

    def key():
        if not decided():
            with connect().write() as connection:
                other = next(load_candidates(connection, LOOP, [str(uid("2"))], default_reward))
                record_decision(connection, LOOP, other, "reject", other.answer, "sam", default_reward)
        return next(keys)

    monkeypatch.setattr(module, "_key", key)
    said = review("")
    assert f"sam decided reject on interaction {uid('2')} in the meantime" in said and "3 of 5" in said
    assert [row[:3] for row in decided()] == [("2", "reject", "sam"), ("1", "approve", "rita")]


def test_an_empty_queue_says_so_and_status_counts():
    assert "review    5 examples to review, which is optional; `finetune review` shows" in CliRunner().invoke(
        finetune, ["status", "--loop", LOOP]
    ).output.replace("\n", " ")
    review("aaaaa")
    assert review("") == f"no example of loop {LOOP} needs a review\n"


def test_the_queue_is_listed_as_json_without_a_question():
    listed = json.loads(review("a", "--json"))
    assert [one["interaction"]["confidence"] for one in listed] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert listed[0]["answer"] == ANSWER and listed[0]["reasons"] and listed[0]["feedback"] == []
    assert len(json.loads(review("", "--json", "--limit", "2"))) == 2 and decided() == []


def test_keys_come_through_a_pipe_too():
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "review", "--loop", LOOP, "--reviewer", "rita"]
    done = subprocess.run(command, input="a\nr\n", capture_output=True, text=True, cwd=PROJECT_ROOT, timeout=60)
    assert done.returncode == 0 and "1 approved, 1 rejected; 3 of this queue left" in done.stdout
    assert len(decided()) == 2


class Terminal:
    """The command at a separate terminal."""

    def __init__(self, **environment):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "finetune_pipeline.cli.main", "review", "--loop", LOOP, "--reviewer", "rita"]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=PROJECT_ROOT, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        os.close(slave)
        self.said = ""

    def until(self, text):
        def shown():
            if select.select([self.master], [], [], 0)[0]:
                self.said += os.read(self.master, 65_536).decode()
            return text in self.said

        wait_until(shown, what=lambda: f"{text!r} was shown after {self.said!r}")
        self.said = self.said.partition(text)[2]

    def press(self, key):
        # A key is taken when it is asked for; one that was typed before the page was shown decides nothing.
        wait_until(lambda: not termios.tcgetattr(self.master)[3] & termios.ICANON)
        os.write(self.master, key.encode())

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        os.close(self.master)


@pytest.fixture
def terminal():
    opened = []

    def start(**environment):
        opened.append(Terminal(**environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_terminal_needs_single_keys_and_a_kill_loses_nothing(terminal, tmp_path):
    fixed = ANSWER.replace("250", "300")
    one = terminal(VISUAL="", EDITOR=editor(tmp_path, "{ not json", fixed))
    one.until("1 of 5")
    one.until("q quit")
    one.press("a")  # no Enter
    one.until("2 of 5")
    one.until("q quit")
    one.press("\x1b[A")  # an arrow has no meaning
    one.until("a approve")
    one.press("e")
    one.until("it cannot train like this: not JSON")
    one.until("leaves it as it was")
    one.press("e")
    one.until("3 of 5")
    one.until("q quit")
    one.process.kill()
    one.process.wait(60)
    assert [row[:2] for row in decided()] == [("1", "approve"), ("2", "edit")] and decided()[1][3] == fixed
    two = terminal()
    two.until("1 of 3")
    two.until("wall number 3")
    two.until("q quit")
    two.press("u")
    two.until("wall number 2")
    two.until("q quit")
    two.press("r")
    two.until("wall number 3")
    two.until("q quit")
    two.press("\x03")  # Ctrl-C ends the session and keeps the decisions
    two.until("1 rejected, 1 undone; 3 of this queue left")
    assert two.process.wait(60) == 0
    assert [row[1] for row in decided()] == ["approve", "edit", "undo", "reject"]
