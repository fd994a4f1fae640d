"""Erasing a person from Python, as the command does it."""

import json
from datetime import UTC, datetime

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.feedback import FeedbackClient
from finetune_pipeline.pipeline.erasure import erase_person, find_person
from finetune_pipeline.pipeline.uploaded_files import new_file
from finetune_pipeline.registry.requested_comparisons import (
    ComparedPair,
    ComparisonLeaseLostError,
    ComparisonVote,
    RequestedComparison,
    claim_comparison,
    create_comparison,
    find_requested_comparison,
    new_comparison_id,
    pairs_of,
    record_vote,
    votes_of,
)
from finetune_pipeline.settings import SettingsError, load_loop
from finetune_pipeline_tests.conftest import interaction

LOOP = "aec_parser"


def test_an_erasure_reports_counts_and_the_files_that_still_name_the_person(own_home):
    client = FeedbackClient(LOOP)
    client.thumbs_up(client.log("a wall", "{}", user="ann"), user="bob")
    inbox = load_loop(LOOP).drop_folder
    inbox.mkdir(parents=True)
    (inbox / "log.jsonl").write_text(interaction("a", user="ann").model_dump_json() + "\n")
    earlier = own_home / "journal"  # dead letters of an earlier version
    earlier.mkdir()
    (earlier / "x.refused").write_text('{"user": "ann"}\n')
    held = find_person(connect(), "ann")
    assert sum(one.data.count for one in held) == 2
    result = erase_person(connect(), "ann", held)
    (loop,) = [one for one in result.loops if one.name == LOOP]
    assert (loop.erased.interactions, loop.erased.feedback, result.complete) == (1, 1, True)
    assert loop.files == (inbox / "log.jsonl", earlier / "x.refused")
    assert not any(one.data.count for one in find_person(connect(), "ann"))
    assert client.stats() == {}


def test_only_the_given_loop_is_searched(own_home):
    FeedbackClient(LOOP).log("a wall", "{}", user="ann")
    assert [one.name for one in find_person(connect(), "ann", LOOP)] == [LOOP]
    with pytest.raises(SettingsError, match="nowhere"):
        find_person(connect(), "ann", "nowhere")


SAID, OTHER = "a wall of 3 m beside ann's garden", "a slab that nobody logged"


def compared(*prompts):
    """Record a comparison of given prompts, and return its id."""
    id = new_comparison_id()
    models = {"base": f"{LOOP}@base", "base_id": None, "tuned": f"{LOOP}@v1.0.0", "tuned_id": "1"}
    made = {"id": id, "loop": LOOP, "prompts": list(prompts), "created_by": "ben", "created_at": datetime.now(UTC)}
    create_comparison(connect(), RequestedComparison(**made, **models))
    return id


def pair(id, number, prompt, *answers):
    base, tuned = answers
    return ComparedPair(
        comparison_id=id, number=number, prompt=prompt, base_answer=base, tuned_answer=tuned, swapped=False
    )


def voted(id, voter):
    vote = {"comparison_id": id, "number": 1, "voter": voter, "choice": "tuned", "created_at": datetime.now(UTC)}
    record_vote(connect(), ComparisonVote(**vote))


def test_comparisons_lose_the_persons_texts_and_votes_and_keep_those_of_others(own_home):
    FeedbackClient(LOOP).log(SAID, "{}", user="ann")
    done, running, waiting, other = compared(f"{SAID}!", OTHER), compared(SAID), compared(SAID, OTHER), compared(OTHER)
    made = [pair(done, 1, f"{SAID}!", "yes", "no"), pair(done, 2, OTHER, "yes", "no"),
            pair(done, 3, "and now?", "yes", f"You said: {SAID}")]  # fmt: skip
    claim_comparison(connect(), done).finish(made)
    voted(done, "ben"), voted(done, "ann")
    lease = claim_comparison(connect(), running)
    result = erase_person(connect(), "ann", find_person(connect(), "ann"))
    (loop,) = [one for one in result.loops if one.name == LOOP]
    assert vars(loop.comparisons) == {"prompts": 3, "pairs": 2, "votes": 1}

    assert find_requested_comparison(connect(), done).prompts == ["[erased]", OTHER]
    first, second, third = pairs_of(connect(), done)
    assert (first.prompt, first.base_answer, first.tuned_answer) == ("[erased]", "[erased]", "[erased]")
    assert second == made[1] and third.prompt == third.tuned_answer == "[erased]"
    assert [vote.voter for vote in votes_of(connect(), done)] == ["ben"]
    for id in (running, waiting):  # they would ask the prompt, and keep it again
        found = find_requested_comparison(connect(), id)
        assert (found.status, found.error) == ("canceled", "a prompt was erased with a person's data")
    with pytest.raises(ComparisonLeaseLostError):
        lease.finish([pair(running, 1, SAID, "yes", "no")])
    assert pairs_of(connect(), running) == []
    assert find_requested_comparison(connect(), other).status == "pending"
    stored = b"".join(path.read_bytes() for path in own_home.glob("*.db*"))
    assert OTHER.encode() in stored and b"beside ann" not in stored


def test_uploaded_files_with_the_persons_texts_are_named(own_home):
    FeedbackClient(LOOP).log(f"{SAID}\nand its roof", "{}", user="ann")
    files = []
    for text in (f"{SAID}\nand its roof", OTHER):
        with new_file() as file:
            file.write((json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n").encode())
            files.append(file.publish("rows.jsonl", "tests"))
    result = erase_person(connect(), "ann", find_person(connect(), "ann"))
    (loop,) = [one for one in result.loops if one.name == LOOP]
    assert dict(loop.texts) == {files[0].path: 1}
