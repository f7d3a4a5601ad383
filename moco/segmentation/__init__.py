"""Semantic segmentation: images with masks, decoders on a backbone, the module to train, figures.

Others may take `build_segmentation_source` (mask_sources), `MaskedImages` (masked_images),
`LabelDraw` (label_draw), the loaders of `mask_batches`, `Segmenter` (segmenter), `SegmentationLoss`
(pixel_losses), `SegmentationData` (segmentation_data), `predicted_logits` and `predicted_classes`
(inference), and what is in `metrics`.
"""
