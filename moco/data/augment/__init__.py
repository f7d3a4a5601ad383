"""Augmentation: the operations, the two views of an image, and the plain view of evaluation.

Other packages use `moco.data.augment.views`. It imports nothing of this project except
`moco.errors`.
"""
