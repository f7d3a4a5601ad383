"""Evaluation of frozen features: arrays in, numbers out.

Others take `knn.knn_accuracy`, `neighbors.nearest` and `features.embed`, which accept any function
from images to features; `subject` and `measurements` are what ``moco.evaluate`` runs.
"""
