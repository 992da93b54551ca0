"""Pictures of a finished kernel."""
