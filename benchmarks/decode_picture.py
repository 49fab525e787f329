"""Draw docs/decode.png from benchmarks/results/decode.json.

python benchmarks/decode_picture.py [--result FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, ROOT
from decode_views import draw


def main(arguments: Sequence[str]) -> None:
    """Read the result and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--result", default=str(RESULTS / "decode.json"))
    parser.add_argument("--out", default=str(ROOT / "docs" / "decode.png"))
    options = parser.parse_args(arguments)
    result = json.loads(Path(options.result).read_text(encoding="utf-8"))
    draw(result).savefig(options.out, dpi=110, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
