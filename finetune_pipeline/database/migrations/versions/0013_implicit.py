"""implicit: examples of answers that nobody objected to"""

import sqlalchemy as sa
from alembic import op

revision = '0013'
down_revision = '0012'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('examples', sa.Column('implicit', sa.Boolean(), nullable=False, server_default=sa.false(), comment='It exists only because nobody objected to the answer in time.'))
    op.create_table('implicit_acceptance',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('after_hours', sa.Float(), nullable=False),
    sa.Column('min_confidence', sa.Float(), nullable=False),
    sa.Column('reward', sa.Float(), nullable=False),
    sa.Column('accepted_until', sa.DateTime(timezone=True), nullable=False, comment='Answers up to this time were looked at.'),
    sa.PrimaryKeyConstraint('loop', name=op.f('pk_implicit_acceptance')),
    comment='The settings by which the implicit examples of a loop were made, and how far; no row where it is off.'
    )
    op.create_index(op.f('ix_interactions_loop_created_at'), 'interactions', ['loop', 'created_at'])


def downgrade() -> None:
    raise NotImplementedError("implicit examples would look like those of feedback; restore a copy of the database from before instead")
