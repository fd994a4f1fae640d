"""deployment config: the server settings that a deployment was made with"""

import sqlalchemy as sa
from alembic import op

revision = '0017'
down_revision = '0016'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('deployment_history', sa.Column('config', sa.JSON(none_as_null=True), nullable=True, comment='deployment_config: settings of the servers; null if there were none.'))


def downgrade() -> None:
    op.drop_column('deployment_history', 'config')
