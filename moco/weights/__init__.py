"""Files of weights: reading anyone's, starting a run from them, and exporting a backbone.

Other packages take `load_encoder.load_pretrained`, `load_segmenter.load_fine_tuned`,
`init_from.start_from`, `backbone_files`, `exporting`, and `to_...` of `library_names`.
"""
