"""What `scripts/gpu_check.py` measures: its rows and sizes, one file for each part, and what the parts share."""
