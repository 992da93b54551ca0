"""The exceptions lossk raises beyond ValueError and TypeError (which report a bad argument)."""

from __future__ import annotations


class LosskError(Exception):
    """Base class of the errors below."""


class DivergedError(LosskError):
    """A chain's loss became non-finite or exploded; the message names chain, step, loss and a smaller lr to try."""


class BackendError(LosskError):
    """An explicitly requested backend cannot run here; the message says why and lists those that can."""


class StoreError(LosskError):
    """A `.lossk` store is missing, incomplete, damaged, in use, or belongs to another run."""


class DistributedError(LosskError):
    """The processes of one run do not agree, or one of them has stopped; the message names it."""


class MissingPackageError(LosskError, ImportError):
    """An optional package is not installed; the message names the extra of lossk that installs it."""
