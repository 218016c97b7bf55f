"""`python -m benchmarks.devices`, and what compilers and paper say of machines that are not there."""
