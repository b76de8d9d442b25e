"""The account of differential privacy: epsilon of a ledger, noise for a target, steps within a budget.

Neighboring data sets differ by one unit that is added or removed. Numbers are those of the library dp-accounting.
"""

import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, Literal

from fedlora.privacy.events import Gaussian, Ledger, Truncation

Accountant = Literal["pld", "rdp"]

LEAST_NOISE = 0.1
"""The smallest noise multiplier that `noise_for` returns for samples."""

_PRECISION = 2e-4  # relative excess of epsilon by PLD
_SEARCH_PRECISION = 2e-3  # the same in the search for the noise
_MARGIN = 1e-3  # of epsilon for the noise of noise_for, relative to the target: more than _PRECISION
_FINEST = 2**-13  # interval of privacy losses
_MOST_STEPS = 10**9


def version() -> str:
    """Name and version of the library."""
    return f"dp-accounting {importlib.metadata.version('dp-accounting')}"


def epsilon(ledger: Ledger, delta: float, accountant: Accountant = "pld") -> float:
    """An upper bound on the epsilon of all releases together; infinite if one of them has no noise.

    "pld" composes privacy loss distributions, with an excess of about 0.02 %, or more from 10,000 steps on; "rdp" is the
    looser bound by Renyi divergences, NaN for truncated samples, for which there is none. Takes a fraction of a second; the
    same call again is free.

    Raises:
        ValueError: delta is not between 0 and 1.
    """
    _check_delta(delta)
    events = _joined(ledger)
    if any(not event.noise_multiplier for event in events):
        return math.inf
    if not events:
        return 0.0
    return _pld(events, delta) if accountant == "pld" else _rdp(events, delta)


def noise_for(epsilon: float, delta: float, rate: float, steps: int, truncation: Truncation | None = None) -> float:
    """The noise multiplier for which `steps` releases on samples with this rate have at most this epsilon.

    About 1 % above the smallest one, as the rate is rounded up (not for truncated samples), so that similar calls share a
    result. For samples, at least `LEAST_NOISE`.

    Raises:
        ValueError: epsilon, delta or rate is out of range.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    rate = Gaussian(1.0, rate).rate
    return _noise(epsilon, delta, rate if truncation else _rounded_up(rate), steps, truncation) if steps else 0.0


def steps_for(epsilon: float, delta: float, rate: float, noise_multiplier: float) -> int:
    """The largest number of releases, on samples with this rate and with this noise, that have at most this epsilon.

    From 5,000 steps on, up to 0.02 % fewer. With the noise of `noise_for`, at least the number for which it was computed.

    Raises:
        ValueError: epsilon, delta, rate or noise is out of range.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    event = Gaussian(noise_multiplier, rate)
    return _steps(epsilon, delta, event) if noise_multiplier else 0


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon}: expected a finite number above 0")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: expected a number above 0 and below 1")


def _joined(ledger: Ledger) -> tuple[Gaussian, ...]:
    """The ledger in a fixed order, with equal releases counted together."""
    counts: dict[Gaussian, int] = {}
    for event in ledger:
        key = replace(event, count=1)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(replace(event, count=counts[event]) for event in sorted(counts, key=_order) if counts[event])


def _order(event: Gaussian) -> tuple[float, float, int, int]:
    limit = event.truncation
    return event.noise_multiplier, event.rate, *((limit.largest, limit.units) if limit else (0, 0))


def _sampled(event: Gaussian) -> bool:
    return event.rate < 1 or event.truncation is not None


@cache
def _pld(events: tuple[Gaussian, ...], delta: float) -> float:
    if not any(map(_sampled, events)):
        return _without_sampling(events, delta)
    steps = sum(event.count if _sampled(event) else 1 for event in events)
    interval = _interval(1.0, steps, 100 * _PRECISION)
    found = _composed(events, delta, interval)
    while interval > (wanted := _interval(found, steps, _PRECISION)):
        interval = wanted
        found = _composed(events, delta, interval)
    return found


def _without_sampling(events: tuple[Gaussian, ...], delta: float) -> float:
    """Exact: Gaussian releases without sampling compose to one."""
    from dp_accounting import get_epsilon_gaussian

    precision = sum(event.count / event.noise_multiplier**2 for event in events)
    return max(0.0, float(get_epsilon_gaussian(precision**-0.5, delta)))


def _composed(events: tuple[Gaussian, ...], delta: float, interval: float) -> float:
    """Epsilon by PLD with privacy losses in steps of `interval`. Any interval gives an upper bound."""
    whole = None
    for event in events:
        if _sampled(event):
            part = _loss(event.noise_multiplier, event.rate, event.truncation, interval).self_compose(event.count)
        else:
            part = _loss(event.noise_multiplier / math.sqrt(event.count), 1.0, None, interval)
        whole = part if whole is None else whole.compose(part)
    assert whole is not None
    return float(whole.get_epsilon_for_delta(delta))


