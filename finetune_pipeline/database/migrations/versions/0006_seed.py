"""seed: what an answer was sampled with"""

import sqlalchemy as sa
from alembic import op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('interactions', sa.Column('seed', sa.BigInteger(), nullable=True, comment='What the answer was sampled with; null: temperature 0, or not known.'))


def downgrade() -> None:
    raise NotImplementedError("the seeds of answers would be lost; restore a copy of the database from before instead")
