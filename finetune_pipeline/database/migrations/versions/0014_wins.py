"""wins: wins, losses and ties of comparisons, and comparisons made by hand"""

import sqlalchemy as sa
from alembic import op

revision = '0014'
down_revision = '0013'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('comparisons', sa.Column('wins', sa.Integer(), nullable=True, comment="Questions in which the challenger's score is higher; null before 0014."))
    op.add_column('comparisons', sa.Column('losses', sa.Integer(), nullable=True, comment='Questions in which it is lower.'))
    op.add_column('comparisons', sa.Column('ties', sa.Integer(), nullable=True, comment='Questions in which it is equal.'))
    op.create_table('manual_comparisons',
    sa.Column('id', sa.String(length=64), nullable=False, comment='Version of the report.'),
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('first', sa.Text(), nullable=False, comment='Name of a version, path of a GGUF, or URL and model.'),
    sa.Column('first_sha256', sa.String(length=64), nullable=False, comment="Of the files, or of an endpoint's URL and time."),
    sa.Column('second', sa.Text(), nullable=False, comment='Wins are its.'),
    sa.Column('second_sha256', sa.String(length=64), nullable=False),
    sa.Column('benchmark_sha256', sa.String(length=64), nullable=False),
    sa.Column('wins', sa.Integer(), nullable=False),
    sa.Column('losses', sa.Integer(), nullable=False),
    sa.Column('ties', sa.Integer(), nullable=False),
    sa.Column('p_value', sa.Float(), nullable=False),
    sa.Column('report_path', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', 'loop', name=op.f('pk_manual_comparisons')),
    comment='Made by `finetune compare`. They judge no data and promote nothing.'
    )


def downgrade() -> None:
    op.drop_table('manual_comparisons')
    op.drop_column('comparisons', 'ties')
    op.drop_column('comparisons', 'losses')
    op.drop_column('comparisons', 'wins')
