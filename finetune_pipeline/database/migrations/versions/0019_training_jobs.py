"""training jobs: a row from the moment a job is created; what was called so are the finished trainings"""

import sqlalchemy as sa
from alembic import op

revision = '0019'
down_revision = '0018'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.rename_table('training_jobs', 'trainings')
    if op.get_bind().dialect.name == 'postgresql':
        op.execute('ALTER TABLE trainings RENAME CONSTRAINT pk_training_jobs TO pk_trainings')
        op.execute("COMMENT ON TABLE trainings IS 'Finished trainings: one row for each adapter, which outlives its files.'")
    op.create_table('training_jobs',
    sa.Column('id', sa.String(length=40), nullable=False, comment='ftjob- and 24 hexadecimal digits.'),
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('origin', sa.String(length=20), nullable=False, comment='api, openai, cli, sensor, schedule or ui.'),
    sa.Column('created_by', sa.String(length=200), nullable=False, comment="The API key's name, or the OS user."),
    sa.Column('idempotency_key', sa.String(length=200), nullable=True, comment='Chosen by the client; one job for each key of a loop.'),
    sa.Column('request_sha256', sa.String(length=64), nullable=True, comment='Of the request with that key.'),
    sa.Column('settings', sa.JSON(), nullable=False, comment="Settings of this job that differ from the loop's."),
    sa.Column('dataset', sa.String(length=64), nullable=True, comment='Version of the dataset; null until it is built.'),
    sa.Column('suffix', sa.String(length=64), nullable=True),
    sa.Column('metadata', sa.JSON(), nullable=False, comment="The client's own facts."),
    sa.Column('status', sa.String(length=20), nullable=False, comment='pending, running, paused, completed, failed or canceled.'),
    sa.Column('wanted', sa.String(length=20), nullable=True, comment='pause or cancel: asked for, while its run still ends; else null.'),
    sa.Column('error', sa.Text(), nullable=False),
    sa.Column('progress', sa.JSON(), nullable=False, comment='Newest progress of the training, or empty.'),
    sa.Column('adapter', sa.String(length=64), nullable=True, comment='Version of the trained adapter.'),
    sa.Column('model_sha256', sa.String(length=64), nullable=True, comment='Of the exported model.'),
    sa.Column('report', sa.String(length=64), nullable=True, comment='Version of the report that judges it.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('started_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_training_jobs')),
    sa.UniqueConstraint('loop', 'idempotency_key', name=op.f('uq_training_jobs_loop_idempotency_key')),
    comment='Training jobs, however they were started; a job has one id and a list of Dagster runs.'
    )
    op.create_index(op.f('ix_training_jobs_loop_created_at'), 'training_jobs', ['loop', 'created_at'], unique=False)
    op.create_table('training_job_runs',
    sa.Column('run_id', sa.String(length=64), nullable=False, comment="Dagster's run."),
    sa.Column('job_id', sa.String(length=40), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False, comment='1 for the first run, one more for each resumption.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('run_id', name=op.f('pk_training_job_runs')),
    sa.UniqueConstraint('job_id', 'number', name=op.f('uq_training_job_runs_job_id_number'))
    )
    op.create_table('training_job_events',
    sa.Column('job_id', sa.String(length=40), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False, comment='1, 2, 3, ... in each job.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('kind', sa.String(length=20), nullable=False, comment='message or metrics.'),
    sa.Column('level', sa.String(length=10), nullable=False, comment='info, warn or error.'),
    sa.Column('message', sa.Text(), nullable=False),
    sa.Column('data', sa.JSON(), nullable=False, comment='Progress of the training, for metrics.'),
    sa.PrimaryKeyConstraint('job_id', 'number', name=op.f('pk_training_job_events'))
    )


def downgrade() -> None:
    op.drop_table('training_job_events')
    op.drop_table('training_job_runs')
    op.drop_index(op.f('ix_training_jobs_loop_created_at'), 'training_jobs')
    op.drop_table('training_jobs')
    op.rename_table('trainings', 'training_jobs')
    if op.get_bind().dialect.name == 'postgresql':
        op.execute('ALTER TABLE training_jobs RENAME CONSTRAINT pk_trainings TO pk_training_jobs')
        op.execute('COMMENT ON TABLE training_jobs IS NULL')
