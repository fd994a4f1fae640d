"""job requests: what a client asked for when it created a training job, in a column of its own"""

import json

import sqlalchemy as sa
from alembic import op

revision = '0024'
down_revision = '0023'
branch_labels = None
depends_on = None

_KEY = 'finetune.request'  # under which metadata held the request, as JSON


def upgrade() -> None:
    op.add_column('training_jobs', sa.Column('request', sa.JSON(none_as_null=True), nullable=True, comment="The client's request, which answers repeat; null if there was none."))
    connection, jobs = op.get_bind(), _jobs()
    for id, metadata in connection.execute(sa.select(jobs.c.id, jobs.c.metadata)).all():
        if _KEY in metadata:
            request = json.loads(metadata.pop(_KEY))
            connection.execute(jobs.update().where(jobs.c.id == id).values(metadata=metadata, request=request))


def downgrade() -> None:
    connection, jobs = op.get_bind(), _jobs()
    rows = sa.select(jobs.c.id, jobs.c.metadata, jobs.c.request).where(jobs.c.request.is_not(None))
    for id, metadata, request in connection.execute(rows).all():
        metadata[_KEY] = json.dumps(request)
        connection.execute(jobs.update().where(jobs.c.id == id).values(metadata=metadata))
    op.drop_column('training_jobs', 'request')


def _jobs() -> sa.Table:
    columns = (sa.Column('id', sa.String(40)), sa.Column('metadata', sa.JSON()))
    return sa.Table('training_jobs', sa.MetaData(), *columns, sa.Column('request', sa.JSON(none_as_null=True)))
