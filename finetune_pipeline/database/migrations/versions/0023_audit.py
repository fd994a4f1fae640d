"""audit: what people did in the console"""

import sqlalchemy as sa
from alembic import op

revision = '0023'
down_revision = '0022'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('audit_log',
    sa.Column('id', sa.Integer(), autoincrement=True, nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('actor', sa.String(length=200), nullable=False, comment="The API key's name, or the OS user."),
    sa.Column('action', sa.String(length=60), nullable=False, comment='Such as review approve or model switch.'),
    sa.Column('subject', sa.String(length=200), nullable=False, comment='What it is about: an id or a name.'),
    sa.Column('detail', sa.Text(), nullable=False, comment='Further facts or the reason; no text of interactions.'),
    sa.Column('outcome', sa.Text(), nullable=True, comment='Empty if it succeeded, else the error; null while it runs or was killed.'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_audit_log')),
    comment='What people did in the console.'
    )
    op.create_index(op.f('ix_audit_log_loop_id'), 'audit_log', ['loop', 'id'])
    if op.get_bind().dialect.name != 'sqlite':  # SQLite has no comments
        op.alter_column('api_keys', 'scopes', comment='infer, feedback, view, admin; separated by commas.')
        op.alter_column('training_jobs', 'origin', comment='api, openai, console, cli, sensor, schedule or ui.')


def downgrade() -> None:
    op.drop_table('audit_log')
