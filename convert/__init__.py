"""PyTorch checkpoint -> orbax; run as `python -m convert SRC DST`."""
