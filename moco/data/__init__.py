"""Images from files to batches: `files`, `sources`, `augment`, `loading`, and packed copies.

`sources` imports `files`; `loading` imports all three others. This package imports no other
package of moco.
"""
