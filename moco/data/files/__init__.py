"""Files on disk: lists of images, decoding, and archives, all of which may be damaged or hostile.

Other packages take `list_images` and `listed`, `encoded` and `encoded_file`, `header`,
`read_window`, `read_mask`, `read_arrays`, and the error `UnreadableImage`.
"""
