"""What commands that need no running server open: the database and the blob store, as the settings name them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.settings import Settings
from app.settings_sources import ConfigurationError, mask_password

if TYPE_CHECKING:
    from app.tenants import Tenants


def open_tenants(settings: Settings) -> Tenants:
    """The store of tenants and keys, its schema up to date. Raises ConfigurationError when there is no database."""
    from app.database import DatabaseTooNew, migrate, open_database
    from app.errors import DatabaseUnavailable
    from app.storage import default_limits
    from app.tenants import Tenants

    where = mask_password(settings.database_url)
    try:
        engine = open_database(settings.database_url)
        migrate(engine)
    except DatabaseTooNew as exc:
        raise ConfigurationError([f"{where}: {exc}"]) from exc
    except (DatabaseUnavailable, OSError) as exc:
        cause = exc.__cause__ or exc
        raise ConfigurationError([f"the database {where} cannot be opened: {_first_line(cause)}"]) from exc
    return Tenants(engine, defaults=default_limits(settings))


def _first_line(cause: BaseException) -> str:
    return str(getattr(cause, "orig", None) or cause).strip().partition("\n")[0]
