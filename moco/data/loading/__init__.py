"""From images to batches: loader processes, the order of an epoch, and two ways to read images.

`loaders`, `streams` and `iterables` serve training, `every_image` reads each image of a set once.
Other packages use these, `datamodule`, and from `workers` what loaders of their own need.
"""
