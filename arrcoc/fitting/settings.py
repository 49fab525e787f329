"""What can be set about a fit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arrcoc.errors import ConfigError

Target = Literal["auto", "boxes", "glimpse"]


class FitSettings(BaseModel):
    """Settings of a fit, with their defaults; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Target = "auto"
    """auto: rows with boxes are labels and the others are distilled; boxes: rows without boxes are left
    out; glimpse: every row is distilled, and boxes are not looked at."""
    steps: int = Field(default=2000, ge=1)
    """Most optimiser steps."""
    batch: int = Field(default=8, ge=1)
    """Questions in a step; all of a step's frames have one grid."""
    lr: float = Field(default=4e-3, gt=0, le=1)
    """Highest learning rate, reached after a tenth of the steps."""
    width: int = Field(default=64, ge=1, le=1024)
    """Features per cell of the head."""
    seed: int = Field(default=0, ge=0)
    """Of the weights, the batches and the choice of held-out images."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the images, with all their questions, that the head is judged by and not fitted to."""
    patience: int = Field(default=8, ge=1)
    """Judgements without a new least held-out loss after which the fit stops."""
    judge_every: int = Field(default=50, ge=1)
    """Steps between judgements of the held-out loss."""
    save_every: float = Field(default=30.0, ge=0)
    """Seconds between checkpoints; does not touch the result."""

    @classmethod
    def make(cls, **values: Any) -> FitSettings:
        """Settings from values; raises `ConfigError` for unknown or invalid ones."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Input should be ")
            raise ConfigError(f"{name} = {first['input']!r}", reason, "Correct this value") from None
