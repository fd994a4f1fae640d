"""sealed looks: scores on the sealed benchmark"""

import sqlalchemy as sa
from alembic import op

revision = '0022'
down_revision = '0021'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('sealed_looks',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('deployment_id', sa.Integer(), nullable=False, comment='The promotion at which it was asked.'),
    sa.Column('model_id', sa.String(length=64), nullable=False),
    sa.Column('sealed_sha256', sa.String(length=64), nullable=False, comment='Of the sealed benchmark.'),
    sa.Column('benchmark_sha256', sa.String(length=64), nullable=False, comment='Of the open one.'),
    sa.Column('settings_sha256', sa.String(length=64), nullable=False, comment='Of metric, schema and decoding.'),
    sa.Column('sealed_scores', sa.JSON(), nullable=False, comment='Question -> correct, total, cluster.'),
    sa.Column('open_scores', sa.JSON(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('loop', 'deployment_id', name=op.f('pk_sealed_looks')),
    comment='Scores on evaluation.sealed_benchmark, with those on the open benchmark; no answers.'
    )


def downgrade() -> None:
    op.drop_table('sealed_looks')
