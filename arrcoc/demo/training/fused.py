"""Rotations as single kernels: eager, they are most of what a small model moves through memory."""

from __future__ import annotations

import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from arrcoc.lod import tower


def fuse_rotations() -> None:
    """Compile the rotations of vision tower and text model, for this process; numbers change by rounding."""
    rotate = torch.compile(tower.rotate, dynamic=True)
    tower.rotate = rotate
    stock.apply_rotary_pos_emb = torch.compile(stock.apply_rotary_pos_emb, dynamic=True)
