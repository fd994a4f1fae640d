"""Compare: any two models on the benchmark or on prompts of your own, with blind votes and the report."""

import streamlit as st

from finetune_pipeline.console import parts, session
from finetune_pipeline.pipeline.challengers import list_challengers
from finetune_pipeline.pipeline.comparisons import (
    MAX_PROMPTS,
    BlindPair,
    Side,
    blind_pairs,
    report_of,
    request_comparison,
    vote,
)
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.model_versions import list_models
from finetune_pipeline.registry.requested_comparisons import (
    UNFINISHED,
    RequestedComparison,
    cancel_comparison,
    count_votes,
    find_requested_comparison,
    list_requested_comparisons,
    pairs_of,
    votes_of,
)
from finetune_pipeline.wording import counted, sentence

LIVE_SECONDS = 2.0
"""Time between two looks at a comparison in progress."""

BENCHMARK, PROMPTS = "the benchmark", "prompts of my own"
_LISTED = 50
_SHOWN = 20
_GROUPS = {
    "quality": "Quality",
    "performance": "Performance",
    "efficiency": "Efficiency",
}


def show() -> None:
    """Show the page."""
    loop, database = session.loop(), session.database()
    parts.heading(
        "Compare", "Two models on the same questions, side by side. A comparison judges no data and promotes nothing."
    )
    known = list_requested_comparisons(database, [loop.name])[:_LISTED]
    if session.user().may("admin"):
        with st.expander("Start a comparison", expanded=not known, icon=":material/compare:"):
            _start()
    if not known:
        parts.empty(
            "Nothing was compared yet.",
            "Choose two models above; the console asks both in the background, and shows how far it is.",
        )
        return
    names = {one.id: _title(one) for one in known}
    chosen = st.selectbox("Comparison", list(names), format_func=names.get)
    unfinished = next(one for one in known if one.id == chosen).status in UNFINISHED
    if unfinished:
        st.fragment(_progress, run_every=LIVE_SECONDS)(chosen)
    else:
        _result(find_requested_comparison(database, chosen))


def _title(one: RequestedComparison) -> str:
    what = "the benchmark" if one.prompts is None else counted(len(one.prompts), "prompt")
    return f"{one.created_at:%Y-%m-%d %H:%M}: {one.tuned} with {one.base} on {what}, {one.status}"


def _start() -> None:
    loop, database = session.loop(), session.database()
    versions = [model.version for model in list_models(database, loop.name) if model.deleted_at is None]
    challengers = [one.name.rpartition("@")[2] for one in list_challengers(database, loop.name)]
    serving = champion(database, loop.name)
    names = [*challengers, *versions, "base"]
    if len(names) == 1:
        parts.empty("There is only the base model.", "A training makes a model to compare with it.")
        return
    first = serving.version if serving and serving.version in names else "base"
    with st.form("compare", border=False):
        left, right = st.columns(2)
        base = left.selectbox("First model", names, index=names.index(first))
        tuned = right.selectbox("Second model", names, index=next(i for i, name in enumerate(names) if name != first))
        asked = st.radio("Ask", [BENCHMARK, PROMPTS], horizontal=True)
        text = st.text_area(
            "Prompts of my own", height=110, placeholder="One prompt on each line", help=f"At most {MAX_PROMPTS}."
        )
        started = st.form_submit_button("Compare", type="primary", icon=":material/play_arrow:")
    if not started:
        return
    prompts = [line.strip() for line in text.split("\n") if line.strip()] if asked == PROMPTS else None
    if prompts is not None and not 0 < len(prompts) <= MAX_PROMPTS:
        st.error(f"Found {counted(len(prompts), 'prompt')}, expected 1 to {MAX_PROMPTS}; write one on each line.")
        return
    made = session.perform(
        "compare start",
        f"{base} and {tuned}",
        lambda: request_comparison(loop, base, tuned, session.actor(), prompts),
        needs="admin",
    )
    if made is not None:
        session.notify("The comparison waits for its turn.")
        st.rerun()


def _progress(id: str) -> None:
    """Show how far a comparison is; a fragment that runs again by itself."""
    found = find_requested_comparison(session.database(), id)
    if found.status not in UNFINISHED:
        st.rerun()  # the whole page, with the result
    progress = found.progress
    if not progress:
        waits = "It waits for its turn." if found.status == "pending" else "The models are being loaded."
        st.progress(0.0, text=waits)
    else:
        share = progress["answered"] / max(progress["questions"], 1)
        st.progress(
            min(1.0, share), text=f"{progress['model']}: {progress['answered']:,} of {progress['questions']:,} answers"
        )
    if session.user().may("admin") and st.button("Cancel", icon=":material/stop:"):
        done = session.perform("compare cancel", id, lambda: cancel_comparison(session.database(), id), needs="admin")
        if done is not None:
            st.rerun()


