"""The audit log: a row before each action, with its outcome after it."""

import pytest

from finetune_pipeline.database.audit import audited, list_audit


def test_each_action_has_a_row_with_its_outcome(db):
    with audited(db, "notes", "ann", "model switch", "notes@v1.0.0", "it is better"):
        assert list_audit(db, "notes", 9)[0].outcome is None  # a killed process leaves it like this
    with pytest.raises(RuntimeError, match="no such version"), audited(db, "notes", "bob", "model archive", "notes@v9"):
        raise RuntimeError("no such version")
    with audited(db, "other", "ann", "ask", "base"):
        pass
    rows = [(row.actor, row.action, row.subject, row.detail, row.outcome) for row in list_audit(db, "notes", 9)]
    assert rows == [
        ("bob", "model archive", "notes@v9", "", "no such version"),
        ("ann", "model switch", "notes@v1.0.0", "it is better", ""),
    ]
    assert len(list_audit(db, "notes", 1)) == 1
