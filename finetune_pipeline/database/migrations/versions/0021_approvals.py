"""approvals: challengers that wait for a person, and archived versions"""

import sqlalchemy as sa
from alembic import op

revision = '0021'
down_revision = '0020'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('approvals',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('comparison_id', sa.String(length=64), nullable=False),
    sa.Column('challenger_sha256', sa.String(length=64), nullable=False),
    sa.Column('gguf_version', sa.String(length=64), nullable=False, comment='Version of gguf_model, whose files are kept.'),
    sa.Column('hashes', sa.JSON(), nullable=False, comment='What the approval is for: dataset, adapter, gguf, report, settings, benchmark -> hash.'),
    sa.Column('state', sa.String(length=20), nullable=False, comment='waiting, approved, rejected or void.'),
    sa.Column('actor', sa.String(length=200), nullable=True, comment='Who approved or rejected; null otherwise.'),
    sa.Column('reason', sa.Text(), nullable=False, comment='Of the approval or rejection, or why it is void.'),
    sa.Column('requested_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True, comment='Null: never.'),
    sa.Column('decided_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('loop', 'comparison_id', name=op.f('pk_approvals')),
    comment='Challengers that wait, or waited, for the approval of a person (approval: required).'
    )
    op.add_column('model_versions', sa.Column('archived_at', sa.DateTime(timezone=True), nullable=True, comment='When it was hidden from lists; null if it is shown.'))
    if op.get_bind().dialect.name == 'postgresql':  # SQLite has no comments
        op.alter_column('deployment_history', 'action', comment='promote, approve, force, switch, rollback; reject, archive, unarchive do not change the champion.')


def downgrade() -> None:
    raise NotImplementedError("the history has actions that earlier versions do not know; restore a copy of the database from before instead")
