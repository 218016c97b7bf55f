"""`python -m benchmarks.tpu`, and what the TPU compiler says."""
