"""Augmentation: the operations, the two views of an image, and the plain view of evaluation.

Other packages use `moco.data.augment.views`. Users add operations by
`moco.data.augment.operations.register_operation` and targets, and whole views by
`moco.data.augment.pipeline`.
"""
