"""Pictures of a finished kernel, and a report on it."""

from lossk.report.page import write_report

__all__ = ["write_report"]
