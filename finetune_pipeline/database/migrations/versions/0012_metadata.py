"""metadata: further facts of the application about an interaction or a feedback"""

import sqlalchemy as sa
from alembic import op

revision = '0012'
down_revision = '0011'
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ('interactions', 'feedback'):
        op.add_column(table, sa.Column('metadata', sa.JSON(none_as_null=True), nullable=True, comment='Further facts of the application; never trained on.'))


def downgrade() -> None:
    raise NotImplementedError("the metadata of events would be lost; restore a copy of the database from before instead")
