"""The differential privacy of a run's clients, as its settings plan it."""

from fedlora.config.privacy import Privacy
from fedlora.errors import UserError
from fedlora.privacy.plan import client_plan
from fedlora.rounds.client_privacy import ClientPrivacy


def planned(privacy: Privacy, rate: float, rounds: int, clients: int, secret: bool) -> ClientPrivacy:
    """The privacy of a run of so many rounds, in which each of the clients takes part with probability `rate`.

    The noise is the smallest with which `privacy.epsilon` holds after all rounds, or `privacy.noise_multiplier`.

    Raises:
        UserError: there are too few clients for `privacy.clip_quantile`.
    """
    plan = client_plan(privacy, rounds, rate, clients)
    (one,) = plan.mechanisms
    try:
        return ClientPrivacy(
            privacy.clip,
            one.noise_multiplier,
            plan.delta,
            rate,
            one.expected,
            lambda done: one.epsilon(plan.delta, steps=done),
            privacy.clip_quantile,
            privacy.clip_rate,
            secret,
            one.largest,
            clients,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
