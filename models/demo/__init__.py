"""The demo model: a small HunyuanVideo DiT trained on procedural clips; its data, training and checkpoint."""
