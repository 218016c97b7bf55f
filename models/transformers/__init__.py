"""The ports of the transformers, one file a model."""
