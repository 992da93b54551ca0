"""Files: whole, durable, checksummed, never through a link."""
