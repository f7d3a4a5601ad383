"""The MoCo family: losses, queue, momentum update, BatchNorm modes, and the module that joins them.

Others take `moco.methods.moco.MoCo`, the losses, `KeyQueue` and `update_key_encoder`.
"""
