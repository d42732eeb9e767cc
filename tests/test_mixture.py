"""The pure parts of a search for a mixture: which runs are made, what is predicted from them, and the verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml

from train.config import SourceConfig
from train.mixture.design import (
    GRID_WEIGHTS,
    Point,
    Region,
    baselines,
    cap_shares,
    draw_levels,
    share_caps,
    tried_points,
)
from train.mixture.plots import draw_verdict
from train.mixture.regression import best_point, features, fit_ridge, leave_one_out, spearman
from train.mixture.verdict import judge, no_prediction, yaml_lines

NO_CAPS = np.ones(3)


def test_a_capped_share_is_divided_among_the_others() -> None:
    assert cap_shares(np.array([0.5, 0.3, 0.2]), np.ones(3)).tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert cap_shares(np.array([0.6, 0.3, 0.1]), np.array([0.2, 1, 1])).tolist() == pytest.approx([0.2, 0.6, 0.2])
    # 0.2 cut off from the first lifts the second above its own cap.
    assert cap_shares(np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 1])).tolist() == pytest.approx([0.2, 0.5, 0.3])
    assert cap_shares(np.array([0.9, 0.05, 0.05]), np.array([0.4, 0.3, 0.3])).tolist() == pytest.approx([0.4, 0.3, 0.3])


def test_the_cap_is_a_number_of_epochs() -> None:
    assert share_caps([100, 1000], 1000, 2).tolist() == [0.2, 1.0]
    assert share_caps([100, 1000], 1000, None).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="max_epochs is 2, but the sources hold 300 samples and the stage takes 1,000"):
        share_caps([100, 200], 1000, 2)


@pytest.mark.parametrize("method", ["dirichlet", "grid"])
def test_mixtures_are_different_and_within_their_caps(method: str) -> None:
    region = Region(method, np.array([0.2, 1.0, 0.5]), seed=3)
    assert region.equal.tolist() == pytest.approx([0.2, 0.4, 0.4])
    mixtures = np.stack(region.mixtures(40))
    assert (mixtures <= np.array([0.2, 1.0, 0.5]) + 1e-9).all() and (mixtures > 0).all()
    assert mixtures.sum(1) == pytest.approx(np.ones(40))
    assert len({tuple(row) for row in mixtures.round(9).tolist()}) == 40
    assert (region.candidates() <= np.array([0.2, 1.0, 0.5]) + 1e-9).all()


def test_random_mixtures_are_around_equal_shares() -> None:
    mixtures = np.stack(Region("dirichlet", NO_CAPS, seed=0).mixtures(400))
    assert mixtures.mean(0) == pytest.approx([1 / 3] * 3, abs=0.04)
    assert mixtures.min() >= 1 / 64 / 3 / 1.02 and mixtures.max() > 0.9, "they reach the corners"
    other = np.stack(Region("dirichlet", NO_CAPS, seed=1).mixtures(400))
    assert not np.allclose(mixtures, other)


def test_the_grid_has_the_weights_of_yi() -> None:
    for shares in Region("grid", NO_CAPS, seed=0).mixtures(30):
        powers = np.log2(shares / shares.max())
        assert powers == pytest.approx(powers.round(), abs=1e-9) and powers.min() >= -6
    assert GRID_WEIGHTS == (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
    assert len(Region("grid", np.ones(2), seed=0).mixtures(12)) == 12, "13 ratios of two sources; one is equal shares"
    with pytest.raises(ValueError, match=r"search\.budget is 13, but no more than 12 different mixtures"):
        Region("grid", np.ones(2), seed=0).mixtures(13)


def test_a_larger_budget_begins_with_the_same_runs() -> None:
    region = Region("dirichlet", NO_CAPS, seed=5)
    few, many = (tried_points(region, [2, 3], number, seed=5) for number in (7, 20))
    assert many[:7] == few
    stored = [Point((0.2, 0.3, 0.5), (1, 0))]
    assert tried_points(region, [2, 3], 7, 5, stored) == [*stored, *few[1:]]
    assert tried_points(region, [2, 3], 1, 5, few) == few[:1]


def test_every_value_of_a_setting_is_taken_as_often() -> None:
    levels = draw_levels([2, 3], 12, seed=0)
    assert [sorted(setting) for setting in zip(*levels)] == [[0] * 6 + [1] * 6, [0] * 4 + [1] * 4 + [2] * 4]
    assert len(set(levels)) > 3, "settings are drawn apart"
    assert draw_levels([], 3, seed=0) == [(), (), ()]


def test_baselines_are_made_once() -> None:
    region = Region("dirichlet", NO_CAPS, seed=0)
    named = baselines(region, sizes=[100, 100, 200], present=[1, 1, 6], num_levels=1)
    assert {name: point.shares for name, point in named.items()} == {
        "equal": pytest.approx((1 / 3, 1 / 3, 1 / 3)),
        "size": (0.25, 0.25, 0.5),
        "present": (0.125, 0.125, 0.75),
    }
    assert all(point.levels == (0,) for point in named.values())
    assert list(baselines(region, [5, 5, 5], [2, 2, 4], 0)) == ["equal", "present"]


# By hand: ranks 1 2 3 4 5 against 2 1 4 3 5, sum of squared differences 4: 1 - 6*4 / (5*24) = 0.8.
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4, 5], [20, 10, 40, 30, 500], 0.8),
        ([1, 2, 3], [9, 4, 1], -1.0),
        ([1, 2, 3, 4], [1, 8, 27, 64], 1.0),
        ([1, 1, 2, 3], [1, 2, 3, 4], 9 / math.sqrt(90)),  # ranks 1.5 1.5 3 4: covariance 4.5, variances 4.5 and 5
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_the_rank_correlation(first: list[float], second: list[float], expected: float | None) -> None:
    correlation = spearman(first, second)
    assert correlation is None if expected is None else correlation == pytest.approx(expected)


def known_loss(points: list[Point], noise: float = 0.0) -> np.ndarray:
    """Lowest at shares 0.5, 0.3, 0.2 and the second value of the setting."""
    generator = np.random.default_rng(0)
    losses = [
        2 - 0.05 * math.log(a) - 0.03 * math.log(b) - 0.02 * math.log(c) - 0.04 * (point.levels == (1,))
        for point in points
        for a, b, c in [point.shares]
    ]
    return np.array(losses) + noise * generator.standard_normal(len(losses))


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_the_regression_finds_a_known_optimum(noise: float) -> None:
    region = Region("dirichlet", NO_CAPS, seed=0)
    points = tried_points(region, [3], 40, seed=0)
    inputs, targets = features(points, [3]), known_loss(points, noise)
    assert inputs.shape == (40, 5)
    model = fit_ridge(inputs, targets)
    assert model.coefficients == pytest.approx([-0.05, -0.03, -0.02, -0.04, 0], abs=0.001 + noise)
    best = best_point(model, region.candidates(), [3])
    assert best.shares == pytest.approx([0.5, 0.3, 0.2], abs=0.02 + 20 * noise) and best.levels == (1,)
    correlation = spearman(targets, leave_one_out(inputs, targets))
    assert correlation is not None and correlation > 0.95


def test_a_run_is_predicted_without_itself() -> None:
    points = tried_points(Region("dirichlet", NO_CAPS, seed=0), [], 12, seed=0)
    inputs, targets = features(points, []), known_loss(points)
    before = leave_one_out(inputs, targets)
    changed = targets.copy()
    changed[4] += 100
    after = leave_one_out(inputs, changed)
    assert after[4] == before[4] and not np.isclose(after, before)[np.arange(12) != 4].any()
    kept = np.arange(12) != 4
    assert before[4] == pytest.approx(fit_ridge(inputs[kept], targets[kept]).predict(inputs[[4]])[0])


def error_without_each_run(inputs: np.ndarray, targets: np.ndarray, penalty: float) -> float:
    """By solving the normal equations once for each run, the intercept among the unknowns."""
    scaled = (inputs - inputs.mean(0)) / inputs.std(0)
    design = np.column_stack([np.ones(len(targets)), scaled])
    shrinkage = penalty * len(targets) * np.diag([0.0, *np.ones(inputs.shape[1])])
    errors = []
    for index in range(len(targets)):
        kept = np.arange(len(targets)) != index
        normal = design[kept].T @ design[kept] + shrinkage
        errors.append(targets[index] - design[index] @ np.linalg.solve(normal, design[kept].T @ targets[kept]))
    return float(np.mean(np.array(errors) ** 2))


def test_the_penalty_is_the_best_of_leaving_one_out() -> None:
    generator = np.random.default_rng(2)
    chosen = set()
    for _ in range(50):
        inputs = generator.standard_normal((6, 3)) * [1, 10, 0.1] + 5
        targets = inputs @ np.array([1.0, -0.2, 5]) + generator.standard_normal(6)
        errors = {10.0**power: error_without_each_run(inputs, targets, 10.0**power) for power in range(-3, 3)}
        penalty = fit_ridge(inputs, targets).penalty
        assert penalty == pytest.approx(min(errors, key=lambda penalty: errors[penalty]))
        chosen.add(penalty)
    assert len(chosen) > 3, "noisy data are shrunk more"


def test_noise_has_no_answer() -> None:
    generator = np.random.default_rng(0)
    points = tried_points(Region("dirichlet", NO_CAPS, seed=0), [], 24, seed=0)
    targets = generator.standard_normal(24)
    verdict = no_prediction(spearman(targets, leave_one_out(features(points, []), targets)), 24)
    assert verdict is not None and not verdict.is_recommended
    assert verdict.reason.startswith("keep equal shares: ") and "below 0.5" in verdict.reason
    assert no_prediction(0.5, 24) is None
    assert no_prediction(None, 24) is not None


def test_only_a_gain_of_two_standard_errors_is_recommended() -> None:
    # Gains of 0.01, 0.03 and 0.05: their variance is 0.0004, so the standard error is sqrt(0.0004 / 3) = 0.01155. The
    # seeds themselves differ by far more, which is no doubt about the mixture.
    equal = [1.00, 1.20, 1.40]
    clear, small = judge(equal, [0.99, 1.17, 1.35]), judge(equal, [1.00, 1.18, 1.36])
    assert clear.is_recommended and clear.gain == pytest.approx(0.03)
    assert clear.standard_error == pytest.approx(math.sqrt(0.0004 / 3))
    assert "lower by 0.0300" in clear.reason and "more than two of them" in clear.reason
    assert (
        not small.is_recommended and small.reason.startswith("keep equal shares") and small.gain == pytest.approx(0.02)
    )
    worse = judge(equal, [1.1, 1.3, 1.5])
    assert not worse.is_recommended and "higher by" in worse.reason
    assert not judge(equal, equal).is_recommended
    assert "diverged" in judge(equal, [0.5, 0.5, None]).reason
    assert "diverged" in judge([None, 1.0], [0.5, 0.5]).reason


def test_the_plot_of_the_verdict_joins_the_runs_of_one_seed() -> None:
    def seeds_joined(losses: dict[str, list[float | None]]) -> list[list[float]]:
        runs = [
            {"name": f"verdict-{name}-seed-{seed}", "loss": loss}
            for name, of_seeds in losses.items()
            for seed, loss in enumerate(of_seeds)
        ]
        (axes,) = draw_verdict({"runs": runs}).axes
        return [list(line.get_ydata()) for line in axes.lines if line.get_color() == "grey"]

    assert sorted(seeds_joined({"equal": [1.0, 1.2, None], "best-of-9": [0.9, 1.3, 1.4]})) == [[1.0, 0.9], [1.2, 1.3]]
    assert seeds_joined({"equal": [None, None], "best-of-9": [None, None]}) == []  # all diverged: an empty plot


def test_the_printed_lines_are_yaml_of_a_training_config() -> None:
    sources = [SourceConfig("a b", "data/a/*.tar", 1.0, 50), SourceConfig("b", "s3::{0..9}.tar", 1.0, format="chat")]
    shares = {"a b": 0.123456, "b": 0.876544}
    text = yaml_lines(
        sources, shares, {"lr.language": 1e-5, "neftune": None, "data.shuffle_buffer": 5, "lr.vision": 1.0}
    )
    assert yaml.safe_load(text) == {
        "lr": {"language": 1e-5, "vision": 1.0},
        "neftune": None,
        "data": {
            "shuffle_buffer": 5,
            "sources": [
                {"name": "a b", "shards": "data/a/*.tar", "weight": 0.1235, "max_samples": 50},
                {"name": "b", "shards": "s3::{0..9}.tar", "weight": 0.8765, "format": "chat"},
            ],
        },
    }
