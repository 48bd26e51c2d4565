"""The law of upcycling: fitted to losses drawn from it, its constants and crossings come back."""

import numpy as np
import pytest

from upcycle_jax.planning import upcycling_law as law
from upcycle_jax.planning.upcycling_law import Curve, PowerLaw, UpcyclingLaw

TOKENS = np.geomspace(2e6, 4e7, 12)
DENSE = PowerLaw(30.0, 0.25, 1.2)
UPCYCLED = UpcyclingLaw(40.0, 0.06, 0.42, 0.012, 1.15)


def noisy(losses, seed, spread=2e-4):
    return losses * np.exp(spread * np.random.default_rng(seed).normal(size=losses.shape))


def test_the_published_constants_give_the_papers_example():
    # A parent of 1B parameters and 74B tokens has 2.25; 37B more tokens upcycled, 2.15.
    dense, upcycled, scratch = law.published(1e9)
    assert upcycled.loss(74e9, np.array([37e9]))[0] == pytest.approx(2.15, abs=0.01)
    assert dense.loss(np.array([74e9]))[0] == pytest.approx(2.25, abs=0.01)
    assert scratch.loss(np.array([1e12]))[0] < scratch.loss(np.array([1e11]))[0]


def test_a_dense_law_is_found_again():
    fitted = law.fit_power(
        [Curve(0.0, TOKENS, noisy(DENSE.loss(TOKENS), seed)) for seed in range(3)]
    )
    assert fitted.exponent == pytest.approx(DENSE.exponent, rel=0.05)
    assert fitted.floor == pytest.approx(DENSE.floor, rel=0.03)
    wide = np.geomspace(1e6, 1e8, 9)
    np.testing.assert_allclose(fitted.loss(wide), DENSE.loss(wide), rtol=0.01)


def test_parents_of_several_lengths_give_all_constants():
    curves = [
        Curve(parent, TOKENS, noisy(UPCYCLED.loss(parent, TOKENS), int(parent) % 97, 5e-5))
        for parent in (5e6, 2e7, 8e7)
        for _ in range(2)
    ]
    fitted = law.fit_upcycling(curves)
    assert fitted.interplay == pytest.approx(UPCYCLED.interplay, abs=0.004)
    assert fitted.parent_exponent == pytest.approx(UPCYCLED.parent_exponent, abs=0.06)
    assert fitted.exponent == pytest.approx(UPCYCLED.exponent, abs=0.06)
    for parent in (5e6, 4e7):
        assert fitted.slope(parent) == pytest.approx(UPCYCLED.slope(parent), abs=0.01)
        np.testing.assert_allclose(
            fitted.loss(parent, TOKENS), UPCYCLED.loss(parent, TOKENS), rtol=0.002
        )


def test_one_parent_gives_what_holds_for_it():
    fitted = law.fit_upcycling([Curve(2e7, TOKENS, UPCYCLED.loss(2e7, TOKENS))])
    assert (fitted.parent_exponent, fitted.interplay) == (0.0, 0.0)
    # ln 2e7 = 16.81: the exponent of D2 is -0.42 + 0.012 x 16.81 = -0.218.
    assert fitted.slope(2e7) == pytest.approx(-0.2183, abs=1e-3)


def test_crossings_by_hand():
    # 8 / D is below 2 from D = 4 on; below 1 + D / 8, which is 2 at D = 8, from there too.
    def falling(d):
        return 8 / d

    assert law.ahead(falling, lambda d: 2 + 0 * d, start=1, end=100) == (
        pytest.approx(4.0),
        float("inf"),
    )
    # Below 6 - D between 2 and 4: 8 = 6 D - D^2.
    begin, until = law.ahead(falling, lambda d: 6 - d, start=1, end=100)
    assert (begin, until) == (pytest.approx(2.0), pytest.approx(4.0))
    assert law.ahead(lambda d: 3 + 0 * d, lambda d: 2 + 0 * d, start=1, end=9)[0] == float("inf")
    assert law.ahead(falling, lambda d: 9 + 0 * d, start=1, end=9) == (1.0, float("inf"))


def test_too_few_losses_are_refused():
    with pytest.raises(ValueError, match="fitted to 3 losses: at least 4"):
        law.fit_power([Curve(0.0, TOKENS[:3], TOKENS[:3])])
