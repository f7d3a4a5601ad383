"""The run folder and what happens to a run: files, lock, progress, interrupts, failures, SLURM.

Other packages may take everything from here. Nothing here imports them, except `moco.errors`.
"""
