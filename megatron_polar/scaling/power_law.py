"""Power laws of loss, fitted in log space, and intervals from resampled residuals. numpy and scipy only.

Notation: n runs, k variables, p parameters of a law, r replicates. A law is a sum of power terms and a floor,

    L(x) = sum_j exp(a_j) x_j^-alpha_j + exp(e),

with theta = (a_1 .. a_k, alpha_1 .. alpha_k, e). Without a floor and with one variable it is a straight line in
log-log, theta = (a, alpha), as the paper fits it (arXiv 2507.05197, section 4.4). With a floor and two variables it is
the law of Hoffmann et al. (arXiv 2203.15556, section 3.3), in the same parametrisation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import optimize, stats

SMALLEST_HUBER_DELTA = 1e-3
"""Of residuals of log loss in the joint law: what deviates more counts linearly. Hoffmann et al. (appendix D.3) take it
as it is. Where runs scatter by 1 %, as small ones do, nearly all residuals are beyond it, the fit becomes one of
absolute deviations, exponents scatter more and intervals are too narrow (benchmarks/fit_known_laws.md); so it grows
with the scatter."""
_HUBER_SIGMAS = 1.345
"""Where Huber's loss keeps 95 % of least squares' efficiency on normal residuals (Huber, Robust Statistics, 1981)."""
_FIRST_HUBER_DELTA = 0.03
LEVEL = 0.95
_LARGEST_EXPONENT = 5.0
_MOST_EVALUATIONS = 200
_LARGEST_SHARE = 0.998
"""Of the floor in the loss."""
_LOWEST_FLOOR = 1e-6
"""Of the lowest loss: below it the floor is none."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Law:
    """A form of law: how many power terms, whether a floor, and where Huber's loss becomes linear (None: nowhere)."""

    num_variables: int
    has_floor: bool = False
    huber_delta: float | None = None

    @property
    def num_parameters(self) -> int:
        return 2 * self.num_variables + self.has_floor

    def log_loss(self, theta: np.ndarray, log_x: np.ndarray) -> np.ndarray:
        """log L at log_x [n, k] -> [n]."""
        return np.logaddexp.reduce(self._terms(theta, log_x), axis=1)

    def _terms(self, theta: np.ndarray, log_x: np.ndarray) -> np.ndarray:
        """Logarithms of the terms, [n, k] or [n, k + 1] with the floor."""
        k = self.num_variables
        terms = theta[:k] - theta[k : 2 * k] * log_x
        return np.column_stack([terms, np.full(len(log_x), theta[-1])]) if self.has_floor else terms

    def fit(self, log_x: np.ndarray, log_loss: np.ndarray, *, start: np.ndarray | None = None) -> np.ndarray:
        """theta [p] with the least sum of squared (or Huber's) residuals of log loss.

        `start`: begin there instead of at several places.
        """
        if not self.has_floor:
            return _straight_line(log_x[:, 0], log_loss)
        centre = log_x.mean(axis=0)
        starts = [_shift(start, centre)] if start is not None else _starts(self.num_variables, log_loss)
        descend = _descend_with_one_term if self.num_variables == 1 else self._descend
        fits = [descend(theta, log_x - centre, log_loss) for theta in starts]
        return _shift(min(fits, key=lambda fit: fit[0])[1], -centre)

    def _descend(self, theta: np.ndarray, log_x: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
        """Cost and theta at the bottom, from theta; log_x around 0."""
        k, lowest = self.num_variables, float(log_loss.min())
        low = np.array([-np.inf] * k + [0.0] * k + [lowest + np.log(_LOWEST_FLOOR)])
        high = np.array([np.inf] * k + [_LARGEST_EXPONENT] * k + [lowest])

        def residuals(theta: np.ndarray) -> np.ndarray:
            return self.log_loss(theta, log_x) - log_loss

        def jacobian(theta: np.ndarray) -> np.ndarray:
            terms = self._terms(theta, log_x)
            shares = np.exp(terms - np.logaddexp.reduce(terms, axis=1)[:, None])
            return np.column_stack([shares[:, :k], -shares[:, :k] * log_x, shares[:, k:]])

        inside = np.clip(theta, low + 1e-9, high - 1e-9)
        loss = {"loss": "huber", "f_scale": self.huber_delta} if self.huber_delta else {}
        found = optimize.least_squares(
            residuals, inside, jac=jacobian, bounds=(low, high), x_scale="jac", max_nfev=_MOST_EVALUATIONS, **loss
        )
        return found.cost, found.x


def _descend_with_one_term(theta: np.ndarray, log_x: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """`Law._descend` of one term and a floor, in the level m, the slope s and the floor's share f of the loss in the
    middle, log L = m + log((1 - f) exp(-alpha u) + f) with alpha = s / (1 - f).

    Exponent and floor can hardly be told apart where there is little curvature; m and s are known all the same, and
    six evaluations do what seventy did.
    """
    u = log_x[:, 0]
    share = float(np.exp(theta[2] - np.logaddexp(theta[0], theta[2])))
    share = min(max(share, _LOWEST_FLOOR), _LARGEST_SHARE)
    start = np.array([np.logaddexp(theta[0], theta[2]), theta[1] * (1 - share), share])

    def parts(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        decay = np.exp(-point[1] / (1 - point[2]) * u)
        return decay, (1 - point[2]) * decay + point[2]

    def residuals(point: np.ndarray) -> np.ndarray:
        return point[0] + np.log(parts(point)[1]) - log_loss

    def jacobian(point: np.ndarray) -> np.ndarray:
        decay, sum_of_both = parts(point)
        by_share = 1 - decay * (1 + point[1] / (1 - point[2]) * u)
        return np.column_stack([np.ones_like(u), -u * decay / sum_of_both, by_share / sum_of_both])

    bounds = ([-np.inf, 0.0, _LOWEST_FLOOR / 2], [np.inf, np.inf, (1 + _LARGEST_SHARE) / 2])
    found = optimize.least_squares(residuals, start, jac=jacobian, bounds=bounds, max_nfev=_MOST_EVALUATIONS)
    level, slope, share = found.x
    return found.cost, np.array([level + np.log(1 - share), slope / (1 - share), level + np.log(share)])


STRAIGHT, FLOOR = Law(1), Law(1, has_floor=True)


def joint_law(log_x: np.ndarray, log_loss: np.ndarray) -> Law:
    """L(N, D) with Huber's loss for the scatter of these runs: log_x [n, 2], log_loss [n]."""
    rough = Law(2, has_floor=True, huber_delta=_FIRST_HUBER_DELTA)
    residuals = rough.log_loss(rough.fit(log_x, log_loss), log_x) - log_loss
    scatter = float(stats.median_abs_deviation(residuals, scale="normal"))
    return dataclasses.replace(rough, huber_delta=max(SMALLEST_HUBER_DELTA, _HUBER_SIGMAS * scatter))


def _straight_line(log_x: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    centred = log_x - log_x.mean()
    exponent = -(centred @ log_loss) / (centred @ centred)
    return np.array([log_loss.mean() + exponent * log_x.mean(), exponent])


def _shift(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The same law in variables that are divided by exp(centre)."""
    k = len(centre)
    return np.concatenate([theta[:k] - theta[k : 2 * k] * centre, theta[k:]])


def _starts(num_variables: int, log_loss: np.ndarray) -> list[np.ndarray]:
    """Places to begin at: small and large exponents, a floor that is little, half or most of the lowest loss."""
    mean, lowest = float(np.exp(log_loss.mean())), float(np.exp(log_loss.min()))
    found = []
    for exponents in product((0.05, 0.3, 0.8), repeat=num_variables):
        for share in (0.02, 0.5, 0.9):
            height = np.log((mean - share * lowest) / num_variables)
            found.append(np.array([height] * num_variables + [*exponents, np.log(share * lowest)]))
    return found


# --- How good --------------------------------------------------------------------------------------------------------


def r_squared(law: Law, theta: np.ndarray, log_x: np.ndarray, log_loss: np.ndarray) -> float | None:
    """1 - (squared residuals of log loss) / (squared deviations of log loss from its mean), as a law in log-log has it;
    for a straight line the squared correlation of the logarithms. None where all losses are equal."""
    deviations = float(np.sum((log_loss - log_loss.mean()) ** 2))
    return 1.0 - float(np.sum((law.log_loss(theta, log_x) - log_loss) ** 2)) / deviations if deviations > 0 else None


@dataclass(frozen=True)
class Replicates:
    """Fits to resampled losses; `stretch` widens their spread to what few runs deserve."""

    law: Law
    theta: np.ndarray
    """[p], of the losses themselves."""
    drawn: np.ndarray
    """[r, p]"""
    residuals: np.ndarray
    """[n], scaled up by the parameters that were fitted to them."""
    stretch: float

    def interval(self, figure: Callable[[np.ndarray], float]) -> Interval:
        """Of a figure of theta; figures that must be above 0 should come as logarithms."""
        value = figure(self.theta)
        return self._stretched(value, np.array([figure(theta) for theta in self.drawn]) - value)

    def band(self, log_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high log loss of the law itself at log_x [m, k], [m] each."""
        centre = self.law.log_loss(self.theta, log_x)
        spread = np.array([self.law.log_loss(theta, log_x) for theta in self.drawn]) - centre
        low, high = np.percentile(spread, _percentiles(), axis=0)
        return centre + self.stretch * low, centre + self.stretch * high

    def prediction(self, log_x: np.ndarray, *, seed: int) -> Interval:
        """Log loss of a new run at log_x [k]: the law's uncertainty and a residual of the run's own."""
        value = float(self.law.log_loss(self.theta, log_x[None])[0])
        generator = np.random.default_rng(seed)
        own = generator.choice(self.residuals, size=len(self.drawn))
        errors = np.array([self.law.log_loss(theta, log_x[None])[0] for theta in self.drawn]) - value
        return self._stretched(value, own - errors)

    def _stretched(self, value: float, deviations: np.ndarray) -> Interval:
        low, high = np.percentile(deviations, _percentiles())
        return Interval(float(value), float(value + self.stretch * low), float(value + self.stretch * high))


def _percentiles() -> Sequence[float]:
    return (50 * (1 - LEVEL), 50 * (1 + LEVEL))


def resample_residuals(
    law: Law, theta: np.ndarray, log_x: np.ndarray, log_loss: np.ndarray, *, replicates: int, seed: int
) -> Replicates | None:
    """Fit again and again to the law plus its own residuals, drawn with replacement; None without a degree of freedom.

    The sizes of a study are chosen, not drawn, so they stay and the runs' deviations are drawn. Residuals are centred
    and scaled by sqrt(n / (n - p)), since a fit makes them smaller than the runs' scatter. Percentiles of few draws are
    too narrow still (Hesterberg, The American Statistician 69, 2015, section 3.2): they are stretched by Student's t
    over the normal quantile with n - p degrees of freedom, which for a straight line gives the classical interval on
    average.
    """
    count, freedom = len(log_loss), len(log_loss) - law.num_parameters
    if freedom < 1:
        return None
    fitted = law.log_loss(theta, log_x)
    residuals = log_loss - fitted
    residuals = (residuals - residuals.mean()) * np.sqrt(count / freedom)
    generator = np.random.default_rng(seed)
    draws = generator.choice(residuals, size=(replicates, count))
    drawn = np.array([law.fit(log_x, fitted + draw, start=theta) for draw in draws])
    tail = 0.5 * (1 + LEVEL)
    stretch = float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail))
    return Replicates(law, theta, drawn, residuals, stretch)


def resample_items(
    law: Law, theta: np.ndarray, log_x: np.ndarray, *, item_losses: np.ndarray, item_pairs: np.ndarray,
    replicates: int, seed: int,
) -> Replicates:  # fmt: skip
    """Fit again and again to the losses over held-out items drawn with replacement, the same draw for all runs.

    `item_losses` [n, items] are sums over an item's pairs, `item_pairs` [items] their number. This is what another
    held-out set of the same kind would do to the law, without the runs' own scatter.
    """
    generator = np.random.default_rng(seed)
    count = item_losses.shape[1]
    drawn = np.empty((replicates, len(theta)))
    for replicate in range(replicates):
        weights = np.bincount(generator.integers(0, count, size=count), minlength=count)
        losses = item_losses @ weights / (item_pairs @ weights)
        drawn[replicate] = law.fit(log_x, np.log(losses), start=theta)
    return Replicates(law, theta, drawn, np.zeros(len(log_x)), stretch=1.0)
