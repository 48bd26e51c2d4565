"""Few-shot classification by regularised least squares on features, as V-MoE and big_vision
evaluate (evaluate/fewshot.py of google-research/vmoe). NumPy alone, float64.

Axis legend: N images to fit on, M to classify, d features, D = d + 1 with the constant, K classes.
"""

import dataclasses

import numpy as np

L2 = 1024.0
CONSTANT = 100.0
"""The column that stands for a bias: so large that L2 hardly shrinks its weights."""
_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """A fitted classifier.

    Attributes:
      mean: float64 `[d]`, of the features it was fitted on.
      spread: float64 `[d]`, their standard deviation + 1e-5.
      weights: float64 `[D, K]`, the constant's in the last row.
    """

    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Float64 `[M, K]` of features `[M, d]`: near 1 for the class, near -1 for the others."""
        return _whitened(features, self.mean, self.spread) @ self.weights

    def classify(self, features: np.ndarray) -> np.ndarray:
        """Int64 `[M]`, the class with the highest score; the first of equal ones."""
        return np.argmax(self.scores(features), axis=1)


def fit(
    features: np.ndarray, labels: np.ndarray, num_classes: int, *, l2: float = L2
) -> LeastSquares:
    """The weights W that minimise |X W - Y|^2 + l2 |W|^2, where X are whitened features with a
    constant and Y is 1 for an image's class and -1 for all others.

    One eigendecomposition of the smaller of X'X [D, D] and XX' [N, N].

    Args:
      features: `[N, d]`.
      labels: int `[N]`, below `num_classes`.
      num_classes: K.
      l2: above 0.

    Raises:
      ValueError: no image, features that are not finite, a label out of range, or l2 <= 0.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if not len(features) or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features have the shape {list(features.shape)}, labels {list(labels.shape)}: one"
            " label for each image, and at least one image"
        )
    if not np.isfinite(features).all():
        raise ValueError("features are NaN or infinite: the checkpoint is damaged, or diverged")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, of {num_classes} classes")
    if not l2 > 0:
        raise ValueError(f"l2 is {l2}: it must be above 0")
    mean, spread = features.mean(axis=0), features.std(axis=0) + _EPSILON
    x = _whitened(features, mean, spread)  # [N, D]
    y = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)  # [N, K]
    if len(x) >= x.shape[1]:
        eigenvalues, q = np.linalg.eigh(x.T @ x)  # [D], [D, D]
        left, right = q, q.T @ (x.T @ y)  # [D, D], [D, K]
    else:
        eigenvalues, q = np.linalg.eigh(x @ x.T)  # [N], [N, N]
        left, right = x.T @ q, q.T @ y  # [D, N], [N, K]
    return LeastSquares(mean, spread, (left / (eigenvalues + l2)) @ right)


def draw(
    labels: np.ndarray, shots: int, seed: int, *, others: np.ndarray | None = None
) -> np.ndarray:
    """Bool `[N]`: `shots` images of each class, drawn without replacement.

    Args:
      labels: int `[N]`; the classes are those that occur.
      shots: images of each class.
      seed: of the draw.
      others: int `[M]`, labels of what is classified; None: of the images that are not drawn.

    Raises:
      ValueError: a class has fewer images, none is left to evaluate on, or something to classify is
        of a class without images.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        if len(mine) < shots:
            raise ValueError(
                f"class {label} has {len(mine)} images, {shots} shots are asked for: lower SHOTS,"
                " or take more views of each image (VIEWS)"
            )
        drawn[rng.permutation(mine)[:shots]] = True
    if others is None and drawn.all():
        raise ValueError(
            f"all {len(labels)} images are drawn as shots, none is left to evaluate on: lower"
            " SHOTS, or take more views of each image (VIEWS)"
        )
    unknown = np.setdiff1d([] if others is None else others, labels)
    if len(unknown):
        raise ValueError(
            f"images of class {int(unknown[0])} are classified, and none of it is there to learn"
            " from: name a SHOTS_SPLIT with all classes of EVAL_SPLIT"
        )
    return drawn


def accuracy(
    features: np.ndarray, labels: np.ndarray, *, shots: int, seed: int, l2: float = L2
) -> float:
    """The share of images classified rightly by what `shots` of each class teach; those are not
    counted.

    Args:
      features: `[N, d]`.
      labels: int `[N]`, below the number of classes, all of which occur.
      shots: images of each class to fit on.
      seed: of the draw.
      l2: see `fit`.

    Raises:
      ValueError: see `draw` and `fit`.
    """
    drawn = draw(labels, shots, seed)
    return share_right(features[drawn], labels[drawn], features[~drawn], labels[~drawn], l2=l2)


def share_right(
    features: np.ndarray,
    labels: np.ndarray,
    others: np.ndarray,
    other_labels: np.ndarray,
    *,
    l2: float = L2,
) -> float:
    """The share of other images that is classified rightly.

    Args:
      features: `[N, d]`, of the images to fit on.
      labels: int `[N]`, below the number of classes.
      others: `[M, d]`, of the images to classify.
      other_labels: int `[M]`, each of which is one of `labels`.
      l2: see `fit`.

    Raises:
      ValueError: see `fit`.
    """
    fitted = fit(features, labels, int(labels.max()) + 1, l2=l2)
    return float(np.mean(fitted.classify(others) == other_labels))


def _whitened(features: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Float64 `[N, D]`."""
    x = (np.asarray(features, np.float64) - mean) / spread
    return np.pad(x, ((0, 0), (0, 1)), constant_values=CONSTANT)
