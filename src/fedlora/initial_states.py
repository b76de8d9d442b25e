"""Initial states of clients, computed once for all parts of a round that need them."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from fedlora.adapter import AdapterSpec
from fedlora.messages import ClientInfo
from fedlora.methods.wrap.wrapper import Wrapper
from fedlora.rounds.codec import outline

_LIMIT = 256_000_000


@dataclass(frozen=True)
class RememberedStates(Wrapper):
    """A method that remembers the initial states of its clients, the most recently used ones, up to `limit` bytes.

    They depend on the arguments only; validation, the simulator and evaluation ask for the same ones. It serves one spec
    and one seed.
    """

    limit: int = _LIMIT
    _states: OrderedDict[ClientInfo, tuple[Any, int]] = field(default_factory=OrderedDict, compare=False, repr=False)

    def init_client(self, spec: AdapterSpec, client: ClientInfo, seed: int) -> Any:
        """The wrapped method's, computed at most once while it is remembered."""
        if client in self._states:
            self._states.move_to_end(client)
            return self._states[client][0]
        state = self.inner.init_client(spec, client, seed)
        self._states[client] = state, sum(x.nbytes for x in outline(state)[1])
        while len(self._states) > 1 and sum(size for _, size in self._states.values()) > self.limit:
            self._states.popitem(last=False)
        return state
