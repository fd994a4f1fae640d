"""`finetune review`: decide what trains, one example at a time, by single keys."""

import sys
from typing import TYPE_CHECKING, Any

import click

from finetune_pipeline.cli.options import json_option, loop_option, print_json
from finetune_pipeline.hosts import os_user
from finetune_pipeline.settings import LoopSettings

if TYPE_CHECKING:
    from finetune_pipeline.feedback.review import ReviewCandidate
    from finetune_pipeline.pipeline.review_queue import QueuedReview, ReviewSession

KEYS = {"a": "approve", "r": "reject", "e": "edit", "s": "skip", "u": "undo", "q": "quit"}
_DONE = {"approve": "approved", "edit": "edited", "reject": "rejected", "skip": "skipped", "undo": "undone"}


@click.command()
@click.option("--limit", type=click.IntRange(1), help="Maximum number of examples; default all that need a review.")
@click.option("--reviewer", metavar="NAME", help="Name stored with the decisions; default your login name.")
@json_option
@loop_option
def review(loop: LoopSettings, limit: int | None, reviewer: str | None, as_json: bool) -> None:
    """Approve, reject or edit examples, the highest priority first.

    Each decision is stored at once under your name and holds for every later dataset. Stop whenever you like. With
    --json, the examples are listed and nothing is asked.
    """
    from finetune_pipeline.database import connect
    from finetune_pipeline.pipeline.review_queue import ReviewSession

    session = ReviewSession(loop, connect(), reviewer or os_user(), limit)
    if as_json:
        print_json([_queued_json(queued) for queued in session.queue])
        return
    if not session.queue:
        click.echo(f"no example of loop {loop.name} needs a review")
        return
    _run(session, loop)
    counts = session.counts()
    decided = ", ".join(f"{counts[name]} {done}" for name, done in _DONE.items() if counts[name])
    click.echo(f"{decided or 'nothing decided'}; {len(session.queue) - session.position} of this queue left")


def _run(session: "ReviewSession", loop: LoopSettings) -> None:
    """Ask until the end of the queue, or until the reviewer quits."""
    from finetune_pipeline.feedback.review import ReviewError

    while session.position < len(session.queue):
        if obsolete := session.refresh():
            _warn(obsolete)
            session.position += 1
            continue
        click.echo(_page(session.queue[session.position], session.position + 1, len(session.queue)))
        show_page = False
        while not show_page:  # a key without effect is asked again without repeating the page
            show_page = True
            answer = session.current.answer
            try:
                match KEYS.get(_key()):
                    case "approve":
                        if problem := session.rejection_reason(answer):
                            _warn(f"it cannot train as it is ({problem}); edit or reject it")
                            show_page = False
                        else:
                            session.decide("approve", answer)
                    case "reject":
                        session.decide("reject", answer)
                    case "edit":
                        target = _edited(answer, session, loop)
                        if target is not None:
                            session.decide("approve" if target == answer else "edit", target)
                    case "skip":
                        session.skip()
                    case "undo":
                        if not session.undo():
                            _warn("there is no decision of yours to undo")
                            show_page = False
                    case "quit":
                        return
                    case _:
                        click.echo(_key_help())
                        show_page = False
            except ReviewError as error:
                _warn(str(error))


def _key() -> str:
    """Return the next key; "q" at the end of the input and for Ctrl-C."""
    try:
        if sys.stdin.isatty():
            return click.getchar().lower()
        while (character := sys.stdin.read(1)).isspace():
            pass
        return character.lower() or "q"
    except (EOFError, KeyboardInterrupt):
        return "q"


def _edited(answer: str, session: "ReviewSession", loop: LoopSettings) -> str | None:
    """Return the answer as the reviewer wrote it in the editor, if it is valid; None if the reviewer gives up."""
    from finetune_pipeline.pipeline.review_queue import editable, in_style_of

    text = editable(answer) if loop.output_schema else answer
    while True:
        try:
            saved = click.edit(text, extension=".json" if loop.output_schema else ".md")
        except (click.ClickException, UnicodeDecodeError) as error:
            _warn(error.message if isinstance(error, click.ClickException) else f"it is not UTF-8: {error}")
            return None
        if saved is None:
            _warn("nothing was saved")
            return None
        target = saved.removesuffix("\n")
        if loop.output_schema:
            target = in_style_of(answer, target)
        problem = session.rejection_reason(target)
        if problem is None:
            return target
        _warn(f"it cannot train like this: {problem}")
        click.echo("e edits it again, any other key leaves it as it was")
        if _key() != "e":
            return None
        text = saved


def _queued_json(queued: "QueuedReview") -> dict[str, Any]:
    candidate = queued.candidate
    return {
        "priority": queued.priority,
        "reasons": queued.reasons,
        "interaction": candidate.interaction,
        "answer": candidate.answer,
        "reward": candidate.example.reward if candidate.example else None,
        "feedback": candidate.feedback,
    }


def _page(queued: "QueuedReview", number: int, total: int) -> str:
    """Return one example as the reviewer sees it."""
    candidate, interaction = queued.candidate, queued.candidate.interaction
    lines = ["", click.style(f"{number} of {total}   priority {queued.priority:.2f}", bold=True)]
    lines += [f"  why         {reason}" for reason in queued.reasons]
    lines += [f"  {name:<11} {_safe(text)}" for name, text in _facts(candidate)]
    lines += [f"  {turn.role:<11} {_indented(turn.content)}" for turn in interaction.history]
    lines.append(f"  {'prompt':<11} {_indented(interaction.prompt)}")
    if candidate.answer != interaction.output:
        lines.append(f"  {'output':<11} {_indented(interaction.output)}")
    lines.append(click.style(f"  {'answer':<11} ", bold=True) + _indented(candidate.answer))
    return "\n".join([*lines, _key_help()])


def _facts(candidate: "ReviewCandidate") -> list[tuple[str, str]]:
    interaction, example = candidate.interaction, candidate.example
    origin = "application log" if interaction.source is None else f"{interaction.source}, {interaction.provenance}"
    facts = [("from", f"{origin}, {interaction.created_at:%Y-%m-%d}, {interaction.id}")]
    if example is not None:
        facts.append(("reward", f"{example.reward:+.2f}"))
    if interaction.confidence is not None:
        facts.append(("confidence", f"{interaction.confidence:.2f}"))
    for feedback, reward in zip(candidate.feedback, candidate.rewards, strict=True):
        correction = f": {feedback.correction}" if feedback.correction else ""
        facts.append(("feedback", f"{feedback.kind} {reward:+.2f}{correction}"))
    return facts


def _key_help() -> str:
    return "  ".join(f"{key} {name}" for key, name in KEYS.items())


def _indented(text: str) -> str:
    return _safe(text).replace("\n", "\n" + 14 * " ")


def _safe(text: str) -> str:
    """Escape control characters: a logged text must not control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)


def _warn(text: str) -> None:
    click.secho(_safe(text), fg="yellow")
