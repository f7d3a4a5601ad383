"""Networks: backbones under one contract, their heads, and the encoder that joins them.

Others take `build_backbone` from `moco.models.backbones`, and `Encoder` from `moco.models.encoder`.
A new backbone keeps the contract of `moco.models.contract`.
"""
