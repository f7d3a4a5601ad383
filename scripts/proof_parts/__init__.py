"""The parts of `scripts/segmentation_proof.py`: the grid, its data, its runs, and the tables."""
