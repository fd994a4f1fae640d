"""conversations, ratings, tallies, forgetting, review decisions, deployments of models, training jobs, API keys"""

import secrets

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('api_keys',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('name', sa.String(length=100), nullable=False),
    sa.Column('secret_sha256', sa.String(length=64), nullable=False),
    sa.Column('scopes', sa.String(length=100), nullable=False, comment='infer, feedback, admin; by commas.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_api_keys')),
    sa.UniqueConstraint('secret_sha256', name=op.f('uq_api_keys_secret_sha256'))
    )
    op.create_table('forgotten_events',
    sa.Column('id', sa.String(length=36), nullable=False, comment='Of an interaction or a feedback; random, says nothing.'),
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('sequence', sa.BigInteger(), nullable=False, comment='When: snapshots up to here may still hold it.'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_forgotten_events')),
    comment="What was deleted on a person's wish never comes back, though a log still holds it."
    )
    op.create_index(op.f('ix_forgotten_events_task_sequence'), 'forgotten_events', ['task', 'sequence'])
    op.create_table('review_decisions',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('sequence', sa.BigInteger(), nullable=False),
    sa.Column('interaction_id', sa.String(length=36), nullable=False),
    sa.Column('decision', sa.String(length=20), nullable=False, comment='approve, reject or edit.'),
    sa.Column('target', sa.Text(), nullable=True, comment='The answer as the reviewer wrote it.'),
    sa.Column('reviewer', sa.String(length=200), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_review_decisions')),
    sa.UniqueConstraint('sequence', name=op.f('uq_review_decisions_sequence'))
    )
    op.create_index(op.f('ix_review_decisions_interaction_id'), 'review_decisions', ['interaction_id'])
    op.create_index(op.f('ix_review_decisions_task_sequence'), 'review_decisions', ['task', 'sequence'])
    op.create_table('tallies',
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('name', sa.String(length=60), nullable=False),
    sa.Column('value', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('task', 'name', name=op.f('pk_tallies')),
    comment='How much there is of what, kept by the transactions that add it: counting a million rows is slow.'
    )
    op.create_table('training_jobs',
    sa.Column('id', sa.String(length=64), nullable=False, comment='Version of the adapter.'),
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('run_id', sa.String(length=64), nullable=False, comment="Dagster's run, which knows the progress."),
    sa.Column('dataset', sa.String(length=64), nullable=False, comment='Version of the dataset.'),
    sa.Column('method', sa.String(length=20), nullable=False),
    sa.Column('mode', sa.String(length=20), nullable=False),
    sa.Column('device', sa.String(length=200), nullable=False),
    sa.Column('examples', sa.Integer(), nullable=False),
    sa.Column('steps', sa.Integer(), nullable=False),
    sa.Column('loss_before', sa.Float(), nullable=False),
    sa.Column('loss_after', sa.Float(), nullable=False),
    sa.Column('tokens_per_second', sa.Float(), nullable=False),
    sa.Column('wall_seconds', sa.Float(), nullable=False),
    sa.Column('peak_memory_bytes', sa.BigInteger(), nullable=False),
    sa.Column('watermark', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', 'loop', name=op.f('pk_training_jobs'))
    )
    for column in (
        sa.Column('history', sa.JSON(none_as_null=True), nullable=True, comment='Messages before the prompt; null without any.'),
        sa.Column('validation_score', sa.Float(), nullable=True),
        sa.Column('domain', sa.String(length=200), nullable=True),
        sa.Column('kind', sa.String(length=200), nullable=True),
        sa.Column('retrieved_context', sa.Text(), nullable=True),
        sa.Column('arm', sa.String(length=200), nullable=True, comment='Traffic arm.'),
        sa.Column('flag', sa.String(length=200), nullable=True, comment='Why a person should look at it.'),
    ):
        op.add_column('interactions', column)
    op.add_column('feedback', sa.Column('rating', sa.String(length=10), nullable=True))
    op.add_column('feedback', sa.Column('reward', sa.Float(), nullable=True))
    for column in (
        sa.Column('adapter_path', sa.Text(), nullable=True, comment='LoRA adapter as GGUF over gguf_path; null: gguf_path is the whole.'),
        sa.Column('adapter_sha256', sa.String(length=64), nullable=True),
        sa.Column('accuracy', sa.Float(), nullable=True, comment='Quality: share of right parameters, words or answers.'),
        sa.Column('latency_ms', sa.Float(), nullable=True, comment='Performance: median of an answer.'),
        sa.Column('tokens_per_second', sa.Float(), nullable=True),
        sa.Column('size_bytes', sa.BigInteger(), nullable=True),
        sa.Column('deployed_at', sa.DateTime(timezone=True), nullable=True, comment='Deployment: when it last became champion.'),
        sa.Column('retired_at', sa.DateTime(timezone=True), nullable=True, comment='When it last ceased to be champion; null while it is.'),
        sa.Column('deleted_at', sa.DateTime(timezone=True), nullable=True, comment='When its files were deleted.'),
    ):
        op.add_column('models', column)
    op.execute(f"INSERT INTO counters (name, value) VALUES ('store', {secrets.randbits(62)})")
    _count_what_is_there()


# As the store counts them; written out, since a migration must not change when the store does.
_COUNTS = (
    "SELECT task, 'interactions', count(*) FROM interactions GROUP BY task",
    "SELECT task, 'feedback', count(*) FROM feedback GROUP BY task",
    "SELECT task, 'feedback.' || kind, count(*) FROM feedback GROUP BY task, kind",
    "SELECT task, 'examples', count(*) FROM examples GROUP BY task",
    "SELECT task, 'corrected', count(*) FROM examples WHERE corrected GROUP BY task",
    "SELECT task, 'rewarded', count(*) FROM examples WHERE reward > 0 AND NOT corrected GROUP BY task",
    "SELECT f.task, 'unmatched', count(*) FROM feedback f WHERE NOT EXISTS "
    "(SELECT 1 FROM interactions i WHERE i.id = f.interaction_id AND i.task = f.task) GROUP BY f.task",
)


def _count_what_is_there() -> None:
    for query in _COUNTS:
        op.execute(f"INSERT INTO tallies (task, name, value) {query}")


def downgrade() -> None:
    raise NotImplementedError("what people said would be lost; restore a copy of the database from before instead")
