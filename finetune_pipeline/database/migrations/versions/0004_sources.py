"""sources: where a record came from, how far each was read, what could not be used"""

import sqlalchemy as sa
from alembic import op

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('interactions', sa.Column('source', sa.String(length=200), nullable=True, comment="The declared source it was made from; null: an application's log."))
    op.add_column('interactions', sa.Column('origin', sa.String(length=1000), nullable=True, comment='Where in that source.'))
    op.add_column('interactions', sa.Column('withdrawn', sa.BigInteger(), nullable=True, comment='Ingest sequence at which its source no longer had it; else null.'))
    op.create_index(op.f('ix_interactions_task_source_origin'), 'interactions', ['task', 'source', 'origin'])
    op.create_index(op.f('ix_interactions_task_withdrawn'), 'interactions', ['task', 'withdrawn'])
    op.create_table('source_marks',
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('source', sa.String(length=200), nullable=False),
    sa.Column('mark', sa.JSON(), nullable=False, comment="Where reading it goes on, in the source's own terms."),
    sa.Column('read_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('task', 'source', name=op.f('pk_source_marks')),
    comment='How far each declared source was read.'
    )
    op.create_table('skipped_items',
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('source', sa.String(length=200), nullable=False),
    sa.Column('origin', sa.String(length=1000), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('task', 'source', 'origin', name=op.f('pk_skipped_items')),
    comment='What the last reading of each source could not use, and why.'
    )


def downgrade() -> None:
    raise NotImplementedError("where records came from would be lost; restore a copy of the database from before instead")
