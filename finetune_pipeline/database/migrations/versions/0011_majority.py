"""several feedback events on one answer: the majority of the users decides, no longer the newest event"""

import sqlalchemy as sa
from alembic import op

revision = '0011'
down_revision = '0010'
branch_labels = None
depends_on = None

feedback = sa.table('feedback', sa.column('interaction_id', sa.String))
examples = sa.table('examples', sa.column('interaction_id', sa.String), sa.column('content_hash', sa.String))


def upgrade() -> None:
    several = sa.select(feedback.c.interaction_id).group_by(feedback.c.interaction_id).having(sa.func.count() > 1)
    # The next ingest computes these examples again, since it knows the rewards.
    op.execute(examples.update().where(examples.c.interaction_id.in_(several)).values(content_hash=''))


def downgrade() -> None:
    pass
