"""error budget: verdicts of three kinds, and the tests that comparisons spent"""

import sqlalchemy as sa
from alembic import op

revision = '0015'
down_revision = '0014'
branch_labels = None
depends_on = None

comparisons = sa.table('comparisons', sa.column('promote', sa.Boolean), sa.column('decision', sa.String))


def upgrade() -> None:
    with op.batch_alter_table('comparisons') as batch:
        batch.add_column(sa.Column('decision', sa.String(length=20), nullable=False, server_default='reject', comment='promote, reject or inconclusive.'))
    op.execute(comparisons.update().where(comparisons.c.promote).values(decision='promote'))
    with op.batch_alter_table('comparisons') as batch:
        batch.drop_column('promote')
        batch.alter_column('decision', server_default=None)
    op.create_table('budget_tests',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('trial', sa.String(length=64), nullable=False, comment='Hash of the models, benchmark and settings compared.'),
    sa.Column('budget', sa.String(length=64), nullable=False, comment='Hash of the first benchmark that spent from it.'),
    sa.Column('number', sa.Integer(), nullable=False, comment='Running number of the test in its budget.'),
    sa.Column('comparison_id', sa.String(length=64), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('loop', 'trial', name=op.f('pk_budget_tests')),
    sa.UniqueConstraint('loop', 'budget', 'number', name=op.f('uq_budget_tests_loop_budget_number')),
    comment='Tests that were spent from error budgets (gate.significance: required).'
    )
    op.create_table('budget_benchmarks',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('benchmark_sha256', sa.String(length=64), nullable=False),
    sa.Column('budget', sa.String(length=64), nullable=False),
    sa.Column('questions', sa.JSON(), nullable=False, comment='Hashes of the prompts.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('loop', 'benchmark_sha256', name=op.f('pk_budget_benchmarks')),
    comment='Benchmarks that spent from an error budget; one that shares most of its questions continues it.'
    )


def downgrade() -> None:
    raise NotImplementedError("an inconclusive comparison would look like a rejected one; restore a copy of the database from before instead")
