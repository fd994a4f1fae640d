"""`finetune review`: a person decides what trains, one example at a time, by single keys."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click

from finetune_pipeline.cli.options import actor, loop_option
from finetune_pipeline.settings import LoopSettings

if TYPE_CHECKING:
    from finetune_pipeline.curation.acceptance import Policy
    from finetune_pipeline.database import Database
    from finetune_pipeline.feedback.review import ReviewCandidate
    from finetune_pipeline.feedback.rewards import RewardFunction
    from finetune_pipeline.pipeline.review_queue import QueuedReview
    from finetune_pipeline.records import ReviewKind

Problem = Callable[[str], str | None]
"""Why curation would refuse an answer; None if it would not."""

KEYS = {"a": "approve", "r": "reject", "e": "edit", "s": "skip", "u": "undo", "q": "quit"}
_STYLES: tuple[dict[str, Any], ...] = (
    {"separators": (",", ":")}, {},
    {"separators": (",", ":"), "ensure_ascii": False}, {"ensure_ascii": False}, {"indent": 2, "ensure_ascii": False},
)  # fmt: skip
"""How models write JSON: an edited answer keeps the form of the one that was shown."""


@click.command()
@click.option("--limit", type=click.IntRange(1), help="At most so many examples; default all that wait.")
@click.option("--reviewer", metavar="NAME", help="Who decides; default who is logged in.")
@loop_option
def review(loop: LoopSettings, limit: int | None, reviewer: str | None) -> None:
    """Approve, reject or edit what deserves a person's eye, the most valuable first.

    Each decision is kept at once, with your name, and holds in every later dataset; stop whenever you like.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.feedback.rewards import reward_function
    from finetune_pipeline.pipeline import loop_files
    from finetune_pipeline.pipeline.review_queue import review_queue

    database = connect()
    items = review_queue(loop, database)[:limit]
    if not items:
        click.echo(f"nothing of loop {loop.name} waits for review")
        return
    session = _Session(
        loop, database, reviewer or actor(), reward_function(loop.feedback), loop_files.policy(loop), items
    )
    session.run()
    click.echo(session.summary())


@dataclass
class _Session:
    """One sitting at the queue.

    Attributes:
        at: the place of the present example.
        steps: what was done so far: the place, and the key's name.
    """

    loop: LoopSettings
    database: "Database"
    reviewer: str
    reward: "RewardFunction"
    policy: "Policy"
    items: "list[QueuedReview]"
    at: int = 0
    steps: list[tuple[int, str]] = field(default_factory=list)

    def run(self) -> None:
        """Ask until the end of the queue, or until the reviewer has enough."""
        while self.at < len(self.items):
            if not self._is_open():
                self.at += 1
                continue
            click.echo(_page(self.items[self.at], self.at + 1, len(self.items)))
            place = self.at, len(self.steps)
            while place == (self.at, len(self.steps)):  # a key that did nothing is asked again, under the same page
                done = KEYS.get(_key())
                if done == "quit":
                    return
                if not self._do(done):
                    break

    def summary(self) -> str:
        """What was decided, for the end."""
        counts = Counter(name for _, name in self.steps)
        decided = ", ".join(f"{counts[name]} {name}" for name in ("approve", "edit", "reject", "skip") if counts[name])
        return f"{decided or 'nothing decided'}; {len(self.items) - self.at} of this queue left"

    def _do(self, done: str | None) -> bool:
        """Do what a key says; False where the page has to be shown again."""
        from finetune_pipeline.feedback.review import ReviewError

        try:
            match done:
                case "approve":
                    self._approve()
                case "reject":
                    self._decide("reject", self._shown.answer)
                case "edit":
                    return self._edit()
                case "skip":
                    self._step("skip")
                case "undo":
                    self._undo()
                case _:
                    click.echo("  ".join(f"{key} {name}" for key, name in KEYS.items()))
        except ReviewError as error:
            _warn(str(error))
            return False
        return True

    @property
    def _shown(self) -> "ReviewCandidate":
        return self.items[self.at].candidate

    def _is_open(self) -> bool:
        """Look at the present example anew: another reviewer may have decided, or the interaction be deleted."""
        from finetune_pipeline.feedback.review import load_candidates, standing_decision

        id = self._shown.interaction.id
        with self.database.read() as connection:
            now = next(load_candidates(connection, self.loop.name, [str(id)], self.reward), None)
            decision = standing_decision(connection, self.loop.name, id)
        if now is None:
            _warn(f"interaction {id} was deleted meanwhile")
            return False
        if decision is not None and decision != self._shown.decided:
            _warn(f"{decision.reviewer} decided {decision.kind} on interaction {id} meanwhile")
            return False
        self.items[self.at] = replace(self.items[self.at], candidate=replace(now, decided=self._shown.decided))
        return True

    def _wrong(self, answer: str) -> str | None:
        """Why curation would refuse an answer to the present example."""
        from finetune_pipeline.pipeline.review_queue import rejection_reason

        return rejection_reason(self._shown.interaction, answer, self.policy)

    def _approve(self) -> None:
        answer = self._shown.answer
        wrong = self._wrong(answer)
        if wrong is not None:
            _warn(f"it cannot train as it is ({wrong}); edit or reject it")
        else:
            self._decide("approve", answer)

    def _edit(self) -> bool:
        answer = self._shown.answer
        target = _edited(answer, self._wrong, self.loop)
        if target is None:
            return False
        self._decide("approve" if target == answer else "edit", target)
        return True

    def _decide(self, kind: "ReviewKind", target: str) -> None:
        from finetune_pipeline.feedback.review import record_decision

        with self.database.write() as connection:
            record_decision(connection, self.loop.name, self._shown, kind, target, self.reviewer, self.reward)
        self._step(kind)

    def _step(self, name: str) -> None:
        self.steps.append((self.at, name))
        self.at += 1

    def _undo(self) -> None:
        from finetune_pipeline.feedback.review import undo_decision
        from finetune_pipeline.pipeline.review_queue import requeue

        if self.steps:
            self.at, name = self.steps.pop()
            if name != "skip":
                with self.database.write() as connection:
                    undo_decision(connection, self.loop.name, self.reviewer, self.reward, self._shown.interaction.id)
            return
        with self.database.write() as connection:  # what was decided in an earlier sitting
            id = undo_decision(connection, self.loop.name, self.reviewer, self.reward)
            found = requeue(self.loop, connection, id, self.reward) if id else None
        if found is None:
            _warn("there is nothing to take back")
        else:
            rest = [
                one for one in self.items[self.at :] if one.candidate.interaction.id != found.candidate.interaction.id
            ]
            self.items[self.at :] = [found, *rest]
            click.echo(_page(found, self.at + 1, len(self.items)))


