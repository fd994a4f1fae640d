"""what a training went on from"""

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = 'Version of the adapter that it went on from; null: the base.'
    op.add_column('training_jobs', sa.Column('initial_adapter', sa.String(length=64), nullable=True, comment=comment))


def downgrade() -> None:
    raise NotImplementedError("what models learnt from would be lost; restore a copy of the database from before instead")
