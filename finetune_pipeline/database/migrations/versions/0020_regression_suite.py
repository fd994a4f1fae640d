"""regression suite: corrections that a promotion fixed"""

import sqlalchemy as sa
from alembic import op

revision = '0020'
down_revision = '0019'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('regression_questions',
    sa.Column('loop', sa.String(length=60), nullable=False),
    sa.Column('interaction_id', sa.String(length=36), nullable=False),
    sa.Column('content_hash', sa.String(length=64), nullable=False, comment='As of its example, which may change.'),
    sa.Column('model_id', sa.String(length=64), nullable=False, comment='The version whose promotion fixed the answer.'),
    sa.Column('prompt', sa.Text(), nullable=False, comment='Redacted, as history and expected.'),
    sa.Column('history', sa.JSON(), nullable=False, comment='Messages before the prompt.'),
    sa.Column('expected', sa.Text(), nullable=False, comment='The correction.'),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('loop', 'interaction_id', name=op.f('pk_regression_questions')),
    comment='Corrections that a promotion fixed. Asked while the example is what it was then.'
    )


def downgrade() -> None:
    op.drop_table('regression_questions')
