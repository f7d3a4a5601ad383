"""Lightning callbacks: what a training measures, plots, warns of and saves while it runs.

A module is one callback, or several that share a measurement. They take their numbers and plots
from `moco.evaluation` and only decide when to measure and where the result goes. Programs take the
callback classes; the rest is for this package.
"""
