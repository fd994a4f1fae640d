"""proof: what was published, what the blocking checks found, and on what a promotion rests"""

import sqlalchemy as sa
from alembic import op

revision = '0009'
down_revision = '0008'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('made_artifacts',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('stage', sa.String(length=60), nullable=False),
    sa.Column('version', sa.String(length=64), nullable=False),
    sa.Column('sha256', sa.String(length=64), nullable=False, comment="Of its manifest, which holds its files' hashes."),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('loop', 'stage', 'version', 'sha256', name=op.f('pk_made_artifacts')),
    comment='Every artifact that was published: a folder that is not in here was written or edited by something else.'
    )
    op.create_table('check_outcomes',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('stage', sa.String(length=60), nullable=False),
    sa.Column('version', sa.String(length=64), nullable=False),
    sa.Column('sha256', sa.String(length=64), nullable=False, comment="Of the artifact's manifest, as in made_artifacts."),
    sa.Column('name', sa.String(length=60), nullable=False, comment='Of a blocking check.'),
    sa.Column('passed', sa.Boolean(), nullable=False),
    sa.Column('run_id', sa.String(length=64), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('loop', 'stage', 'version', 'sha256', 'name', name=op.f('pk_check_outcomes')),
    comment='What the blocking checks last found of each artifact; without passing ones nothing is promoted.'
    )
    op.add_column('model_comparisons', sa.Column('report_sha256', sa.String(length=64), nullable=True, comment="Of the report's manifest; null: there is no report to rest on."))
    op.add_column('model_comparisons', sa.Column('after_move', sa.Integer(), nullable=True, comment="Id of the loop's newest deployment when it was made; 0: none."))


def downgrade() -> None:
    raise NotImplementedError("what a promotion rests on would be lost; restore a copy of the database from before instead")
