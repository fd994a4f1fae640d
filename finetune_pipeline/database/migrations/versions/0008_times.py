"""replace times in the future by the time just after the latest earlier event"""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from alembic import op

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None

TICK = timedelta(microseconds=1)
moment = sa.DateTime(timezone=True)
interactions = sa.table('interactions', sa.column('id', sa.String), sa.column('sequence', sa.BigInteger), sa.column('created_at', moment))
feedback = sa.table('feedback', sa.column('id', sa.String), sa.column('sequence', sa.BigInteger), sa.column('created_at', moment), sa.column('interaction_id', sa.String))
examples = sa.table('examples', sa.column('interaction_id', sa.String), sa.column('content_hash', sa.String))


def upgrade() -> None:
    connection = op.get_bind()
    limit = datetime.now(UTC) + timedelta(minutes=10)
    affected = set(connection.execute(sa.select(interactions.c.id).where(interactions.c.created_at > limit)).scalars())
    affected.update(connection.execute(sa.select(feedback.c.interaction_id).where(feedback.c.created_at > limit)).scalars())
    if not affected:
        return
    repaired = _repaired(connection, limit, affected)
    for table in (interactions, feedback):
        rows = [{'row': id, 'time': time} for name, id, time in repaired if name == table.name]
        if rows:
            connection.execute(table.update().where(table.c.id == sa.bindparam('row')).values(created_at=sa.bindparam('time')), rows)
    # The ranking of feedback may have changed; the next ingest computes these examples again, since it knows the rewards.
    mark = examples.update().where(examples.c.interaction_id == sa.bindparam('row')).values(content_hash='')
    connection.execute(mark, [{'row': id} for id in sorted(affected)])


def _repaired(connection: sa.Connection, limit: datetime, affected: set[str]) -> list[tuple[str, str, datetime]]:
    """Table, id and new time: just after what is known of the same interaction, or of any, before it arrived."""
    i, f = interactions.c, feedback.c
    events = sa.union_all(
        sa.select(sa.literal('interactions').label('name'), i.id, i.id.label('about'), i.sequence, i.created_at),
        sa.select(sa.literal('feedback').label('name'), f.id, f.interaction_id.label('about'), f.sequence, f.created_at),
    ).subquery()
    oldest = connection.execute(sa.select(sa.func.min(events.c.created_at)).where(events.c.created_at <= limit)).scalar()
    newest = _in_utc(oldest) if oldest is not None else datetime.now(UTC)
    last: dict[str, datetime] = {}
    repaired = []
    query = sa.select(events).order_by(events.c.sequence).execution_options(yield_per=5_000)
    for name, id, about, _, created_at in connection.execute(query):
        time = _in_utc(created_at)
        if time > limit:
            time = last.get(about, newest) + TICK
            repaired.append((name, id, time))
        else:
            newest = max(newest, time)
        if about in affected:
            last[about] = max(time, last.get(about, time))
    return repaired


def _in_utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def downgrade() -> None:
    raise NotImplementedError("which times were wrong is not kept; restore a copy of the database from before instead")
