"""Memory that a worker's thread keeps is never handed out twice; blocks of a large matrix."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loratool.algebra import passes
from loratool.algebra.blocks import large_matrix

CPU = torch.device("cpu")


def in_a_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_memory_is_used_again_only_when_nothing_looks_at_it() -> None:
    def work() -> None:
        first = large_matrix(100, 40, torch.float32, CPU)
        place = first.data_ptr()
        view = first[7:].T
        del first
        second = large_matrix(100, 40, torch.float32, CPU)
        view.fill_(1.0)
        second.fill_(2.0)
        assert bool((view == 1).all())
        del view
        third = large_matrix(100, 40, torch.float32, CPU)
        assert third.data_ptr() == place
        assert bool((second == 2).all())
        del second, third
        fourth = large_matrix(70, 30, torch.float32, CPU)
        assert fourth.data_ptr() == place
        del fourth
        large_matrix(300, 40, torch.float32, CPU).fill_(3.0)  # more than is kept

    in_a_thread(work)


def test_the_main_thread_keeps_nothing() -> None:
    first, second = (large_matrix(9, 9, torch.float32, CPU) for _ in range(2))
    first.fill_(1.0)
    second.fill_(2.0)
    assert bool((first == 1).all())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("at_a_time", [90, 1000, 2**22])
def test_rough_products_in_blocks(
    *, transposed: bool, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to bf16 once going in, once on the way and once coming out, whatever the blocks."""
    monkeypatch.setattr(passes, "_COPIED", 0)
    monkeypatch.setattr(passes, "_COPIED_AT_A_TIME", at_a_time)
    torch.manual_seed(3)
    d = torch.randn(30, 70).T if transposed else torch.randn(70, 30)
    x, y = torch.randn(30, 4), torch.randn(70, 4)
    rough = passes.RoughMatrix(d, torch.bfloat16)
    wide = d.double()
    for _ in range(2):
        back, both = rough.back(y), rough.there_and_back(x)
        assert back.shape == both.shape == (30, 4)
        assert float((back - wide.T @ y.double()).norm()) <= 0.01 * float(
            (wide.T @ y.double()).norm()
        )
        exact = wide.T @ (wide @ x.double())
        assert float((both - exact).norm()) <= 0.01 * float(exact.norm())


@pytest.mark.parametrize("shape", [(0, 6), (4, 0)])
def test_a_matrix_of_nothing(shape: tuple[int, int]) -> None:
    assert large_matrix(*shape, torch.float32, CPU).shape == shape
