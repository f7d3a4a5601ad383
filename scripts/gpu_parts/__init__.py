"""What `scripts/gpu_check.py` measures: its rows, a file for each part, and what they share."""
