"""The differential privacy of a run's clients, as its settings plan it."""

from fedlora.config.privacy import Privacy
from fedlora.errors import UserError
from fedlora.privacy.events import Gaussian
from fedlora.rounds.client_privacy import ClientPrivacy


def planned(privacy: Privacy, rate: float, rounds: int, clients: int, secret: bool) -> ClientPrivacy:
    """The privacy of a run of so many rounds, in which each of the clients takes part with probability `rate`.

    The noise is the smallest with which `privacy.epsilon` holds after all rounds, or `privacy.noise_multiplier`.

    Raises:
        UserError: there are too few clients for `privacy.clip_quantile`.
    """
    from fedlora.privacy.account import epsilon, noise_for  # takes seconds to import

    delta, noise = privacy.delta, privacy.noise_multiplier
    assert delta is not None
    if noise is None:
        assert privacy.epsilon is not None
        noise = noise_for(privacy.epsilon, delta, rate, rounds)

    def spent(done: int) -> float:
        return epsilon([Gaussian(noise, rate, done)], delta)

    adapted = privacy.clip_quantile, privacy.clip_rate
    try:
        return ClientPrivacy(privacy.clip, noise, delta, rate, rate * clients, spent, *adapted, secret)
    except ValueError as error:
        raise UserError(str(error)) from None
