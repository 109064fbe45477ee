"""Checks what callers pass as tokens, masks and positions, and brings it into one form: a list of rows without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oxfuse.runtime.errors import UserError

TokenIds = Sequence[int] | Tensor
Batch = Tensor | Sequence[TokenIds]


def token_list(ids: TokenIds, vocab_size: int, what: str = "token ids") -> list[int]:
    """Return token ids as a list of ints. Raises UserError where there are none, or one is no integer in the vocabulary."""
    values = _integers(ids, what)
    if not values:
        raise UserError(f"There are no {what}: give at least one.")
    for index, value in enumerate(values):
        if not 0 <= value < vocab_size:
            raise UserError(
                f"The {what} hold {value} at index {index}, outside the vocabulary: ids go from 0 to {vocab_size - 1}."
            )
    return values


def _integers(values: TokenIds, what: str) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise UserError(f"The {what} are a tensor {list(values.shape)} of {values.dtype}: give integers in one dimension.")
        return [int(value) for value in values.tolist()]
    if not isinstance(values, Iterable):
        raise UserError(f"The {what} are {values!r:.60}: give a list of integers.")
    result = []
    for value in values:
        try:
            if isinstance(value, bool):
                raise TypeError
            result.append(value.__index__())
        except (AttributeError, TypeError):
            raise UserError(f"The {what} hold {value!r:.60}: give integers.") from None
    return result


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """One row without its padding: the tokens that run, their positions, and the index of the first one in the padded row."""

    tokens: list[int]
    positions: list[int]
    offset: int


def batch_rows(
    input_ids: Batch, vocab_size: int, position_ids: Batch | None = None, attention_mask: Batch | None = None
) -> tuple[list[BatchRow], int]:
    """Return the rows of a batch and its padded length S.

    `input_ids` is [B, S] of any integer dtype, or B lists of any lengths, which are padded on the right. `attention_mask`
    [B, S] of zeros and ones marks the tokens that run: one run of ones a row. `position_ids` [B, S] or [1, S], or lists as
    long as the rows, default to the index in the padded row. Raises UserError for anything else.
    """
    rows = _rows(input_ids, "input_ids")
    length = max(map(len, rows))
    ragged = any(len(row) != length for row in rows)
    if attention_mask is None:
        spans = [(0, len(row)) for row in rows]
    else:
        masks = _rows(attention_mask, "attention_mask")
        if len(masks) != len(rows) or any(len(mask) != len(row) for mask, row in zip(masks, rows, strict=True)):
            raise UserError(
                f"attention_mask has rows of {[len(m) for m in masks]} entries, input_ids of {[len(r) for r in rows]}: "
                "give a mask of the same shape."
            )
        spans = [_span(mask, index) for index, mask in enumerate(masks)]
    positions = [list(range(length))] * len(rows) if position_ids is None else _rows(position_ids, "position_ids")
    if len(positions) == 1 and not ragged:
        positions = positions * len(rows)
    if len(positions) != len(rows) or any(len(p) < len(row) for p, row in zip(positions, rows, strict=True)):
        raise UserError(
            f"position_ids has rows of {[len(p) for p in positions]} entries, input_ids of {[len(r) for r in rows]}: "
            "give one position per token."
        )
    result = []
    for row, place, (begin, end) in zip(rows, positions, spans, strict=True):
        if bad := [p for p in place[begin:end] if p < 0]:
            raise UserError(f"position_ids contain {bad[0]}: positions start at 0.")
        result.append(BatchRow(tokens=token_list(row[begin:end], vocab_size), positions=place[begin:end], offset=begin))
    return result, length


def _rows(batch: Batch, what: str) -> list[list[int]]:
    if isinstance(batch, Tensor):
        if batch.dim() != 2 or (batch.is_floating_point() and what != "attention_mask"):
            raise UserError(f"{what} is a tensor {list(batch.shape)} of {batch.dtype}: give integers [B, S].")
        if batch.is_floating_point() and not bool(((batch == 0) | (batch == 1)).all()):
            raise UserError("attention_mask holds values besides 0 and 1: give 1 for tokens that run and 0 for padding.")
        rows = [[int(value) for value in row] for row in batch.tolist()]
    else:
        if not all(isinstance(row, (Sequence, Tensor)) and not isinstance(row, (str, bytes)) for row in batch):
            raise UserError(f"{what} is a flat list: give one list of integers per row, as in [[1, 2, 3]].")
        rows = [_integers(row, what) for row in batch]
    if not rows or not all(rows):
        raise UserError(f"{what} has no rows or an empty row: give at least one token in each.")
    return rows


def _span(mask: Sequence[int], index: int) -> tuple[int, int]:
    """Return begin and end of the only run of ones."""
    if set(mask) - {0, 1}:
        raise UserError("attention_mask holds values besides 0 and 1: give 1 for tokens that run and 0 for padding.")
    begin = mask.index(1) if 1 in mask else 0
    end = begin + sum(mask)
    if begin == end or not all(mask[begin:end]):
        raise UserError(
            f"Row {index} of attention_mask is not one run of ones: padding may stand before and after the tokens, not among "
            "them, and no row may be padding alone."
        )
    return begin, end
