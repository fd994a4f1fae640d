"""Approvals on real databases: requests, decisions, and who comes first."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_pipeline.database import Database
from finetune_pipeline.registry.approvals import (
    Approval,
    ApprovalError,
    approval_in,
    decide_in,
    find_approval,
    newest_approval,
    open_approvals_in,
    request_in,
    void_in,
)
from finetune_pipeline.registry.champion import archive, champion, lock_champion, promote, rollback, switch, unarchive
from finetune_pipeline.registry.comparisons import find_comparison
from finetune_pipeline.registry.deployment_history import list_deployments, list_history
from finetune_pipeline.registry.model_versions import CandidateModel, RegistryError
from finetune_pipeline_tests.registry.conftest import MakeCandidate, compared, promote_over


def ask(db: Database, one: CandidateModel, comparison: str, **changes: Any) -> Approval:
    """Record a comparison that accepts a candidate, and the request for its approval."""
    compared(db, one, comparison)
    with lock_champion(db, one.loop) as locked:
        request = Approval(
            loop=one.loop,
            comparison_id=comparison,
            challenger_sha256=one.sha256,
            gguf_version=one.id,
            hashes={"gguf": one.sha256},
            state="waiting",
            requested_at=locked.now,
        ).model_copy(update=changes)
        request_in(locked.connection, request)
    return request


def decide(db: Database, request: Approval, actor: str = "ann") -> None:
    with lock_champion(db, request.loop) as locked:
        decide_in(locked.connection, request, "approved", actor, "looks good", locked.now)


def test_only_an_approved_challenger_is_promoted_as_approved(db: Database, candidate: MakeCandidate) -> None:
    one = candidate("a")
    request = ask(db, one, "c1")
    with pytest.raises(ApprovalError, match="nobody approved"):
        promote(db, one, None, "ann", "r", "c1", "approve")
    decide(db, request)
    assert promote(db, one, None, "ann", "looks good", "c1", "approve") == champion(db, "aec")
    assert [(row.action, row.actor) for row in list_deployments(db, "aec")] == [("approve", "ann")]
    with db.read() as connection:
        assert open_approvals_in(connection, "aec") == []
    assert rollback(db, "aec", "bob", "worse") is None
    assert switch(db, "aec", "v1.0.0", "bob", "again") is not None  # an approved version counts as promoted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda db, other, request: promote_over(db, other), "the champion changed"),
        (lambda db, other, request: ask(db, other, "c2"), "replaced by the newer challenger aec@"),
    ],
    ids=["another champion", "a newer challenger"],
)
def test_what_comes_between_approval_and_promotion_makes_it_void(
    db: Database, candidate: MakeCandidate, change: Callable[..., Any], words: str
) -> None:
    one = candidate("a")
    request = ask(db, one, "c1")
    decide(db, request)
    change(db, candidate("b"), request)
    before = champion(db, "aec")
    with pytest.raises(RegistryError, match=words):
        promote(db, one, None, "ann", "looks good", "c1", "approve") if before is None else promote(
            db, one, before.id, "ann", "looks good", "c1", "approve"
        )
    assert champion(db, "aec") == before


def test_an_expired_approval_promotes_nothing(db: Database, candidate: MakeCandidate) -> None:
    one = candidate("a")
    decide(db, ask(db, one, "c1", expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    with pytest.raises(ApprovalError, match="is void: it expired on"):
        promote(db, one, None, "ann", "looks good", "c1", "approve")


def test_an_approval_and_a_newer_challenger_at_once_never_promote_a_replaced_one(
    db: Database, candidate: MakeCandidate
) -> None:
    one, other = candidate("a"), candidate("b")
    decide(db, ask(db, one, "c1"))
    compared(db, other, "c2")
    outcome: list[str] = []
    start = threading.Barrier(2)

    def promote_it() -> None:
        start.wait()
        try:
            promote(db, one, None, "ann", "looks good", "c1", "approve")
            outcome.append("promoted")
        except RegistryError:
            outcome.append("void")

    def replace_it() -> None:
        start.wait()
        with lock_champion(db, "aec") as locked:
            newer = Approval(
                loop="aec", comparison_id="c2", challenger_sha256=other.sha256, gguf_version="g", hashes={},
                state="waiting", requested_at=locked.now,
            )  # fmt: skip
            request_in(locked.connection, newer)

    threads = [threading.Thread(target=work) for work in (promote_it, replace_it)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    state = find_approval(db, "aec", "c1")
    assert state is not None
    assert (outcome, state.state) in ((["promoted"], "approved"), (["void"], "void"))
    assert (champion(db, "aec") is not None) == (outcome == ["promoted"])


def test_the_newest_request_and_its_hashes_are_read_back(db: Database, candidate: MakeCandidate) -> None:
    assert newest_approval(db, "aec") is None and find_approval(db, "aec", "c1") is None
    asked = [ask(db, candidate(name), f"c{name}", expires_at=datetime.now(UTC) + timedelta(days=1)) for name in "ab"]
    assert newest_approval(db, "aec") == asked[1] and not asked[1].expired(datetime.now(UTC))
    with db.write() as connection:
        void_in(connection, asked[1], "the report changed", datetime.now(UTC))
        found = approval_in(connection, "aec", "cb")
    assert found is not None and (found.state, found.reason) == ("void", "the report changed")
    assert find_comparison(db, "aec", "cb") is not None


def test_notes_in_the_history_change_no_champion(db: Database, candidate: MakeCandidate) -> None:
    first = promote_over(db, candidate("a"))
    promote_over(db, candidate("b"))
    last = promote_over(db, candidate("c"))
    late = candidate("d")
    compared(db, late, "late")
    archive(db, "aec", "v1.0.0", "ann", "old")
    unarchive(db, "aec", "aec@v1.0.0", "bob", "not so old")
    assert [row.action for row in list_history(db, "aec")] == ["promote"] * 3 + ["archive", "unarchive"]
    assert [row.model_id for row in list_history(db, "aec", after=list_history(db, "aec")[2].id)] == [first.id] * 2
    assert len(list_deployments(db, "aec")) == 3 and champion(db, "aec") == last
    assert promote(db, late, last.id, "loop", "gain", "late").version == "v1.0.3"  # no champion changed since
    for wrong, words in (("notes@v1.0.0", "another loop"), ("v7.0.0", "has no version")):
        with pytest.raises(RegistryError, match=words):
            archive(db, "aec", wrong, "ann", "old")
    with pytest.raises(RegistryError, match="archive needs reason"):
        archive(db, "aec", "v1.0.0", "ann", "")
