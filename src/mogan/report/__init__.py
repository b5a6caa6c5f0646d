"""Results and runs as one page that needs no network: :func:`report`."""

from mogan.report.page import report

__all__ = ["report"]
