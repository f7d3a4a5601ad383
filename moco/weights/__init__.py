"""Files of weights: reading anyone's, starting a run from them, and exporting a backbone.

Other packages take `loading.load_pretrained`, `init_from.start_from`, the functions of
`backbone_files`, and `to_...` and `from_...` of `library_names`.
"""
