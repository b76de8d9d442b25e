"""Parameters that are trained in their places in the model, wherever it reads them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from fedlora.errors import UserError
from fedlora.models.layers import ClientLayout
from fedlora.models.targets import within
from fedlora.parts.dense import Dense

Place = tuple[nn.Module, str]
"""A module, and the name of one of its own parameters."""


class InPlace:
    """Parameters of one module that are replaced in each pass of the model by those of the loaded client, the only one.

    `places` has the places of each, several for a parameter that modules share, that of the module first. Without
    `per_client`, the model computes with its own parameters. Values are converted to the dtype of these; the gradient is
    that of the values. A pass for the gradients of examples has a single one.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Sequence[Place]], client_layout: ClientLayout) -> None:
        self.base = next(iter(places.values()))[0][0]
        self.per_client: dict[str, Dense] = {}
        self._places, self._client_layout = places, client_layout
        self._own = {name: self.base.get_parameter(name) for name in places}
        model.register_forward_pre_hook(self._replace)
        model.register_forward_hook(self._restore, always_call=True)

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which a block is computed again with the parameters of one that is called now."""
        values = {name: self.base._parameters[name] for name in self.per_client}

        @contextmanager
        def restored() -> Iterator[None]:
            for name, value in values.items():
                self._set(name, value)
            try:
                yield
            finally:
                self._restore()

        return restored

    def _replace(self, *_: Any) -> None:
        for name, part in self.per_client.items():
            (own,) = self._client_layout.select(part.w)
            self._set(name, own.to(self._own[name].dtype))

    def _restore(self, *_: Any) -> None:
        for name in self.per_client:
            self._set(name, self._own[name])

    def _set(self, name: str, value: Any) -> None:
        for module, key in self._places[name]:
            module._parameters[key] = value


def other_parameters(model: nn.Module, modules: Iterable[str], head: Iterable[str]) -> dict[str, list[Place]]:
    """The places of all parameters outside the head, except the weights of these modules, by the parameter's name.

    Raises:
        UserError: one of the weights, or a parameter of the head, is shared with another module, or a parameter is
            quantized; names it.
    """
    places: dict[int, list[Place]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, key))
    head, weights = tuple(head), {id(model.get_submodule(name).weight) for name in modules}
    others: dict[str, list[Place]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise UserError(f"{name} is quantized, so that all parameters cannot be trained; choose another model")
        if id(parameter) not in weights and not within(name, head):
            others[name] = places[id(parameter)]
        elif len(places[id(parameter)]) > 1:
            raise UserError(
                f"{name} is the weight of several modules, so that all parameters cannot be trained; "
                "choose other lora.targets, or another model"
            )
    return others


def in_place(
    model: nn.Module, parameters: Mapping[str, Sequence[Place]], client_layout: ClientLayout
) -> dict[str, InPlace]:
    """The modules that own these parameters, by name."""
    by_module: dict[str, dict[str, Sequence[Place]]] = {}
    for name, places in parameters.items():
        module, _, key = name.rpartition(".")
        by_module.setdefault(module, {})[key] = places
    return {module: InPlace(model, own, client_layout) for module, own in by_module.items()}
