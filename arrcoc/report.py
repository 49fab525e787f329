"""Encodings and answers as JSON-ready facts: what the command line and the demo write down."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arrcoc.answer import Answer
from arrcoc.encoding import Encoding
from arrcoc.errors import ConfigError

STAGE_GROUPS: dict[str, tuple[str, ...]] = {
    "look": ("decode", "frame", "texture", "glimpse"),
    "judge": ("query", "score", "balance", "allocate"),
    "encode": ("encode", "assemble"),
    "answer": ("prefill", "generate"),
}
"""Stages as people think of them: reading the image, finding what matters, encoding it, answering."""


def encoding_facts(encoding: Encoding) -> dict[str, Any]:
    """An encoding without its tensors: question, tokens, budget, maps, tensions and timings.

    The maps `lod` (ints) and `relevance` (four decimals) are lists of R rows of C numbers.
    """
    return {
        "question": encoding.question,
        "tokens": encoding.n_tokens,
        "full_tokens": encoding.full_tokens,
        "share": encoding.share,
        "budget": encoding.budget,
        "layout": encoding.layout.value,
        "overview_stride": encoding.overview_stride,
        "overview_tokens": encoding.overview_tokens,
        "sides": list(encoding.sides),
        "source_size": list(encoding.source_size),
        "frame_size": list(encoding.frame_size),
        "distortion": encoding.distortion,
        "lod_counts": encoding.lod_counts,
        "lod": encoding.lod.tolist(),
        "relevance": [[round(value, 4) for value in row] for row in encoding.relevance.tolist()],
        "tensions": {name: float(value) for name, value in encoding.tensions._asdict().items()},
        "timings_ms": encoding.timings,
    }


def answer_facts(answer: Answer) -> dict[str, Any]:
    """An answer to a question about one image, with the facts of its encoding."""
    assert answer.encoding is not None, "an answer about an image"
    said = {
        "answer": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
    }
    return said | encoding_facts(answer.encoding) | {"timings_ms": answer.timings}


def engine_facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `Engine.describe()` that does not change from question to question."""
    names = ("model", "device", "dtype", "preset", "versions", "notes")
    return {name: description[name] for name in names}


def tokens_line(encoding: Encoding) -> str:
    """Tokens against full resolution, for people."""
    return f"{encoding.n_tokens:,} of {encoding.full_tokens:,} tokens ({encoding.share:.1%})"


def grouped(timings: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of each of `STAGE_GROUPS`; a stage that did not run counts 0."""
    return {
        group: math.fsum(timings.get(stage, 0.0) for stage in stages)
        for group, stages in STAGE_GROUPS.items()
    }


def to_json(facts: Mapping[str, Any]) -> str:
    """One JSON document (RFC 8259, so no NaN), ASCII, indented."""
    return json.dumps(facts, indent=2, allow_nan=False)


def write_json(facts: Mapping[str, Any], path: Path) -> None:
    """Write facts as JSON; the file appears whole or not at all.

    Raises:
        ConfigError: the place cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        scratch.write_text(to_json(facts) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        given = f"{path} cannot be written ({error.strerror})"
        raise ConfigError(given, "a writable path", "Name another place") from error
    finally:
        scratch.unlink(missing_ok=True)
