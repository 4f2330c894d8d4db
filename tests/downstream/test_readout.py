"""Ridge readouts equal closed forms and find nothing in noise."""

import numpy as np
import pytest
import torch

from vjepa.evals.ridge import PENALTIES, Table, _fit, prior_score, ridge_score


def make_table(rows: int, width: int, seed: int = 0, clips: int | None = None) -> tuple[Table, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, width))
    y = x[:, :2] @ np.array([[1.0, 0.0], [0.0, -2.0]]) + 0.1 * draw.standard_normal((rows, 2))
    clip = np.arange(rows) if clips is None else np.arange(rows) * clips // rows
    return Table(torch.from_numpy(x).float(), y, clip), y


@pytest.mark.parametrize(("rows", "width"), [(80, 10), (10, 80)])
def test_both_decompositions_solve_the_ridge_equations(rows: int, width: int) -> None:
    table, y = make_table(rows, width)
    x = table.features.double()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    centred = torch.from_numpy(y - y.mean(0))
    for penalty, predict in zip(PENALTIES, _fit(table.features, y), strict=True):
        weight = torch.linalg.solve(z.T @ z + penalty * rows * torch.eye(width), z.T @ centred)
        torch.testing.assert_close(
            predict(table.features), z @ weight + torch.from_numpy(y.mean(0)), rtol=1e-6, atol=1e-6
        )


def test_a_linear_truth_is_found_and_noise_is_not() -> None:
    train, _ = make_table(300, 20, seed=1)
    test, _ = make_table(200, 20, seed=2)
    assert ridge_score(train, test, "number").value > 0.99
    draw = np.random.default_rng(3)
    lost = Table(torch.randn(300, 20, generator=torch.Generator().manual_seed(0)), train.target, train.clip)
    assert ridge_score(lost, test, "number").value < 0.05
    names = np.array(["disc", "ring"])
    by_sign = [Table(one.features, names[(one.features[:, 0] > 0).long().numpy()], one.clip) for one in (train, test)]
    assert ridge_score(by_sign[0], by_sign[1], "class").value > 0.9
    shuffled = Table(by_sign[0].features, draw.permutation(by_sign[0].target), train.clip)
    score = ridge_score(shuffled, by_sign[1], "class")
    assert score.low < 0.5 < score.high + 0.15


def test_the_prior_is_the_commonest_class_and_an_r2_of_zero() -> None:
    table, _ = make_table(90, 4)
    names = np.array(["a"] * 60 + ["b"] * 30)
    assert prior_score(
        Table(table.features, names, table.clip), Table(table.features, names, table.clip), "class"
    ).value == pytest.approx(2 / 3)
    test, _ = make_table(50, 4, seed=5)
    assert prior_score(table, test, "number").value == pytest.approx(0, abs=1e-12)


def test_the_interval_widens_when_rows_come_from_few_clips() -> None:
    train, _ = make_table(400, 8, seed=1)
    many, _ = make_table(400, 8, seed=2)
    # The error of a row is that of its clip, so 400 rows of 8 clips say no more than 8 rows.
    shift = np.random.default_rng(0).standard_normal(8)[np.arange(400) * 8 // 400][:, None]
    noisy = many.target + shift
    few = Table(many.features, noisy, np.arange(400) * 8 // 400)
    apart = Table(many.features, noisy, np.arange(400))
    wide, narrow = ridge_score(train, few, "number"), ridge_score(train, apart, "number")
    assert wide.value == pytest.approx(narrow.value)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_feature_that_never_changes_does_not_break_the_fit() -> None:
    train, _ = make_table(100, 5)
    dead = Table(torch.cat([train.features, torch.full((100, 1), 3.0)], 1), train.target, train.clip)
    assert ridge_score(dead, dead, "number").value > 0.99


def test_one_class_is_refused() -> None:
    table, _ = make_table(20, 3)
    with pytest.raises(ValueError, match="have the class"):
        ridge_score(Table(table.features, np.array(["a"] * 20), table.clip), table, "class")
