"""The methods written again from their papers, plainly, on whole matrices in float64.

Nothing here comes from the package, so that a mistake would have to be made twice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Reference = Callable[..., Tensor]


def top_share(delta: Tensor, density: float) -> Tensor:
    """All but the largest share of the elements set to zero."""
    count = delta.numel()
    kept = max(1, int(density * count))
    least = delta.abs().flatten().sort(descending=True).values[kept - 1]
    return delta * (delta.abs() >= least)


def elected(values: list[Tensor], majority: str = "total") -> Tensor:
    votes = torch.stack(values if majority == "total" else [value.sign() for value in values])
    return torch.where(votes.sum(0) >= 0, 1.0, -1.0).double()


def agreeing(values: list[Tensor], weights: list[float], majority: str, normalize: bool) -> Tensor:
    sign = elected(values, majority)
    total = torch.zeros_like(values[0])
    count = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += value * (value.sign() == sign)
        count += weight * (value.sign() == sign)
    return total / torch.where(count == 0, 1.0, count) if normalize else total


def weighted(deltas: list[Tensor], weights: list[float]) -> list[Tensor]:
    return [delta * weight for delta, weight in zip(deltas, weights, strict=True)]


def plain_sum(deltas: list[Tensor], weights: list[float], **_: Any) -> Tensor:
    return torch.stack(weighted(deltas, weights)).sum(0)


def linear(deltas: list[Tensor], weights: list[float], *, normalize: bool = True) -> Tensor:
    return plain_sum(deltas, weights) / (sum(weights) if normalize else 1)


def task_arithmetic(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    return given.get("lambda", 1.0) * plain_sum(deltas, weights)


def ties(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    trimmed = [top_share(delta, given.get("density", 0.2)) for delta in deltas]
    merged = agreeing(
        weighted(trimmed, weights),
        weights,
        given.get("majority", "total"),
        given.get("normalize", True),
    )
    return given.get("lambda", 1.0) * merged


def uniform(key: str, index: int) -> float:
    """SplitMix64 in Python's own integers."""
    mask = 2**64 - 1
    first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    z = (first + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z >> 11) / 2**53


@cache
def chances(shape: torch.Size, adapter: int) -> Tensor:
    key = f"0:layers.0.q.weight:{adapter}"
    flat = [uniform(key, index) for index in range(shape.numel())]
    return torch.tensor(flat, dtype=torch.float64).reshape(shape)


def dropped(deltas: list[Tensor], density: float) -> list[Tensor]:
    return [delta * (chances(delta.shape, i) < density) / density for i, delta in enumerate(deltas)]


def dare_linear(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    thinned = dropped(deltas, given.get("density", 0.5))
    return given.get("lambda", 1.0) * plain_sum(thinned, weights)


def dare_ties(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    thinned = weighted(dropped(deltas, given.get("density", 0.5)), weights)
    merged = agreeing(
        thinned, weights, given.get("majority", "total"), given.get("normalize", False)
    )
    return given.get("lambda", 1.0) * merged


def della(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    density, epsilon = given.get("density", 0.5), given.get("epsilon", 0.15)
    thinned = []
    for i, delta in enumerate(deltas):
        kept = torch.empty_like(delta)
        for row in range(len(delta)):
            order = delta[row].float().abs().argsort(stable=True)  # elements are float32 values
            for place, column in enumerate(order.tolist()):
                step = 2 * epsilon / (delta.shape[1] - 1)
                kept[row, column] = density - epsilon + place * step
        thinned.append(delta * (chances(delta.shape, i) < kept) / kept)
    merged = agreeing(weighted(thinned, weights), weights, "total", False)
    return given.get("lambda", 1.0) * merged


def breadcrumbs(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    density, gamma = given.get("density", 0.9), given.get("gamma", 0.01)
    masked = []
    for delta in deltas:
        count = delta.numel()
        kept = max(1, int(density * count))
        bottom = max(0, count - kept - int(gamma * count))
        chosen = delta.abs().flatten().argsort()[bottom : bottom + kept]
        mask = torch.zeros(count, dtype=torch.float64)
        mask[chosen] = 1
        masked.append(delta * mask.reshape(delta.shape))
    return given.get("lambda", 1.0) * plain_sum(masked, weights)


def magnitude_prune(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    pruned = [top_share(delta, given.get("density", 0.5)) for delta in deltas]
    return given.get("lambda", 1.0) * plain_sum(pruned, weights)


def sce(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    stack = torch.stack(weighted(deltas, weights))
    density = given.get("density", 1.0)
    if density < 1:
        variance = stack.var(0, unbiased=False)
        kept = int(int((variance > 0).sum()) * density)
        least = variance.flatten().sort(descending=True).values[kept - 1]
        stack = stack * (variance >= least)
    energy = stack.square().sum((1, 2))
    shares = (energy / energy.sum())[:, None, None]
    agrees = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    divisor = (shares * agrees).sum(0)
    return (stack * shares * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)


def angle(one: Tensor, two: Tensor) -> float:
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    return math.acos(max(-1.0, min(1.0, cosine)))


def arc(one: Tensor, two: Tensor, t: float) -> Tensor:
    omega = angle(one, two)
    return (math.sin((1 - t) * omega) * one + math.sin(t * omega) * two) / math.sin(omega)


def slerp(deltas: list[Tensor], weights: list[float], *, t: float = 0.5) -> Tensor:
    one, two = weighted(deltas, weights)
    if abs(math.cos(angle(one, two))) > 0.9995:
        return (1 - t) * one + t * two
    return arc(one, two, t)


def nuslerp(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return arc(deltas[0], deltas[1], weights[1] / sum(weights))


def multislerp(deltas: list[Tensor], weights: list[float], *, normalize: bool = True) -> Tensor:
    """With the tangent step that the implementation knows to be zero."""
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = (shares / shares.sum() if normalize else shares)[:, None]
    flat = torch.stack([delta.flatten() for delta in deltas])
    lengths = flat.norm(dim=1, keepdim=True)
    units = flat / lengths
    mean = (units * shares).sum(0)
    mean = mean / mean.norm()
    tangents = units - (units * mean).sum(1, keepdim=True) * mean
    step = (tangents * shares).sum(0)
    size = step.norm() + 1e-300
    point = mean * size.cos() + step * (size.sin() / size)
    return (point * (lengths * shares).sum()).reshape(deltas[0].shape)


def karcher(
    deltas: list[Tensor], weights: list[float], *, max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    shares = [weight / sum(weights) for weight in weights]
    units = [delta / delta.norm() for delta in deltas]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    assert isinstance(mean, Tensor)
    mean = mean / mean.norm()
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            cosine = float((mean * unit).sum().clamp(-1, 1))
            theta = math.acos(cosine)
            if theta >= tol:
                tangent += share * theta / math.sin(theta) * (unit - cosine * mean)
        size = tangent.norm()
        if size < tol:
            break
        mean = size.cos() * mean + size.sin() * tangent / size
        mean = mean / mean.norm()
    length = sum(share * delta.norm() for share, delta in zip(shares, deltas, strict=True))
    return mean * length


def model_stock(deltas: list[Tensor], weights: list[float]) -> Tensor:
    scaled = weighted(deltas, weights)
    pairs = [math.cos(angle(one, two)) for i, one in enumerate(scaled) for two in scaled[i + 1 :]]
    cosine, count = sum(pairs) / len(pairs), len(scaled)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * torch.stack(scaled).mean(0)


def nearswap(deltas: list[Tensor], weights: list[float], *, t: float = 1e-4) -> Tensor:
    a, b = weighted(deltas, weights)
    share = (t / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    return share * b + (1 - share) * a
