import numpy as np
import pytest

from exflow.errors import InputError
from exflow.placement.solve import baselines


def test_contiguous_is_what_engines_do() -> None:
    assert baselines.contiguous(2, 6, 3).tolist() == [[0, 0, 1, 1, 2, 2]] * 2


def test_random_shares_every_layer_equally_and_anew() -> None:
    ranks = baselines.random(50, 16, 4, seed=0)
    assert all(np.bincount(layer).tolist() == [4, 4, 4, 4] for layer in ranks)
    assert len({tuple(layer) for layer in ranks.tolist()}) == 50


def test_random_is_the_same_for_the_same_seed_alone() -> None:
    placements = [baselines.random(4, 16, 4, seed).tolist() for seed in (7, 7, 8)]
    assert placements[0] == placements[1] != placements[2]


def test_unequal_shares_are_refused_with_the_numbers() -> None:
    message = (
        "10 experts cannot be shared equally by 4 ranks; "
        "choose a number of ranks that divides the number of experts"
    )
    with pytest.raises(InputError) as error:
        baselines.contiguous(1, 10, 4)
    assert str(error.value) == message
    with pytest.raises(InputError) as error:
        baselines.random(1, 10, 4, seed=0)
    assert str(error.value) == message
