"""events, examples, ledger, registry, comparisons"""

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('champions',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('model_id', sa.String(length=64), nullable=True, comment='Null: the base model serves.'),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('loop', name=op.f('pk_champions'))
    )
    op.create_table('counters',
    sa.Column('name', sa.String(length=60), nullable=False),
    sa.Column('value', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_counters')),
    comment='The ingest sequence. Its row is locked until commit, so commits follow the sequence in PostgreSQL too.'
    )
    op.execute("INSERT INTO counters (name, value) VALUES ('events', 0)")
    op.create_table('deployments',
    sa.Column('id', sa.Integer(), autoincrement=True, nullable=False),
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('action', sa.String(length=20), nullable=False, comment='promote, switch, rollback or force.'),
    sa.Column('model_id', sa.String(length=64), nullable=True),
    sa.Column('previous_id', sa.String(length=64), nullable=True),
    sa.Column('actor', sa.String(length=200), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.Column('comparison_id', sa.String(length=64), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_deployments'))
    )
    with op.batch_alter_table('deployments', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_deployments_loop_id'), ['loop', 'id'], unique=False)

    op.create_table('examples',
    sa.Column('interaction_id', sa.String(length=36), nullable=False),
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('sequence', sa.BigInteger(), nullable=False),
    sa.Column('content_hash', sa.String(length=64), nullable=False, comment='Of normalised prompt and target.'),
    sa.Column('target', sa.Text(), nullable=False),
    sa.Column('reward', sa.Float(), nullable=False),
    sa.Column('confidence', sa.Float(), nullable=True),
    sa.Column('confirmed', sa.Boolean(), nullable=False),
    sa.Column('corrected', sa.Boolean(), nullable=False),
    sa.PrimaryKeyConstraint('interaction_id', name=op.f('pk_examples'))
    )
    with op.batch_alter_table('examples', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_examples_task_content_hash'), ['task', 'content_hash'], unique=False)
        batch_op.create_index(batch_op.f('ix_examples_task_sequence'), ['task', 'sequence'], unique=False)

    op.create_table('feedback',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('sequence', sa.BigInteger(), nullable=False),
    sa.Column('interaction_id', sa.String(length=36), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('kind', sa.String(length=30), nullable=False),
    sa.Column('score', sa.Float(), nullable=True),
    sa.Column('correction', sa.Text(), nullable=True),
    sa.Column('output_hash', sa.String(length=64), nullable=True),
    sa.Column('user', sa.String(length=200), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_feedback')),
    sa.UniqueConstraint('sequence', name=op.f('uq_feedback_sequence'))
    )
    with op.batch_alter_table('feedback', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_feedback_interaction_id'), ['interaction_id'], unique=False)
        batch_op.create_index(batch_op.f('ix_feedback_task_sequence'), ['task', 'sequence'], unique=False)

    op.create_table('ingested_files',
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('path', sa.String(length=1000), nullable=False),
    sa.Column('size', sa.BigInteger(), nullable=False, comment='Bytes when last read to its end.'),
    sa.Column('mtime_ns', sa.BigInteger(), nullable=False),
    sa.Column('offset', sa.BigInteger(), nullable=False, comment='Bytes read so far.'),
    sa.Column('lines', sa.Integer(), nullable=False),
    sa.Column('rejected', sa.Integer(), nullable=False),
    sa.Column('tail_hash', sa.String(length=64), nullable=False, comment='Of the bytes before offset: was it rewritten?'),
    sa.Column('finished', sa.Boolean(), nullable=False),
    sa.PrimaryKeyConstraint('task', 'path', name=op.f('pk_ingested_files'))
    )
    op.create_table('interactions',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('sequence', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('prompt', sa.Text(), nullable=False),
    sa.Column('output', sa.Text(), nullable=False),
    sa.Column('model', sa.String(length=200), nullable=True),
    sa.Column('confidence', sa.Float(), nullable=True),
    sa.Column('user', sa.String(length=200), nullable=True),
    sa.Column('latency_ms', sa.Float(), nullable=True),
    sa.Column('prompt_tokens', sa.Integer(), nullable=True),
    sa.Column('completion_tokens', sa.Integer(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_interactions')),
    sa.UniqueConstraint('sequence', name=op.f('uq_interactions_sequence'))
    )
    with op.batch_alter_table('interactions', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_interactions_task_sequence'), ['task', 'sequence'], unique=False)

    op.create_table('judged_examples',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('content_hash', sa.String(length=64), nullable=False),
    sa.PrimaryKeyConstraint('loop', 'content_hash', name=op.f('pk_judged_examples')),
    comment='Contents of every dataset whose evaluation report was written: they never count as new again.'
    )
    op.create_table('model_comparisons',
    sa.Column('id', sa.String(length=64), nullable=False, comment='Version of the report.'),
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('challenger_sha256', sa.String(length=64), nullable=False),
    sa.Column('champion_id', sa.String(length=64), nullable=True),
    sa.Column('champion_sha256', sa.String(length=64), nullable=False),
    sa.Column('benchmark_sha256', sa.String(length=64), nullable=False),
    sa.Column('promote', sa.Boolean(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.Column('watermark', sa.BigInteger(), nullable=False, comment='The data that was judged ends here.'),
    sa.Column('report_path', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', 'loop', name=op.f('pk_model_comparisons'))
    )
    with op.batch_alter_table('model_comparisons', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_model_comparisons_loop_watermark'), ['loop', 'watermark'], unique=False)

    op.create_table('models',
    sa.Column('id', sa.String(length=64), nullable=False, comment="First 16 hex digits of the GGUF's SHA-256."),
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('major', sa.Integer(), nullable=False),
    sa.Column('minor', sa.Integer(), nullable=False),
    sa.Column('patch', sa.Integer(), nullable=False),
    sa.Column('gguf_path', sa.Text(), nullable=False),
    sa.Column('gguf_sha256', sa.String(length=64), nullable=False),
    sa.Column('base_hash', sa.String(length=64), nullable=False),
    sa.Column('mode', sa.String(length=20), nullable=False),
    sa.Column('lineage', sa.JSON(), nullable=False, comment='Versions of adapter, dataset, logs, and the watermark.'),
    sa.Column('scores', sa.JSON(), nullable=False),
    sa.Column('report_path', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', 'loop', name=op.f('pk_models')),
    sa.UniqueConstraint('loop', 'major', 'minor', 'patch', name=op.f('uq_models_loop_major_minor_patch'))
    )
    op.create_table('rejected_lines',
    sa.Column('task', sa.String(length=60), nullable=False),
    sa.Column('path', sa.String(length=1000), nullable=False),
    sa.Column('line', sa.Integer(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=False),
    sa.Column('excerpt', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('task', 'path', 'line', name=op.f('pk_rejected_lines'))
    )


def downgrade() -> None:
    raise NotImplementedError("the first tables hold what people said; delete the database by hand if that is meant")
