"""The run folder and what can happen to a run: files, lock, status, interrupts, failures, SLURM.

Other packages may take everything from here. Nothing here imports them, except `moco.errors`.
"""
