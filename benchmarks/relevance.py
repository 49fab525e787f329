"""Where does each scorer look? Its map against the tiles that a question about a placard is really about.

    python benchmarks/relevance.py --model FOLDER [--count 120] [--canvas 1024] [--device cuda]

Writes the JSON, and beside it `relevance_bars.png` and `relevance_maps.png`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import about, add_model_options, open_lab
from common import facts, write_result
from numpy.typing import NDArray
from PIL import Image
from relevance_pictures import Shown, draw_bars, draw_maps
from summaries import ALL, estimate, families
from torch import Tensor

from arrcoc import image, opponent, plot, scorers, sequence, texture
from arrcoc.config import Config
from arrcoc.console import counting
from arrcoc.demo.placards import FAMILIES, Example, sample, target_tiles
from arrcoc.evaluation.methods import Lab
from arrcoc.glimpse import GlimpseScorer, JointGlimpse
from arrcoc.records import Features, Frame, Scores

SCRIPT = "benchmarks/relevance.py"
RECALL_AT = (4, 8)
"""k of recall@k, besides the number of target tiles."""
CHANCE = "chance"
"""A map that says nothing: what every figure is without looking."""

Map = NDArray[np.float64]
Hit = NDArray[np.bool_]


def auc(scores: Map, hit: Hit) -> float | None:
    """Area under the ROC curve: how often a target outscores another tile, ties by half; None without either.

    The Mann-Whitney statistic over the product of the counts (Hanley and McNeil 1982).
    """
    targets, others = scores[hit], scores[~hit]
    if not targets.size or not others.size:
        return None
    above = targets[:, None] - others
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def recall_at(scores: Map, hit: Hit, k: int) -> float:
    """Share of the target tiles among the k highest; of equal tiles at the border the expected number.

    At least one target; with more targets than k it cannot reach 1.
    """
    k = min(k, scores.size)
    border = np.sort(scores, axis=None)[-k]
    above, tied = scores > border, scores == border
    found = (hit & above).sum() + (hit & tied).sum() * (k - above.sum()) / tied.sum()
    return float(found / hit.sum())


def share_on(scores: Map, hit: Hit) -> float:
    """Share of all relevance that lies on target tiles; that of their area where there is none."""
    total = scores.sum()
    return float(scores[hit].sum() / total) if total > 0 else float(hit.mean())


def judged(scores: Map, hit: Hit) -> dict[str, float | None]:
    """Every figure of one map."""
    found: dict[str, float | None] = {"auc": auc(scores, hit)}
    found["recall_at_targets"] = recall_at(scores, hit, int(hit.sum()))
    found |= {f"recall_at_{k}": recall_at(scores, hit, k) for k in RECALL_AT}
    return found | {"share": share_on(scores, hit)}


@dataclass(frozen=True, slots=True)
class Panel:
    """All scorers of one checkpoint.

    Attributes:
        lab: the checkpoint.
        config: of the images.
        head: the texture head beside the checkpoint, None where there is none.
    """

    lab: Lab
    config: Config
    head: scorers.TextureHead | None

    @classmethod
    def of(cls, lab: Lab) -> Panel:
        """With the texture head, if the model's folder has one."""
        path = Path(lab.qwen.name) / scorers.TEXTURE_HEAD_FILE
        head = scorers.TextureHead.load(path, lab.qwen.width, lab.qwen.device) if path.is_file() else None
        return cls(lab, lab.presets.base, head)

    @torch.inference_mode()
    def maps(self, pixels: Tensor, question: str) -> dict[str, Map]:
        """The map [R, C] of every scorer, by name, of an image uint8 [3, h, w]."""
        qwen, config = self.lab.qwen, self.config
        frame = image.frame(pixels, config, qwen.vision.token_px, qwen.device)
        measured, query = texture.extract(frame, config), qwen.query(question)
        blind = (scorers.propositional(measured, query), scorers.perspectival(measured, query))
        glimpse = JointGlimpse(qwen).encode(frame)
        asking: dict[str, Tensor] = {
            name: self._glimpse_scorer(frame, glimpse, depth)(measured, query)
            for name, depth in probes(config, qwen.n_layers).items()
        }
        coupled = {"glimpse": asking["glimpse"]}
        if self.head is not None:
            coupled["texture head"] = self.head(measured, query)
        found = dict(zip(("propositional", "perspectival"), blind, strict=True)) | asking | coupled
        for name, query_map in coupled.items():
            found[f"balanced, {name}"] = opponent.balance(Scores(*blind, query_map), config).map
        found[CHANCE] = torch.ones_like(blind[0])
        return {name: value.double().cpu().numpy() for name, value in found.items()}

    def _glimpse_scorer(self, frame: Frame, glimpse: Features, depth: tuple[float, ...]) -> GlimpseScorer:
        sides, grid = self.config.sides, frame.grid
        where, extent = sequence.glimpse_positions(grid, sides[0], sides[3]), sequence.extent(grid, sides[3])
        config = self.config.updated({"probe_depth": depth})
        return GlimpseScorer(self.lab.qwen, glimpse, where, extent, grid, config)