def _key() -> str:
    """The next key; at the end of the input, or with Ctrl-C, the one that ends the sitting."""
    try:
        if sys.stdin.isatty():
            return click.getchar().lower()
        while (character := sys.stdin.read(1)).isspace():
            pass
        return character.lower() or "q"
    except (EOFError, KeyboardInterrupt):
        return "q"


def _edited(answer: str, problem: Problem, loop: LoopSettings) -> str | None:
    """The answer as the reviewer wrote it in the editor, valid; None if it is left as it was."""
    style = _style(answer) if loop.output_schema else None
    text = answer if style is None else json.dumps(json.loads(answer), indent=2, ensure_ascii=False)
    while True:
        try:
            saved = click.edit(text, extension=".json" if loop.output_schema else ".md")
        except (click.ClickException, UnicodeDecodeError) as error:
            _warn(error.message if isinstance(error, click.ClickException) else f"it is not UTF-8: {error}")
            return None
        if saved is None:
            _warn("nothing was saved")
            return None
        target = _in_style(saved, style)
        wrong = problem(target)
        if wrong is None:
            return target
        _warn(f"it cannot train so: {wrong}")
        click.echo("e edit it again, any other key leaves it as it was")
        if _key() != "e":
            return None
        text = saved


def _style(answer: str) -> dict[str, Any] | None:
    """How a JSON answer is written; None where it cannot be written in the same way again."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return next((style for style in _STYLES if json.dumps(value, **style) == answer), None)


def _in_style(saved: str, style: dict[str, Any] | None) -> str:
    from finetune_pipeline.schemas import InvalidJsonError, parse_json

    if style is not None:
        try:
            return json.dumps(parse_json(saved), **style)
        except InvalidJsonError:
            pass  # what is wrong with it is told of the text as the reviewer wrote it
    return saved.removesuffix("\n")


def _page(one: "QueuedReview", number: int, total: int) -> str:
    """One example as the reviewer sees it."""
    candidate, interaction = one.candidate, one.candidate.interaction
    lines = ["", click.style(f"{number} of {total}   value {one.value:.2f}", bold=True)]
    lines += [f"  why         {reason}" for reason in one.reasons]
    lines += [f"  {name:<11} {_safe(text)}" for name, text in _facts(candidate)]
    lines += [f"  {turn.role:<11} {_indented(turn.content)}" for turn in interaction.history]
    lines.append(f"  {'asked':<11} {_indented(interaction.prompt)}")
    if candidate.answer != interaction.output:
        lines.append(f"  {'model said':<11} {_indented(interaction.output)}")
    lines.append(click.style(f"  {'answer':<11} ", bold=True) + _indented(candidate.answer))
    return "\n".join([*lines, "  ".join(f"{key} {name}" for key, name in KEYS.items())])


def _facts(candidate: "ReviewCandidate") -> list[tuple[str, str]]:
    interaction, example = candidate.interaction, candidate.example
    provenance = (
        "the application's log" if interaction.source is None else f"{interaction.source}, {interaction.provenance}"
    )
    facts = [("from", f"{provenance}, {interaction.created_at:%Y-%m-%d}, {interaction.id}")]
    if example is not None:
        facts.append(("reward", f"{example.reward:+.2f}"))
    if interaction.confidence is not None:
        facts.append(("confidence", f"{interaction.confidence:.2f}"))
    for item, worth in zip(candidate.feedback, candidate.rewards, strict=True):
        words = f": {item.correction}" if item.correction else ""
        facts.append(("feedback", f"{item.kind} {worth:+.2f}{words}"))
    return facts


def _indented(text: str) -> str:
    return _safe(text).replace("\n", "\n" + 14 * " ")


def _safe(text: str) -> str:
    """A text without what would steer the terminal: it is data, whoever wrote it."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)


def _warn(text: str) -> None:
    click.secho(_safe(text), fg="yellow")
