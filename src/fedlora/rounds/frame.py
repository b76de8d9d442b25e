"""The frame that all uploads of a round share."""

from dataclasses import replace
from typing import Any

import torch

from fedlora.adapter import AdapterSpec
from fedlora.messages import ClientInfo, Round
from fedlora.method import AnyMethod, ClientRound
from fedlora.rounds.client_privacy import Frame
from fedlora.rounds.validator import template_upload


def frame_of(method: AnyMethod, known: ClientRound) -> Frame:
    """The expanded upload of one client without training; constant are the tensors that do not vanish with its values."""
    upload = template_upload(method, known)
    zero = replace(upload, values={name: torch.zeros_like(x) for name, x in upload.values.items()})
    constant = frozenset(name for name, x in method.expand(known, zero).items() if bool(x.any()))
    return Frame(method.expand(known, upload), constant)


def common_frame(method: AnyMethod, spec: AdapterSpec, server: Any, rnd: Round) -> Frame:
    """The frame of a client of the largest rank that has never participated."""
    anybody = ClientInfo("", method.rank, 1)
    initial = method.init_client(spec, anybody, rnd.seed)
    return frame_of(method, ClientRound(spec, anybody, rnd, method.send(server, anybody, rnd), initial))
