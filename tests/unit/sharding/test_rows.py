"""Rows that lie with several workers, and the whole tensors that they make."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from piflow.sharding.rows import ComingRows, RowsOfAll


def gathered(wholes: list[Tensor], workers: int) -> list[Tensor]:
    """What every worker gets, with the all-gather in between done by hand."""
    rows = [len(whole) for whole in wholes]
    buffers: list[Tensor] = []
    with (
        mock.patch("torch.distributed.get_world_size", return_value=workers),
        mock.patch("torch.distributed.all_gather_into_tensor") as sent,
    ):
        for number in range(workers):
            parts = [list(whole.chunk(workers)) for whole in wholes]
            own = [p[number] if number < len(p) else p[0][:0] for p in parts]
            all_rows = RowsOfAll(own, rows, mock.Mock())
            all_rows.start()
            buffers.append(sent.call_args.args[1])
    assert len({buffer.nbytes for buffer in buffers}) == 1
    return ComingRows(torch.stack(buffers), mock.Mock(), all_rows._places).wait()


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_whole_tensors_come_back_to_the_bit(workers: int) -> None:
    """Also where the last workers have fewer rows, or none."""
    wholes = [
        torch.randn(16, 32).to(torch.float8_e4m3fn),
        torch.randn(16, 1),
        torch.randn(16).bfloat16(),
        torch.randn(4, 3),
    ]
    for whole, got in zip(wholes, gathered(wholes, workers), strict=True):
        assert got.dtype == whole.dtype and got.is_contiguous()
        assert torch.equal(got.view(torch.uint8), whole.view(torch.uint8))
