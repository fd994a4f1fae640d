"""requested comparisons: comparisons by the API, blind votes on pairs, and deployment_config of a request"""

import sqlalchemy as sa
from alembic import op

revision = '0025'
down_revision = '0024'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('requested_comparisons',
    sa.Column('id', sa.String(length=40), nullable=False, comment='cmp- and 24 hexadecimal digits.'),
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('base', sa.String(length=200), nullable=False, comment='Name of the model to compare with.'),
    sa.Column('base_id', sa.String(length=64), nullable=True, comment='Its id in the registry; null is the base model.'),
    sa.Column('tuned', sa.String(length=200), nullable=False, comment='Name of the model to compare.'),
    sa.Column('tuned_id', sa.String(length=64), nullable=True),
    sa.Column('prompts', sa.JSON(none_as_null=True), nullable=True, comment="Given prompts; null: the loop's benchmark."),
    sa.Column('created_by', sa.String(length=200), nullable=False, comment="The API key's name, or the OS user."),
    sa.Column('idempotency_key', sa.String(length=200), nullable=True, comment='Chosen by the client; one comparison for each key of a loop.'),
    sa.Column('request_sha256', sa.String(length=64), nullable=True, comment='Of the request with that key.'),
    sa.Column('status', sa.String(length=20), nullable=False, comment='pending, running, completed, failed or canceled.'),
    sa.Column('tries', sa.Integer(), nullable=False, comment='Processes that began to work on it.'),
    sa.Column('progress', sa.JSON(), nullable=False, comment='model, answered and questions; or empty.'),
    sa.Column('error', sa.Text(), nullable=False),
    sa.Column('base_wins', sa.Integer(), nullable=True, comment='Questions in which its score is higher; null without a benchmark.'),
    sa.Column('tuned_wins', sa.Integer(), nullable=True),
    sa.Column('ties', sa.Integer(), nullable=True),
    sa.Column('p_value', sa.Float(), nullable=True, comment='One-sided, that the tuned model is not better.'),
    sa.Column('report', sa.String(length=64), nullable=True, comment='Version of the report; null without a benchmark.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('started_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('locked_by', sa.String(length=200), nullable=True, comment='Process that works on it; null if none.'),
    sa.Column('locked_until', sa.DateTime(timezone=True), nullable=True, comment='When the lock of a killed process ends.'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_requested_comparisons')),
    sa.UniqueConstraint('loop', 'idempotency_key', name=op.f('uq_requested_comparisons_loop_idempotency_key')),
    comment='Comparisons that a program or the console asked for. They judge no data and promote nothing.'
    )
    op.create_index(op.f('ix_requested_comparisons_loop_created_at'), 'requested_comparisons', ['loop', 'created_at'], unique=False)
    op.create_table('comparison_pairs',
    sa.Column('comparison_id', sa.String(length=40), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False, comment='1, 2, 3, ... in each comparison.'),
    sa.Column('prompt', sa.Text(), nullable=False),
    sa.Column('base_answer', sa.Text(), nullable=False),
    sa.Column('tuned_answer', sa.Text(), nullable=False),
    sa.Column('swapped', sa.Boolean(), nullable=False, comment="The tuned model's answer is shown first, as a."),
    sa.PrimaryKeyConstraint('comparison_id', 'number', name=op.f('pk_comparison_pairs')),
    comment="Two answers to one prompt, which people see without the models' names."
    )
    op.create_table('comparison_votes',
    sa.Column('comparison_id', sa.String(length=40), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False, comment='Of the pair.'),
    sa.Column('voter', sa.String(length=200), nullable=False, comment="The API key's name, or the OS user."),
    sa.Column('choice', sa.String(length=10), nullable=False, comment='base, tuned or tie.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('comparison_id', 'number', 'voter', name=op.f('pk_comparison_votes')),
    comment='Blind votes on pairs; one of each voter on each pair.'
    )
    op.add_column('deployment_history', sa.Column('requested_config', sa.JSON(none_as_null=True), nullable=True, comment="The part of config that came with the request, over the loop's YAML; null if there was none."))


def downgrade() -> None:
    op.drop_column('deployment_history', 'requested_config')
    op.drop_table('comparison_votes')
    op.drop_table('comparison_pairs')
    op.drop_table('requested_comparisons')
