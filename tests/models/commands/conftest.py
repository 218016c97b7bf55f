"""Commands with the slow parts replaced."""

from tests.models.commands.fakes import fakes

__all__ = ["fakes"]
