"""ledger: files are told apart by inode and ctime too, and by a hash of all that was read of them"""

import sqlalchemy as sa
from alembic import op

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Files known until now have neither inode nor ctime, so each counts as changed; and a hash that fits nothing, so it
    # is read again from its start. That finds what was rewritten in it unnoticed, and adds nothing twice.
    with op.batch_alter_table('ingested_files') as files:
        files.add_column(sa.Column('inode', sa.BigInteger(), nullable=True, comment='This and the next three: as stat said before it was last read.'))
        files.add_column(sa.Column('ctime_ns', sa.BigInteger(), nullable=True))
        files.add_column(sa.Column('prefix_hash', sa.String(length=64), nullable=False, server_default='', comment='SHA-256 of the bytes before offset.'))
        files.alter_column('size', existing_type=sa.BigInteger(), existing_nullable=False, comment=None, existing_comment='Bytes when last read to its end.')
        files.drop_column('tail_hash')
    with op.batch_alter_table('ingested_files') as files:
        files.alter_column('prefix_hash', existing_type=sa.String(length=64), existing_nullable=False, server_default=None, existing_comment='SHA-256 of the bytes before offset.')


def downgrade() -> None:
    raise NotImplementedError("how far files were read would be lost; restore a copy of the database from before instead")
