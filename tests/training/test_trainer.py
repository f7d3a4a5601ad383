"""What the Trainer of every program takes from Lightning."""

import dataclasses

from moco.training.trainer import build_trainer


def test_lightning_still_has_the_private_methods_that_are_replaced(runner, tmp_path):
    settings = dataclasses.asdict(runner.config("trainer.max_steps=3").trainer)
    trainer = build_trainer(settings, tmp_path, [], [])
    fit_loop, epoch_loop = type(trainer.fit_loop), type(trainer.fit_loop.epoch_loop)
    # Lightning decides by this method whether max_steps makes an epoch unfinished.
    assert fit_loop._iteration_based_training(trainer.fit_loop) is True
    assert trainer.fit_loop._iteration_based_training() is False
    # Lightning calls this one in every step over several devices.
    assert callable(epoch_loop._broadcast_sigterm_tensor)
    assert "_broadcast_sigterm_tensor" in epoch_loop.advance.__code__.co_names
