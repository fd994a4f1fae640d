"""Decisions through snapshot, dataset and sensor; what waits for review."""

import json
import shutil
from pathlib import Path

import pytest

from finetune_pipeline.artifacts import stage_folder
from finetune_pipeline.curation.dataset_files import read_all
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.review import load_candidates, record_decision, undo_decision
from finetune_pipeline.feedback.rewards import default_reward, reward_function
from finetune_pipeline.feedback.store import record
from finetune_pipeline.manifests import DatasetManifest, RawLogsManifest
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.pending import count_new
from finetune_pipeline.pipeline.review_queue import ReviewSession, review_queue
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.registry.comparisons import ComparisonRecord
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline_tests.conftest import START, dataset_rows, feedback, interaction, uid
from finetune_pipeline_tests.registry.conftest import record_comparison

CURATION = {"min_examples": 1, "validation_fraction": 0.0}
NAMES = ["amy", "ben", "cid", "dan"]


@pytest.fixture
def loop(make_loop):
    return make_loop(curation=CURATION)


@pytest.fixture
def logged(loop):
    """Four answers that users liked, and one that nobody said anything of."""
    events = [interaction(name, prompt=f"what did {name} say of it all?", output=f"{name} spoke") for name in NAMES]
    events += [feedback(f"on {name}", name, "thumbs_up") for name in NAMES]
    put(loop, *events, interaction("eve", prompt="what did eve say of it all?", output="eve spoke", confidence=0.3))


def put(loop, *events):
    with connect().write() as connection:
        record(connection, loop.name, events, default_reward)


def say(loop, name, kind, target=None):
    with connect().write() as connection:
        shown = next(load_candidates(connection, loop.name, [str(uid(name))], default_reward))
        record_decision(connection, loop.name, shown, kind, target or shown.answer, "rita", default_reward)


def curated(loop):
    return build_dataset(loop, snapshot(loop, connect())[0])


def answers(artifact):
    return sorted(row["completion"] for row in dataset_rows(artifact.path, "train"))


def test_decisions_decide_what_trains_and_survive_a_rebuild(loop, logged):
    first = curated(loop)
    assert answers(first) == ["amy spoke", "ben spoke", "cid spoke", "dan spoke"]
    say(loop, "amy", "reject")
    say(loop, "ben", "edit", "ben said it better")
    say(loop, "eve", "approve")
    second = curated(loop)
    expected = ["ben said it better", "cid spoke", "dan spoke", "eve spoke"]
    assert second.manifest.version != first.manifest.version and answers(second) == expected
    assert second.manifest.left_out == {"rejected by a reviewer": 1}
    assert not any("amy spoke" in json.dumps(row, default=str) for row in read_all(second.path))
    put(loop, feedback("praise", "amy", "thumbs_up", minutes=9), feedback("blame", "eve", "thumbs_down", minutes=9))
    for stage in (RawLogsManifest, DatasetManifest):
        shutil.rmtree(stage_folder(loop.name, stage.stage))
    assert answers(curated(loop)) == expected
    with connect().write() as connection:
        undo_decision(connection, loop.name, "rita", default_reward)
    assert answers(curated(loop)) == ["ben said it better", "cid spoke", "dan spoke"]


def test_an_edit_makes_a_preference_pair_with_the_models_answer(loop, logged):
    say(loop, "ben", "edit", "ben said it better")
    pairs = [row for row in read_all(curated(loop).path) if "chosen" in row]
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("ben said it better", "ben spoke")]


def test_a_decision_survives_the_file_that_the_text_was_in(make_loop):
    feed = {"kind": "files", "name": "notes", "path": "somewhere"}
    loop = make_loop(sources=[feed], curation=CURATION)

    def take(provenance):
        record = SourceRecord(provenance, "what did amy say?", "amy spoke")
        sync_source(loop, loop.sources[0], connect(), lambda source, cursor: iter([record]))

    take("a.md")
    (only,) = review_queue(make_loop(sources=[feed], curation=CURATION, review={"required": True}), connect())
    with connect().write() as connection:
        record_decision(connection, loop.name, only.candidate, "edit", "amy said more", "rita", default_reward)
    take("moved/b.md")
    assert answers(curated(loop)) == ["amy said more"]


def test_if_review_is_required_only_approved_examples_train_and_count(make_loop, logged):
    loop = make_loop(curation=CURATION, review={"required": True})
    put(loop, interaction("bad"), feedback("down", "bad", "thumbs_down"))
    assert count_new(loop, connect(), 0) == 0 == curated(loop).manifest.train
    assert not list(read_all(curated(loop).path))
    assert len(review_queue(loop, connect())) == 6
    say(loop, "amy", "approve")
    say(loop, "ben", "edit", "ben said it better")
    say(loop, "cid", "reject")
    made = curated(loop)
    assert answers(made) == ["amy spoke", "ben said it better"]
    assert count_new(loop, connect(), 0) == 2 == made.manifest.train
    assert made.manifest.left_out["not approved by a reviewer"] == 2
    assert len(review_queue(loop, connect())) == 3
    free = make_loop(curation=CURATION)
    assert curated(free).manifest.version != made.manifest.version
    assert count_new(free, connect(), 0) == 3 == len(answers(curated(free)))


