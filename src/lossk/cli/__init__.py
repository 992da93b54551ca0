"""The `lossk` command: reads options and configs, calls the library, prints."""
