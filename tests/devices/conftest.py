"""What several devices sample is the small Wan pipeline of the models' tests."""

from tests.models.conftest import wan_pipeline

__all__ = ["wan_pipeline"]
