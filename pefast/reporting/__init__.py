"""The report of a run: report.json, and report.html, which shows the same and needs nothing else."""

from .facts import REPORT, collect, read, trained
from .page import finish, page, write

__all__ = ["REPORT", "collect", "finish", "page", "read", "trained", "write"]