def probes(config: Config, layers: int) -> dict[str, tuple[float, ...]]:
    """Probe depths by scorer's name: each decoder layer alone, then the configured mix."""
    single = {f"glimpse, layer {n + 1}": ((n + 0.5) / layers,) for n in range(layers)}
    return {**single, "glimpse": config.probe_depth}


def judge(
    panel: Panel, examples: Sequence[Example], begin: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], list[Shown]]:
    """Figures by scorer and family, and the first example of every family with its maps."""
    rows: list[tuple[str, str, dict[str, float | None]]] = []
    shown: dict[str, Shown] = {}
    for number, example in enumerate(examples):
        begin(f"question {number}")
        maps = panel.maps(torch.from_numpy(example.image).permute(2, 0, 1), example.question)
        hit = target_tiles(example, panel.config.sides[3] * panel.lab.qwen.vision.token_px)
        assert hit.shape == next(iter(maps.values())).shape, "placards are whole tiles, and so not resized"
        rows += [(name, example.family, judged(values, hit)) for name, values in maps.items()]
        shown.setdefault(example.family, Shown(example, maps))
    return averaged(rows), [shown[family] for family in FAMILIES if family in shown]


def averaged(rows: Sequence[tuple[str, str, Mapping[str, float | None]]]) -> dict[str, dict[str, Any]]:
    """Mean over images of every figure with its interval, by scorer and family, `ALL` first.

    An image in which every tile is a target, or none, has no AUC and does not count there.
    """
    made: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row[0] for row in rows):
        made[name] = {}
        for family in families(row[1] for row in rows):
            own = [row[2] for row in rows if row[0] == name and family in (ALL, row[1])]
            known = {figure: [row[figure] for row in own if row[figure] is not None] for figure in own[0]}
            figures = {figure: estimate(values) if values else None for figure, values in known.items()}  # type: ignore[arg-type]
            made[name][family] = {"images": len(own), **figures}
    return made


def main(arguments: Sequence[str]) -> None:
    """Judge the scorers; write JSON and pictures."""
    options = _options(arguments)
    lab = open_lab(options)
    examples = _Examples(options)
    with counting(options.count) as begin:
        found, shown = judge(Panel.of(lab), examples, begin)
    out = Path(options.out)
    result = {"benchmark": "relevance", **facts(SCRIPT, arguments, lab.qwen.device), **about(lab, options)}
    write_result(out, result | {"chance": CHANCE, "scorers": found})
    plot.save(draw_bars(found), out.with_name(f"{out.stem}_bars.png"))
    _lighten(plot.save(draw_maps(shown), out.with_name(f"{out.stem}_maps.png")))


def _lighten(path: Path) -> None:
    """Reduce a PNG to 128 colours: photographs would make it larger than a repository wants."""
    with Image.open(path) as picture:
        fewer = picture.convert("RGB").quantize(128)
    fewer.save(path, optimize=True)


class _Examples(Sequence[Example]):
    """The questions of `arrcoc eval --dataset placards`, drawn when they are asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def __len__(self) -> int:
        return int(self._options.count)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return sample(self._options.seed, index, "test", self._options.canvas)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_options(made, "relevance", 120)
    return made.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
