"""No tables. With this module the app takes part in migrations, as the last one: ``roles`` runs after all permissions exist."""
