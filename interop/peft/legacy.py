"""Adapters of transformers 4, whose experts were linear layers, on the parameters that these have become."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.interop.peft.adapter import LowRank
from jaxmoe.interop.peft.anatomy import Anatomy, Module, Piece

_Pieces = list[tuple[Piece, LowRank]]


def fuse(pairs: Mapping[str, LowRank], anatomy: Anatomy, where: object) -> dict[str, LowRank]:
    """Put pairs on single layers together.

    Gate and up, which share their inputs, get the sum of both ranks: their A below each other, their B along a block
    diagonal. An expert without a pair gets one of zeros.

    Args:
        pairs: by the parameter's name, those of `Anatomy.pieces` among them.
        anatomy: of today's model.
        where: what the adapter is called in messages.

    Raises:
        UserError: DoRA on some layers of a parameter and not on others.
    """
    fused: dict[str, LowRank] = {}
    parts: dict[str, _Pieces] = {}
    for name, pair in pairs.items():
        piece = anatomy.pieces.get(name.removesuffix(".weight"))
        if piece is None:
            fused[name] = pair
        else:
            parts.setdefault(piece.parameter, []).append((piece, pair))
    holders = {module.full(name): (module, name) for module, name in anatomy.parameters()}
    for name, pieces in parts.items():
        module, parameter = holders[name]
        if pieces[0][0].expert is None:
            fused[name] = _renamed(name, pieces[0][1], module, parameter)
        else:
            fused[name] = _of_experts(name, pieces, module, parameter, where)
    return fused


def rename_saved(saved: Mapping[str, np.ndarray], anatomy: Anatomy, where: object) -> dict[str, np.ndarray]:
    """Parameters stored as a whole, by today's names.

    Args:
        saved: by the names of transformers 4.
        anatomy: of today's model.
        where: what the adapter is called in messages.

    Raises:
        UserError: one is a layer of a single expert.
    """
    renamed = {}
    for name, array in saved.items():
        piece = anatomy.pieces.get(name.removesuffix(".weight"))
        if piece is not None and piece.expert is not None:
            raise UserError(
                f"{where}: modules_to_save hold {name}, one layer of {piece.parameter}: expected none of experts; "
                "merge it with the PEFT and transformers that wrote it"
            )
        renamed[name if piece is None else piece.parameter] = array
    return renamed


def _renamed(name: str, pair: LowRank, module: Module, parameter: str) -> LowRank:
    transposed = module.stored_transposed(parameter)
    wrapped = module.kind in ("router", "other")
    return LowRank(name, pair.a, pair.b, pair.scale, pair.magnitude, transposed, wrapped)


def _of_experts(name: str, pieces: _Pieces, module: Module, parameter: str, where: object) -> LowRank:
    experts = module.parameters[parameter][0]
    outputs, inputs = module.sizes(parameter)
    scales = {pair.scale for _, pair in pieces}
    scale = scales.pop() if len(scales) == 1 else 1.0
    starts, rank = _columns(pieces)
    dtype = np.result_type(*(array.dtype for _, pair in pieces for array in (pair.a, pair.b)))
    a_EKI = np.zeros((experts, rank, inputs), dtype)
    b_EOK = np.zeros((experts, outputs, rank), dtype)
    for piece, pair in pieces:
        columns = slice(starts[piece.rows], starts[piece.rows] + pair.rank)
        a_EKI[piece.expert, columns] = pair.a
        b_EOK[piece.expert, _slice(piece.rows), columns] = pair.b * dtype.type(pair.scale / scale)
    magnitude = _magnitudes(pieces, experts, outputs, name, where)
    return LowRank(name, a_EKI, b_EOK, scale, magnitude, module.stored_transposed(parameter), wrapped=True)


def _columns(pieces: _Pieces) -> tuple[dict[range, int], int]:
    """Where in the common rank the layers of the same outputs begin, and the common rank."""
    widest: dict[range, int] = {}
    for piece, pair in pieces:
        widest[piece.rows] = max(pair.rank, widest.get(piece.rows, 0))
    starts, rank = {}, 0
    for rows in sorted(widest, key=lambda rows: rows.start):
        starts[rows] = rank
        rank += widest[rows]
    return starts, rank


def _magnitudes(pieces: _Pieces, experts: int, outputs: int, name: str, where: object) -> np.ndarray | None:
    given: Sequence[np.ndarray] = [pair.magnitude for _, pair in pieces if pair.magnitude is not None]
    if not given:
        return None
    if len(given) < len(pieces) or sum(array.size for array in given) != experts * outputs:
        raise UserError(
            f"{where}: DoRA on some of the layers that {name} consists of and not on others: expected all or none; "
            "merge it with the PEFT and transformers that wrote it"
        )
    magnitude = np.empty((experts, outputs), given[0].dtype)
    for piece, pair in pieces:
        magnitude[piece.expert, _slice(piece.rows)] = pair.magnitude
    return magnitude


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop, rows.step)
