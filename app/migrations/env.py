"""Alembic's entry: runs the migrations on the connection that `app.database.migrate` opened, in its transaction.

For a developer's `alembic revision --autogenerate`, import the modules that declare tables here.
"""

from alembic import context

from app.database import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite cannot alter most things in place
)
with context.begin_transaction():
    context.run_migrations()
