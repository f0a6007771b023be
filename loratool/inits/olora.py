"""OLoRA: an orthonormal start from the weight's QR decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.inits.method import Init, Start


def olora(weight: Tensor, start: Start) -> LowRank:
    """B = Q[:, :r] and A = R[:r] of W = Q·R, as PEFT has it.

    The first r columns of Q come from the first r columns of W, and A = Bᵀ·W: no more of the
    decomposition is needed. In float64.
    """
    wide = weight.double()
    b = torch.linalg.qr(wide[:, : start.rank]).Q
    return LowRank(b.float(), (b.T @ wide).float(), start.scale)


OLORA = Init("olora", "Büyükakyüz 2024, OLoRA, arXiv 2406.01775, algorithm 1", from_weight=olora)
