"""Statistics against published values and hand-computed ones."""

import numpy as np
import pytest

from mogan.survey import statistics as st

MISSING = 0
KRIPPENDORFF = [  # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", four observers, twelve units
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def published_table() -> np.ndarray:
    units, values = zip(*[(u, v) for row in KRIPPENDORFF for u, v in enumerate(row) if v != MISSING], strict=True)
    return st.ratings_table(np.array(units), np.array(values), (1, 2, 3, 4, 5))


def test_alpha_has_krippendorffs_published_values():
    assert st.krippendorff_alpha(published_table()) == pytest.approx(0.743, abs=5e-4)
    assert st.krippendorff_alpha(published_table(), ordinal=True) == pytest.approx(0.815, abs=5e-4)


def test_ac1_has_gwets_published_values():
    # irrCAC (Gwet), raw4raters, the same table: AC1 .77544, percent agreement .81818.
    assert st.gwet_ac1(published_table()) == pytest.approx(0.77544, abs=5e-6)
    assert st.raw_agreement(published_table()) == pytest.approx(0.81818, abs=5e-6)
    # Gwet (2002): two raters, 118 both positive, 5 + 2 split, none both negative; kappa would be -0.023.
    assert st.gwet_ac1(np.array([[2, 0]] * 118 + [[1, 1]] * 7)) == pytest.approx(0.941, abs=5e-4)


def test_identical_raters_agree_perfectly_and_random_ones_not_at_all():
    generator = np.random.default_rng(0)
    outcomes = generator.choice([1, 0, -1], 200)
    same = st.ratings_table(np.repeat(np.arange(200), 5), np.repeat(outcomes, 5))
    random = st.ratings_table(np.repeat(np.arange(2000), 5), generator.choice([1, 0, -1], 10_000))
    for alpha in (st.krippendorff_alpha, lambda t: st.krippendorff_alpha(t, ordinal=True), st.gwet_ac1):
        assert alpha(same) == pytest.approx(1)
        assert alpha(random) == pytest.approx(0, abs=0.03)


def test_agreement_of_nothing_rated_twice_is_undefined():
    table = st.ratings_table(np.arange(4), np.array([1, 0, -1, 1]))
    assert np.isnan(st.krippendorff_alpha(table))
    assert np.isnan(st.gwet_ac1(table))
    assert st.krippendorff_alpha(st.ratings_table(np.array([0, 0, 1, 1]), np.zeros(4, dtype=int))) == 1


def test_two_systems_without_ties_have_log_odds_of_wins():
    fitted = st.davidson(np.array([[0, 30], [10, 0]]), np.zeros((2, 2)))
    assert fitted.strength[0] - fitted.strength[1] == pytest.approx(np.log(30 / 10), abs=5e-3)


def test_two_systems_with_ties_have_davidsons_closed_form():
    fitted = st.davidson(np.array([[0, 30], [10, 0]]), np.array([[0, 20], [20, 0]]))
    assert fitted.strength[0] - fitted.strength[1] == pytest.approx(np.log(3), abs=5e-3)
    assert fitted.tie == pytest.approx(np.log(20 / np.sqrt(30 * 10)), abs=5e-3)


def test_davidson_recovers_strengths_from_exact_shares():
    strength, nu = np.exp([0.7, 0.1, -0.8]), 0.6
    both = np.sqrt(np.outer(strength, strength))
    total = strength[:, None] + strength[None, :] + nu * both
    off = 1 - np.eye(3)
    fitted = st.davidson(1e5 * off * strength[:, None] / total, 1e5 * off * nu * both / total)
    assert fitted.strength == pytest.approx([0.7, 0.1, -0.8], abs=1e-4)
    assert np.exp(fitted.tie) == pytest.approx(nu, abs=1e-4)


def test_a_system_that_never_lost_gets_a_finite_strength():
    wins = np.array([[0, 9, 9], [0, 0, 5], [0, 4, 0]])
    fitted = st.davidson(wins, np.zeros((3, 3)))
    assert np.isfinite(fitted.strength).all()
    assert fitted.strength.argmax() == 0
    many = st.davidson(np.stack([wins, wins.T]), np.zeros((2, 3, 3)))  # many at once are the same as one by one
    assert many.strength[0] == pytest.approx(fitted.strength, abs=1e-6)
    assert many.strength[1].argmin() == 0


def crossed(prompts: int, raters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every rater judges every prompt; answers depend on the prompt."""
    generator = np.random.default_rng(seed)
    lean = generator.normal(0.2, 0.6, prompts)
    votes = np.sign(np.round(lean[:, None] + generator.normal(0, 0.5, (prompts, raters)), 0)).astype(int)
    p, r = np.meshgrid(np.arange(prompts), np.arange(raters), indexing="ij")
    return votes.ravel(), p.ravel(), r.ravel()


def net(outcomes, prompts, raters, draws=3000):
    weights = st.bootstrap_weights(prompts, raters, draws, np.random.default_rng(1))
    share = st.shares(outcomes, weights)
    return share[:, 0] - share[:, 2]


def test_copying_every_answer_does_not_narrow_the_cluster_interval_but_the_independent_one():
    outcomes, prompts, _ = crossed(60, 1)
    alone = net(outcomes, prompts, np.zeros(60))
    copied = net(np.repeat(outcomes, 5), np.repeat(prompts, 5), np.tile(np.arange(5), 60))
    assert np.std(copied) == pytest.approx(np.std(alone), rel=0.05)
    generator = np.random.default_rng(0)
    wide, narrow = (
        np.ptp(st.dirichlet_interval(o, generator), axis=0)[0] for o in (np.tile(outcomes, 10), np.tile(outcomes, 50))
    )
    assert wide / narrow == pytest.approx(np.sqrt(5), rel=0.05)


def test_the_bootstrap_covers_the_truth():
    # Prompts carry a shared effect, so independent intervals are too narrow and cover far less.
    hits = naive = 0
    for seed in range(120):
        generator = np.random.default_rng(seed)
        p_win = generator.beta(2, 2, 40)
        outcomes = np.where(generator.random((40, 5)) < p_win[:, None], 1, -1).ravel()
        values = net(outcomes, np.repeat(np.arange(40), 5), np.tile(np.arange(5), 40), 400)
        low, high = st.interval(values)
        hits += low <= 0 <= high
        error = 1.96 * outcomes.std() / np.sqrt(200)
        naive += abs(outcomes.mean()) <= error
    assert hits / 120 > 0.9
    assert naive / 120 < 0.87


def test_all_ties_have_margin_zero_with_a_defined_interval():
    outcomes = np.zeros(30, dtype=int)
    values = net(outcomes, np.repeat(np.arange(10), 3), np.tile(np.arange(3), 10), 200)
    assert st.interval(values).tolist() == [0, 0]
    assert st.shares(outcomes).tolist() == [0, 1, 0]


def test_detectable_preference_matches_planning_numbers():
    # 15 % ties, 5 raters, correlation 0.3, 80 % power.
    assert [round(100 * st.detectable(n, 5)) for n in (127, 290, 1170)] == [15, 10, 5]


def test_sign_test_and_holm_by_hand():
    assert st.sign_test(9, 1) == pytest.approx(2 * 11 / 1024)
    assert st.sign_test(0, 0) == 1
    assert st.sign_test(5, 5) == 1
    assert st.sign_test(60_000, 58_000) == pytest.approx(5.8e-9, rel=0.02)  # at once; by the normal law, 5.8 deviations
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
