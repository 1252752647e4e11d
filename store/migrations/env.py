"""Alembic's entry point; always called by ``store.database.migrate`` with an open connection."""

from alembic import context

from store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite can't ALTER most things: the table is copied
    transactional_ddl=True,  # SQLite can, when we begin the transaction ourselves
)
context.run_migrations()
