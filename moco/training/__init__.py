"""What a training needs besides the method: Trainer, optimizers, hardware, loggers, devices.

`trainer.build_trainer` puts it together. It knows nothing of callbacks, which are handed to it.
"""
