"""review: what a decision was about, and what it makes of an example"""

import sqlalchemy as sa
from alembic import op

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('review_decisions', sa.Column('content_hash', sa.String(length=64), nullable=True, comment='Of the question and answer that were shown; null: an undo.'))
    op.create_index(op.f('ix_review_decisions_task_content_hash'), 'review_decisions', ['task', 'content_hash'])
    op.add_column('examples', sa.Column('review', sa.String(length=20), nullable=True, comment='approve, edit or reject; null: no reviewer decided.'))


def downgrade() -> None:
    raise NotImplementedError("what reviewers decided would be lost; restore a copy of the database from before instead")