def test_the_queue_starts_with_the_least_certain_and_states_reasons(loop, logged):
    put(loop, feedback("no", "dan", "thumbs_down", minutes=3, user="u2"))
    found = review_queue(loop, connect())
    assert [str(one.candidate.interaction.id) for one in found] == [str(uid("eve")), str(uid("dan"))]
    assert found[0].reasons == ("confidence 0.30, below 0.85",)
    assert found[1].reasons == ("feedback disagrees: 50% of the votes are against the leading answer",)
    say(loop, "eve", "reject")
    assert len(review_queue(loop, connect())) == 1


def test_a_user_who_changed_their_mind_has_one_vote(loop, logged):
    put(loop, interaction("zoe"), feedback("1", "zoe", "thumbs_up", user="u"),
        feedback("2", "zoe", "thumbs_down", minutes=1, user="u"))  # fmt: skip
    (one,) = [one for one in review_queue(loop, connect()) if one.candidate.interaction.id == uid("zoe")]
    assert one.reasons == ("a person gave a thumbs-down, and nobody corrected the answer",)


def test_a_tie_of_users_is_out_of_the_next_dataset_and_waits_for_a_review(loop, logged):
    assert "dan spoke" in answers(curated(loop))
    put(loop, feedback("no", "dan", "thumbs_down", minutes=0, user="u2"))
    second = curated(loop)
    assert answers(second) == ["amy spoke", "ben spoke", "cid spoke"] and not second.manifest.undesirable
    assert uid("dan") in {one.candidate.interaction.id for one in review_queue(loop, connect())}
    say(loop, "dan", "approve")
    assert "dan spoke" in answers(curated(loop))
    put(loop, feedback("also no", "ben", "thumbs_down", minutes=1, user="u2"), feedback("third", "ben", "thumbs_up",
        minutes=2, user="u3"))  # fmt: skip
    assert "ben spoke" in answers(curated(loop))


def test_a_tie_that_only_the_loops_own_rewards_make_waits_for_a_review(make_loop):
    ratings = {"1": -1.0, "2": -0.9, "3": -0.3, "4": 0.3, "5": 0.9, "gold": 1.0}
    loop = make_loop(curation=CURATION, feedback={"ratings": ratings})
    with connect().write() as connection:
        given = [feedback("1", "zoe", "rating", rating=3, user="u"), feedback("2", "zoe", "rating", rating=4, user="v")]
        record(connection, loop.name, [interaction("zoe"), *given], reward_function(loop.feedback))
    (one,) = review_queue(loop, connect())
    assert one.candidate.example is None
    assert one.reasons == ("feedback disagrees: 50% of the votes are against the leading answer",)


def report(folder: Path, promote: bool):
    """A report as eval_report writes it, as far as its slices go."""
    scores = {"walls": (9, 8), "people": (1, 9)}  # right of 10: challenger, champion
    slices = [
        {"name": name, "challenger": {"correct": new, "total": 10}, "champion": {"correct": old, "total": 10}}
        for name, (new, old) in scores.items()
    ]
    questions = [{"slice": "people", "prompt": "what did zed say of it all?"}, {"slice": "walls", "prompt": "a wall"}]
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"slices": slices, "questions": questions}))
    record_comparison(
        connect(),
        ComparisonRecord(
            id=folder.name, loop="notes", challenger_sha256="a", champion_id=None, champion_sha256="b",
            benchmark_sha256="c", decision="promote" if promote else "reject",
            reason="r", watermark=1, report_path=folder / "report.html",
            created_at=START,
        ),
    )  # fmt: skip


def test_prompts_like_the_weak_slices_of_the_newest_report_are_queued(loop, logged, own_home):
    report(own_home / "promoted", promote=True)
    found = review_queue(loop, connect())
    assert len(found) == 5 and found[0].candidate.interaction.id == uid("eve")
    assert all("similar to the weak slice people (10% correct)" in one.reasons[-1] for one in found)
    shutil.rmtree(own_home / "promoted")
    assert len(review_queue(loop, connect())) == 1  # without its report, the queue goes on


@pytest.mark.parametrize("name", ["eve", "amy"])
@pytest.mark.parametrize("limit", [None, 3])
def test_an_example_whose_decision_is_undone_later_is_as_in_the_queue(loop, logged, own_home, name, limit):
    """Its reasons and priority are those of the queue, which keeps its length."""
    report(own_home / "promoted", promote=True)
    (before,) = [one for one in review_queue(loop, connect()) if one.candidate.interaction.id == uid(name)]
    first = ReviewSession(loop, connect(), "rita", None)
    first.queue = [before]
    first.decide("approve", f"{name} spoke")
    session = ReviewSession(loop, connect(), "rita", limit)
    assert session.undo()
    assert (session.current.interaction.id, session.position) == (uid(name), 0)
    assert (session.queue[0].reasons, session.queue[0].priority) == (before.reasons, before.priority)
    assert "similar to the weak slice people" in session.queue[0].reasons[-1]
    assert len(session.queue) == (limit or 5) and session.counts() == {"undo": 1}
    session.skip()
    assert session.undo() and session.counts() == {"undo": 1}


def test_a_rejected_challengers_weak_slices_do_not_count(loop, logged, own_home):
    report(own_home / "rejected", promote=False)
    assert len(review_queue(loop, connect())) == 1
