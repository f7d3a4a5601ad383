import numpy as np
import pytest
import torch
from scipy import stats

from moco.data.augment.draws import GOLDEN_GAMMA, derived_seed, draws_from, splitmix64, uniforms


def test_the_hash_is_splitmix64():
    """The published first outputs from the state 1234567, as in the test suite of the JDK."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = torch.tensor(1234567) + torch.arange(1, 6) * GOLDEN_GAMMA
    assert [number % 2**64 for number in splitmix64(states).tolist()] == published


def test_the_numbers_are_those_of_earlier_versions():
    """Recorded from the first version: a run that resumes has to draw what it would have drawn."""
    numbers = uniforms(3, 2, torch.tensor([0, 7]), 1, 3)
    recorded = [
        [0.5648956883326824, 0.9809630266028467, 0.7105254765933608],
        [0.9313729155223169, 0.13317816368797486, 0.6710625307454882],
    ]
    assert numbers.tolist() == recorded


def test_numbers_of_an_image_do_not_depend_on_the_others():
    together = uniforms(1, 2, torch.arange(100), 0, 30)
    for index in range(100):
        alone = uniforms(1, 2, torch.tensor([index]), 0, 30)
        assert torch.equal(together[index], alone[0])
    assert torch.equal(uniforms(1, 2, torch.arange(100), 0, 7), together[:, :7])


def test_numbers_are_uniform_and_unrelated():
    numbers = uniforms(0, 0, torch.arange(4000), 0, 25).numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    # Neighbours in every direction.
    others = {
        "image": (numbers[:-1], numbers[1:]),
        "draw": (numbers[:, :-1], numbers[:, 1:]),
        "epoch": (numbers, uniforms(0, 1, torch.arange(4000), 0, 25).numpy()),
        "view": (numbers, uniforms(0, 0, torch.arange(4000), 1, 25).numpy()),
        "seed": (numbers, uniforms(1, 0, torch.arange(4000), 0, 25).numpy()),
    }
    for name, (one, other) in others.items():
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(one.size), name


def test_no_two_images_share_their_numbers():
    numbers = []
    for epoch in range(3):
        for view in range(2):
            numbers.append(uniforms(7, epoch, torch.arange(20_000), view, 1))
    together = torch.cat(numbers)
    assert len(together.unique()) == together.numel()


def test_the_global_generator_is_left_as_it_was():
    state = torch.get_rng_state()
    uniforms(0, 0, torch.arange(3), 0, 3)
    with pytest.raises(KeyError), draws_from(1):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_derived_seeds_of_neighbouring_numbers_differ():
    seeds = {derived_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
