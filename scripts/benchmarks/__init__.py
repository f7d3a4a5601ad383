"""What `scripts/benchmark.py` measures: one file for each subcommand, one for each peer, and what they share."""
