"""alerts: what people were told"""

import sqlalchemy as sa
from alembic import op

revision = '0018'
down_revision = '0017'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('alerts',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('key', sa.String(length=200), nullable=False, comment='Names the event, so that its alert is sent once.'),
    sa.Column('kind', sa.String(length=20), nullable=False),
    sa.Column('title', sa.Text(), nullable=False),
    sa.Column('text', sa.Text(), nullable=False),
    sa.Column('link', sa.Text(), nullable=False, comment='Path or URL of the details; empty if there is none.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('deliveries', sa.JSON(none_as_null=True), nullable=True, comment='Receiver -> why it did not get it, empty if it did; null while it is sent.'),
    sa.PrimaryKeyConstraint('loop', 'key', name=op.f('pk_alerts')),
    comment='What people were told.'
    )
    op.create_index(op.f('ix_alerts_loop_created_at'), 'alerts', ['loop', 'created_at'])


def downgrade() -> None:
    op.drop_table('alerts')
