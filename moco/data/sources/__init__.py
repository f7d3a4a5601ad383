"""Where images come from: one file for each kind of source.

Other packages take `build_source` from `registry`, `dataset_source` from `own_dataset`, and the
contract from `source`: `DataSource`, `Images`, `Labelled`, `ArrayImages` and `FileImages`.
"""
