"""deployment targets: what each target should serve, and what it serves"""

import sqlalchemy as sa
from alembic import op

revision = '0016'
down_revision = '0015'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('deployment_targets',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('target', sa.String(length=60), nullable=False),
    sa.Column('wanted', sa.String(length=64), nullable=False, comment='Label of the release, such as v1.2.0 or base.'),
    sa.Column('wanted_sha256', sa.String(length=64), nullable=False, comment='Of the wanted model.'),
    sa.Column('observed', sa.String(length=64), nullable=True, comment='Label that the target served when it was last asked.'),
    sa.Column('digest', sa.String(length=200), nullable=False, comment="The target's own identity of it; empty if none."),
    sa.Column('state', sa.String(length=20), nullable=False, comment='pending, active, failed, rejected or drifted.'),
    sa.Column('tries', sa.Integer(), nullable=False, comment='Failed tries to reach the wanted release.'),
    sa.Column('next_try_at', sa.DateTime(timezone=True), nullable=True, comment='Null: at once, or not before the wanted release changes.'),
    sa.Column('last_error', sa.Text(), nullable=False),
    sa.Column('facts', sa.JSON(), nullable=False, comment='Agreement, score, whether it reads control tokens; config.'),
    sa.Column('observed_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('locked_by', sa.String(length=200), nullable=True, comment='Process that works on the target; null if none.'),
    sa.Column('locked_until', sa.DateTime(timezone=True), nullable=True, comment='When the lock of a killed process ends.'),
    sa.PrimaryKeyConstraint('loop', 'target', name=op.f('pk_deployment_targets')),
    comment='Where each deployment target of a loop stands; the champion is what is wanted.'
    )


def downgrade() -> None:
    op.drop_table('deployment_targets')