@lru_cache(16)
def _loss(noise_multiplier: float, rate: float, truncation: Truncation | None, interval: float) -> Any:
    """The privacy loss distribution of one release."""
    from dp_accounting.pld import privacy_loss_distribution

    if truncation is not None:
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=truncation.units,
            sampling_probability=rate,
            truncated_batch_size=truncation.largest,
            noise_multiplier=noise_multiplier,
            value_discretization_interval=interval,
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=rate
    )


def _interval(epsilon: float, steps: int, precision: float) -> float:
    """The interval, a power of two, for this relative precision of epsilon: the excess is about steps * interval**2 / 4."""
    wanted = math.sqrt(4 * precision * max(epsilon, 1e-9) / steps)
    return max(_FINEST, 2.0 ** math.floor(math.log2(wanted)))


@cache
def _rdp(events: tuple[Gaussian, ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    if any(event.truncation for event in events):
        return math.nan
    accountant = RdpAccountant()
    with _quiet():
        for event in events:
            gaussian = GaussianDpEvent(event.noise_multiplier)
            accountant.compose(gaussian if event.rate == 1 else PoissonSampledDpEvent(event.rate, gaussian), event.count)
        return float(accountant.get_epsilon(delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about orders of the Renyi divergence that the library leaves out, which only loosens the bound."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@cache
def _noise(target: float, delta: float, rate: float, steps: int, truncation: Truncation | None) -> float:
    mu = _mu(target, delta)
    if rate == 1 and truncation is None:
        return math.sqrt(steps) / mu * (1 + _MARGIN)
    at = math.log(math.log1p((mu / rate) ** 2 / steps)) / -2  # by the central limit theorem
    for precision in (30 * _SEARCH_PRECISION, _SEARCH_PRECISION):
        interval = _interval(target, steps, precision)

        def excess(log_noise: float, interval: float = interval) -> float:
            event = Gaussian(math.exp(log_noise), rate, steps, truncation)
            return _log_ratio(_composed((event,), delta, interval), target)

        at = _crossing(excess, at, math.log(LEAST_NOISE))
    return math.exp(at)


def _crossing(excess: Callable[[float], float], start: float, least: float) -> float:
    """An argument of at least `least` at which the decreasing function is one to three margins below zero, if there is one.

    Otherwise, one at which it is further below zero. By secants within a bracket, as the function is nearly linear.
    """
    at, low, high = max(start, least), None, None
    while True:
        value = excess(at) + 2 * _MARGIN
        if abs(value) <= _MARGIN or (value < 0 and at == least):
            return at
        low, high = (low, (at, value)) if value < 0 else ((at, value), high)
        if low is None or high is None:
            at = max(least, at + min(max(value / 1.5, -1.0), 1.0))
        elif high[0] - low[0] < _MARGIN / 10:
            return high[0]
        else:
            share = low[1] / (low[1] - high[1])
            at = low[0] + min(max(share, 0.05), 0.95) * (high[0] - low[0])


@cache
def _steps(target: float, delta: float, event: Gaussian) -> int:
    exponent = min(event.noise_multiplier**-2, 700.0)
    spent = event.rate**2 * math.expm1(exponent) if event.rate < 1 else exponent
    at = min(max(1, int(_mu(target, delta) ** 2 / spent)), _MOST_STEPS)
    low, high = 0, _MOST_STEPS + 1  # fits, does not fit
    slope, last = 0.7, (0.0, 0.0)
    while high - low > (step := max(1, low // 5000)):
        place, value = math.log(at), _log_ratio(epsilon([replace(event, count=at)], delta), target)
        low, high = (at, high) if value <= 0 else (low, at)
        if last != (0.0, 0.0) and place != last[0]:
            slope = min(max((value - last[1]) / (place - last[0]), 0.3), 2.0)
        last = place, value
        at = min(max(int(math.exp(min(place - value / slope, 20.0))), low + step), max(low + 1, high - step))
    return low


def _mu(epsilon: float, delta: float) -> float:
    """The ratio of sensitivity to noise of one Gaussian release with this epsilon and delta."""
    from dp_accounting import get_sigma_gaussian

    return 1 / float(get_sigma_gaussian(epsilon, delta))


def _log_ratio(epsilon: float, target: float) -> float:
    """The logarithm of their ratio, within a finite range."""
    return min(max(math.log(epsilon / target), -20.0), 20.0) if epsilon > 0 else -20.0


def _rounded_up(rate: float) -> float:
    """The next rate above, of a hundred for each factor of e."""
    return min(1.0, max(rate, math.exp(math.ceil(100 * math.log(rate)) / 100)))
