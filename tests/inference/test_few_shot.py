"""Least squares on features: against ridge solutions of NumPy, and by hand."""

import numpy as np
import pytest

from upcycle_jax.inference import few_shot


def ridge_scores(features, labels, classes, others, l2):
    """Scores of `others` by the normal equations."""
    mean, spread = features.mean(0), features.std(0) + 1e-5
    x = np.hstack([(features - mean) / spread, np.full((len(features), 1), 100.0)])
    y = 2 * np.eye(classes)[labels] - 1
    weights = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)
    return np.hstack([(others - mean) / spread, np.full((len(others), 1), 100.0)]) @ weights


@pytest.mark.parametrize(
    ("images", "width"),
    [(40, 6), (7, 6), (6, 6), (5, 30)],
    ids=["more images", "equal", "one image less", "more features"],
)
@pytest.mark.parametrize("l2", [1024.0, 2.0])
def test_it_is_the_ridge_solution(images, width, l2):
    rng = np.random.default_rng(images)
    features = rng.normal(2, 3, (images, width)).astype(np.float32)
    others = rng.normal(2, 3, (9, width)).astype(np.float32)
    labels = np.arange(images) % 4
    found = few_shot.fit(features, labels, 4, l2=l2)
    wanted = ridge_scores(features.astype(np.float64), labels, 4, others.astype(np.float64), l2)
    assert found.weights.shape == (width + 1, 4) and found.weights.dtype == np.float64
    np.testing.assert_allclose(found.scores(others), wanted, atol=1e-8)
    np.testing.assert_array_equal(found.classify(others), wanted.argmax(1))


def test_two_images_of_one_feature_by_hand():
    # Mean 1, deviation 1: X = [[-1, 100], [1, 100]], X'X = diag(2, 20000), Y = [[1, -1], [-1, 1]],
    # X'Y = [[-2, 2], [0, 0]]. With l2 = 2, W = [[-2, 2], [0, 0]] / 4.
    found = few_shot.fit(np.array([[0.0], [2.0]]), np.array([0, 1]), 2, l2=2)
    np.testing.assert_allclose(found.weights, [[-0.5, 0.5], [0, 0]], atol=1e-4)
    # 3 is whitened to 2: scores -1 and 1.
    np.testing.assert_allclose(found.scores(np.array([[3.0]])), [[-1, 1]], atol=1e-4)
    assert list(found.classify(np.array([[3.0], [0.9], [1.1]]))) == [1, 0, 1]


def test_more_features_than_images_by_hand():
    # X = [[-1, -1, 0, 100], [1, 1, 0, 100]]; XX' has the eigenvalues 20000 of (1, 1) and 4 of
    # (1, -1), along which Y lies: W = X'Y / (4 + l2) = [[-2, 2], [-2, 2], 0, 0] / 8.
    features = np.array([[0.0, 0, 5], [2, 2, 5]])
    found = few_shot.fit(features, np.array([0, 1]), 2, l2=4)
    wanted = [[-0.25, 0.25], [-0.25, 0.25], [0, 0], [0, 0]]
    np.testing.assert_allclose(found.weights, wanted, atol=1e-4)


def test_a_draw_takes_as_many_of_each_class_and_follows_its_seed():
    labels = np.array([0, 1, 2] * 5 + [1, 1])
    drawn = few_shot.draw(labels, 3, seed=1)
    assert np.bincount(labels[drawn]).tolist() == [3, 3, 3]
    np.testing.assert_array_equal(drawn, few_shot.draw(labels, 3, seed=1))
    assert (drawn != few_shot.draw(labels, 3, seed=2)).any()


def test_accuracy_counts_the_images_that_were_not_drawn():
    """Classes far apart are told apart; with labels that mean nothing a half is right."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    apart = rng.normal(0, 0.1, (400, 3)) + labels[:, None]
    assert few_shot.accuracy(apart, labels, shots=5, seed=0, l2=1.0) == 1
    noise = rng.normal(size=(400, 200))
    one = few_shot.accuracy(noise, labels, shots=5, seed=0)
    assert 0.4 < one < 0.6
    assert one == few_shot.accuracy(noise, labels, shots=5, seed=0)


def test_shots_of_one_split_classify_another():
    rng = np.random.default_rng(1)
    features, others = rng.normal(size=(12, 5)), rng.normal(size=(40, 5))
    labels, other_labels = np.arange(12) % 3, np.arange(40) % 3
    found = few_shot.share_right(features, labels, others, other_labels, l2=3.0)
    scores = ridge_scores(features, labels, 3, others, 3.0)
    assert found == np.mean(scores.argmax(1) == other_labels)


def test_what_cannot_be_drawn_or_fitted():
    labels = np.array([0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match="class 1 has 2 images, 3 shots are asked for: lower"):
        few_shot.draw(labels, 3, seed=0)
    with pytest.raises(ValueError, match="all 4 images are drawn"):
        few_shot.draw(labels[1:], 2, seed=0)
    with pytest.raises(ValueError, match="of class 2 are classified, and none of it is there"):
        few_shot.draw(labels, 2, seed=0, others=np.array([1, 2]))
    assert few_shot.draw(labels[1:], 2, seed=0, others=labels).all()
    features = np.ones((5, 2))
    with pytest.raises(ValueError, match="one label for each image"):
        few_shot.fit(features, labels[:4], 2)
    with pytest.raises(ValueError, match="labels are 0 to 1, of 1 classes"):
        few_shot.fit(features, labels, 1)
    with pytest.raises(ValueError, match="l2 is 0"):
        few_shot.fit(features, labels, 2, l2=0)
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        few_shot.fit(features, labels, 2)
