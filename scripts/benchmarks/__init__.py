"""The parts of `scripts/benchmark.py`.

There is one file for each subcommand and one for each peer. The others are shared.
"""