def _result(found: RequestedComparison) -> None:
    if found.status != "completed":
        text = found.error or f"The comparison was {found.status}."
        (st.error if found.status == "failed" else st.info)(parts.plain(session.redacted(sentence(text))))
        return
    votes = count_votes(votes_of(session.database(), found.id))
    tuned, base = (name.rpartition("@")[2] for name in (found.tuned, found.base))
    figures = []
    if found.tuned_wins is not None:
        figures = [
            (f"{tuned} wins", f"{found.tuned_wins:,}", "Questions in which its score is higher."),
            (f"{base} wins", f"{found.base_wins or 0:,}", "Questions in which its score is higher."),
            ("Ties", f"{found.ties or 0:,}", "Questions with the same score."),
        ]
        if found.p_value is not None:
            help = f"One-sided, that {tuned} is not better; below 0.05 counts as significant by convention."
            figures.append(("p-value", f"{found.p_value:.3f}", help))
    people = f"Blind votes of {counted(len(votes.voters), 'voter')}."
    figures += [
        (f"Votes for {tuned}", f"{votes.tuned_wins:,}", people),
        (f"Votes for {base}", f"{votes.base_wins:,}", people),
        ("Votes for neither", f"{votes.ties:,}", people),
    ]
    parts.cards(figures)
    _report(found)
    if session.may("feedback"):
        _votes(found)


def _report(found: RequestedComparison) -> None:
    report = report_of(session.database(), found)
    if report is None:
        if found.report:
            st.caption("The report's files were deleted.")
        return
    for column, (group, title) in zip(st.columns(len(_GROUPS)), _GROUPS.items(), strict=True):
        with column:
            st.subheader(title)
            rows = [row for row in report.rows if row.group == group]
            if rows:
                parts.metric_bars(rows, found.base, found.tuned)
            else:
                st.caption("Nothing was measured.")
    st.download_button(
        "Download the report",
        report.page.read_bytes(),
        f"{found.id}.html",
        "text/html",
        icon=":material/download:",
    )


def _votes(found: RequestedComparison) -> None:
    st.subheader("Blind vote")
    pairs = blind_pairs(session.database(), found.id, _voter())
    left = [pair for pair in pairs if pair.vote is None]
    voted = [pair for pair in pairs if pair.vote is not None]
    if left:
        _ballot(found, left[0], len(voted), len(pairs))
    elif pairs:
        st.success("You have voted on every pair.", icon=":material/check_circle:")
    if voted:
        _voted(found, voted)


def _voter() -> str:
    """Return who votes: not a name that the user gives, under which one person could vote twice."""
    return session.user().name


def _ballot(found: RequestedComparison, pair: BlindPair, done: int, count: int) -> None:
    st.progress(done / count, text=f"Pair {done + 1} of {count}. Which answer is better? Keys: a, b, t for a tie.")
    st.caption("prompt")
    parts.answer(session.redacted(pair.prompt))
    for column, name, text in zip(st.columns(2), ("A", "B"), (pair.a, pair.b), strict=True):
        with column:
            st.caption(f"answer {name}")
            parts.answer(session.redacted(text))
    choices: dict[str, Side] = {"A is better": "a", "B is better": "b", "Tie": "tie"}
    with st.container(horizontal=True):
        for label, side in choices.items():
            if st.button(label, key=f"vote-{side}", shortcut=label[0]):
                _vote(found, pair.number, side)


def _vote(found: RequestedComparison, number: int, side: Side) -> None:
    counted_vote = session.perform(
        "compare vote",
        f"{found.id} {number}",
        lambda: vote(session.database(), found.id, number, side, _voter()),
        needs="feedback",
    )
    if counted_vote is not None:
        session.notify(f"Your vote counts for {counted_vote.model}." if counted_vote.model else "A tie.")
        st.rerun()


def _voted(found: RequestedComparison, voted: list[BlindPair]) -> None:
    """Show the pairs that the user voted on, with names: they can no longer influence the vote."""
    with st.expander(f"The answers that you voted on: {len(voted):,}"):
        numbers = {pair.number for pair in voted[-_SHOWN:]}
        for pair in pairs_of(session.database(), found.id):
            if pair.number not in numbers:
                continue
            st.caption(f"prompt {pair.number}")
            parts.answer(session.redacted(pair.prompt))
            answers = ((found.base, pair.base_answer), (found.tuned, pair.tuned_answer))
            for column, (name, text) in zip(st.columns(2), answers, strict=True):
                with column:
                    st.caption(parts.plain(name))
                    parts.answer(session.redacted(text))
