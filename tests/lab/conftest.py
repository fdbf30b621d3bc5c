"""Fixtures."""

from tests.ui.conftest import trained_run

__all__ = ["trained_run"]
