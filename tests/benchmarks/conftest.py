"""The benchmarks run on the small pipeline that the models' tests use."""

from tests.models.conftest import tiny_pipeline

__all__ = ["tiny_pipeline"]
