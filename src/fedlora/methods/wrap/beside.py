"""Wrappers that send tensors of their own beside those of the wrapped method, and average them separately."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fedlora.adapter import Tensors
from fedlora.messages import Mean, Merged, Reply, Round, Upload
from fedlora.method import ClientRound
from fedlora.methods.wrap.wrapper import Wrapper


@dataclass(frozen=True)
class Collected:
    """What a wrapped method has collected, and the mean of the wrapper's own tensors."""

    inner: Any
    own: Mean


@dataclass(frozen=True)
class Beside(Wrapper):
    """A wrapper whose own tensors have names with a prefix in messages. Its server state has the wrapped one as `inner`."""

    prefix: ClassVar[str]

    def marked(self, own: Tensors) -> dict[str, Tensor]:
        """The tensors with the prefix."""
        return {self.prefix + name: tensor for name, tensor in own.items()}

    def split(self, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The wrapper's own tensors, without the prefix, and the other tensors."""
        mark = self.prefix
        own = {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}
        return own, {name: tensor for name, tensor in tensors.items() if not name.startswith(mark)}

    def expected_upload(self, known: ClientRound, upload: Upload, template: Upload) -> Upload:
        """The upload that the wrapped method expects, with the own tensors."""
        (_, rest), (own, expected) = self.split(upload.values), self.split(template.values)
        inner = replace(upload, values=rest), replace(template, values=expected)
        found = self.inner.expected_upload(self.inside(known), *inner)
        return replace(found, values={**found.values, **self.marked(own)})

    def expand(self, known: ClientRound, upload: Upload) -> Tensors:
        """The wrapped method's expanded upload, with the own tensors."""
        own, rest = self.split(upload.values)
        return {**self.inner.expand(self.inside(known), replace(upload, values=rest)), **self.marked(own)}

    def collect(self, server: Any, collected: Collected | Mean | None, reply: Reply) -> Collected:
        """The wrapped method's collection, and the mean of the own tensors."""
        so_far = collected if isinstance(collected, Collected) else Collected(None, Mean())
        own, rest = self.split(reply.upload.values)
        so_far.own.add(reply.weight, own, reply.client.id)
        bare = replace(reply, upload=replace(reply.upload, values=rest))
        return replace(so_far, inner=self.inner.collect(server.inner, so_far.inner, bare))

    def merge_both(self, server: Any, collected: Collected | Mean, rnd: Round) -> tuple[Merged[Any], Mapping[str, Tensor]]:
        """The wrapped method's merge, and the means of the own tensors that were uploaded."""
        if isinstance(collected, Mean):
            marked = {name: name.removeprefix(self.prefix) for name in collected.names() if name.startswith(self.prefix)}
            rest = {name: name for name in collected.names() if name not in marked}
            collected = Collected(collected.select(rest), collected.select(marked))
        return self.inner.merge(server.inner, collected.inner, rnd), collected.own.tensors()
