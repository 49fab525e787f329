"""Judges of every tile: what detail holds, what stands out, and what the question asks for.

All share the signature of `Scorer`. Constants are fixed: no score depends on another image.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import kornia
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from arrcoc.errors import ModelError
from arrcoc.records import Channel, Query, Texture

LUMINANCE_BINS = 16
"""Equal bins of lightness over [-1, 1], 6.25 units of L* each."""
ORIENTATION_BINS = 9
"""Equal bins of gradient orientation over [0, 90] degrees, 10 degrees each."""
DETAIL_HALF = 0.1
"""Detail energy at which a tile has lost half of what it can lose at background LOD."""
CENTRE_SIGMAS = (1.0, 2.0, 4.0)
"""Standard deviations of the centre, in cells."""
SURROUND_RATIO = 4.0
"""The surround's standard deviation over the centre's."""
CONTRAST_HALF = 0.5
"""Centre-surround contrast that scores one half."""
CENTRE_PRIOR = 0.1
"""Share of its score that a cell at the frame's corner loses to one at its centre."""
PEAK_SHARE = 0.1
"""Share of a tile's cells, the highest, whose mean is the tile's saliency."""
TEXTURE_HEAD_FILE = "texture_head.safetensors"
"""Name of the learned texture head's file beside the model."""
TEXTURE_HEAD_FORMAT = "arrcoc-texture-head-1"
_PROBE = "embedding_probe"

_SALIENT = (Channel.LIGHTNESS, Channel.GREEN_RED, Channel.BLUE_YELLOW, Channel.SOBEL_MAGNITUDE)
_TINY = 1e-12


class Scorer(Protocol):
    """Judges every tile of a frame against a question; deterministic, one image at a time."""

    def __call__(self, texture: Texture, query: Query, /) -> Tensor:
        """Return fp32 [R, C] in [0, 1] on the texture's device."""
        ...


def propositional(texture: Texture, query: Query) -> Tensor:
    """How much of a tile would be lost at background LOD, whatever the question; fp32 [R, C] in [0, 1].

    With H_l and H_o the entropies in bits of the tile's luminance and orientation histograms (see
    `luminance_entropy`, `orientation_entropy`) and d the RMS of its detail channel:

        score = d / (d + DETAIL_HALF) * (H_l / log2(LUMINANCE_BINS) + H_o / log2(ORIENTATION_BINS)) / 2

    The product: variety that background LOD shows anyway (a smooth gradient) is no loss, nor is a single
    plain edge much of one. A constant tile scores 0. The way of combining them is this project's own.
    """
    variety = luminance_entropy(texture) / _bits(LUMINANCE_BINS)
    variety = (variety + orientation_entropy(texture) / _bits(ORIENTATION_BINS)) / 2
    energy = _tiles(texture[Channel.DETAIL], texture.cells).square().mean(dim=-1).sqrt()
    return energy / (energy + DETAIL_HALF) * variety.clamp(0, 1)


def luminance_entropy(texture: Texture) -> Tensor:
    """Entropy in bits of each tile's histogram of lightness over its cells, fp32 [R, C].

    `LUMINANCE_BINS` equal bins over [-1, 1]; a constant tile has 0 bits.
    """
    lightness = _tiles(texture[Channel.LIGHTNESS], texture.cells)
    return entropy_bits(_histogram((lightness + 1) / 2, torch.ones_like(lightness), LUMINANCE_BINS))


def orientation_entropy(texture: Texture) -> Tensor:
    """Entropy in bits of each tile's histogram of gradient orientation, fp32 [R, C].

    Orientation is atan2(|gy|, |gx|) in [0, 90] degrees, since the cells hold absolute components, in
    `ORIENTATION_BINS` equal bins; each cell counts with its Sobel magnitude. No gradient gives 0 bits.
    """
    x = _tiles(texture[Channel.SOBEL_X], texture.cells)
    y = _tiles(texture[Channel.SOBEL_Y], texture.cells)
    weight = _tiles(texture[Channel.SOBEL_MAGNITUDE], texture.cells)
    return entropy_bits(_histogram(torch.atan2(y, x) / (torch.pi / 2), weight, ORIENTATION_BINS))


def entropy_bits(weights: Tensor) -> Tensor:
    """Entropy -sum p*log2(p) (Shannon 1948) of p = weights / sum(weights), along the last dimension.

    Weights [..., n] are not negative; all zero gives 0 bits.
    """
    p = weights / weights.sum(dim=-1, keepdim=True).clamp_min(_TINY)
    # 0 - x, not -x: certainty is 0 bits, not minus 0.
    return 0 - (p * p.clamp_min(_TINY).log2()).sum(dim=-1)


def perspectival(texture: Texture, query: Query) -> Tensor:
    """How much a tile stands out from what surrounds it, whatever the question; fp32 [R, C] in [0, 1].

    Centre-surround contrast after Itti, Koch & Niebur (1998): at each scale s of `CENTRE_SIGMAS` the
    absolute difference of Gaussian blurs at s and `SURROUND_RATIO` * s cells, summed over L*, a*, b* and
    Sobel magnitude, averaged over the scales to x. A cell scores x / (x + CONTRAST_HALF), in place of
    their normalisation by the image's maxima, times 1 - CENTRE_PRIOR * eccentricity**2; a tile scores the
    mean of its highest `PEAK_SHARE` of cells.
    """
    blurred = _blurred(torch.stack([texture[channel] for channel in _SALIENT]))
    pairs = [(blurred[sigma], blurred[SURROUND_RATIO * sigma]) for sigma in CENTRE_SIGMAS]
    contrast = torch.stack([(centre - surround).abs().sum(dim=0) for centre, surround in pairs]).mean(dim=0)
    prior = 1 - CENTRE_PRIOR * texture[Channel.ECCENTRICITY].square()
    cells = _tiles(contrast / (contrast + CONTRAST_HALF) * prior, texture.cells)
    count = max(1, round(PEAK_SHARE * cells.shape[-1]))
    return cells.topk(count, dim=-1).values.mean(dim=-1).clamp(0, 1)


def _blurred(maps: Tensor) -> dict[float, Tensor]:
    """Gaussian blurs of maps fp32 [n, h, w] at every standard deviation needed, beyond their edge repeated.

    As `kornia.filters.gaussian_blur2d` with a replicated border and kernels of 2 * round(3 * sigma) + 1 taps.
    Each map is a channel of its own group: of such convolutions torch has kernels in full fp32 on CUDA.
    """
    kernels = _gaussians(maps.device)
    reach = max(kernel.shape[-1] // 2 for kernel in kernels.values())
    # Replicating, unlike reflecting, works for kernels wider than the map.
    bordered = functional.pad(maps[None], (reach, reach, reach, reach), mode="replicate")
    return {sigma: _separable(bordered, kernel, reach) for sigma, kernel in kernels.items()}


def _separable(bordered: Tensor, kernel: Tensor, reach: int) -> Tensor:
    """Correlate [1, n, h + 2*reach, w + 2*reach] with a kernel [t] along both axes: [n, h, w]."""
    count, cut = bordered.shape[1], reach - kernel.shape[0] // 2
    inner = bordered[:, :, cut : bordered.shape[2] - cut, cut : bordered.shape[3] - cut]
    weight = kernel.expand(count, 1, 1, -1)
    wide = functional.conv2d(inner, weight, groups=count)
    return functional.conv2d(wide, weight.transpose(2, 3), groups=count)[0]


@lru_cache(maxsize=16)
def _gaussians(device: torch.device) -> dict[float, Tensor]:
    """A Gaussian kernel fp32 [t] for every standard deviation; kept, as making one waits for the device."""
    sigmas = sorted({scale * sigma for sigma in CENTRE_SIGMAS for scale in (1.0, SURROUND_RATIO)})
    with torch.inference_mode(False):
        make = kornia.filters.get_gaussian_kernel1d
        return {s: make(2 * round(3 * s) + 1, s, dtype=torch.float32)[0].to(device) for s in sigmas}


def _tiles(plane: Tensor, cells: int) -> Tensor:
    """Cells of each tile: [R*cells, C*cells] to [R, C, cells**2]."""
    rows, cols = plane.shape[0] // cells, plane.shape[1] // cells
    return plane.reshape(rows, cells, cols, cells).transpose(1, 2).flatten(2)


def _histogram(values: Tensor, weights: Tensor, bins: int) -> Tensor:
    """Weighted histogram of values in [0, 1] along the last dimension: [..., n] to [..., bins]."""
    index = (values * bins).floor().clamp(0, bins - 1)
    # Every value against every bin, as scatter_add is not deterministic on CUDA.
    member = index[..., None, :] == torch.arange(bins, device=values.device)[:, None]
    return (weights[..., None, :] * member).sum(dim=-1)


def _bits(bins: int) -> float:
    """Greatest entropy of a histogram."""
    return math.log2(bins)


class TextureHead(nn.Module):
    """The learned participatory scorer: a small convolution over the texture, coupled to the question.

    A cell's logit is (f . W e) / sqrt(width) + bias with f its features (3x3 convolutions of dilation 1, 2
    and 4 with GELU and a 1x1 convolution over the 13 channels, so that a cell sees 15 cells along each
    axis) and e the question's embedding, layer-normalised, since the length of token embeddings differs
    from model to model. A tile's logit is the highest of its cells'.

    Args:
        query_dim: width D of the question's embedding.
        width: features per cell.

    Attributes:
        fingerprint: of the model whose embeddings it was fitted to; empty until saved or loaded.
        probe: fp32 [n, D], a few of those embeddings, to tell whether another model has the same; None if
            the head was saved without them.
    """

    def __init__(self, query_dim: int, width: int = 64) -> None:
        super().__init__()
        self.query_dim, self.width, self.fingerprint = query_dim, width, ""
        self.probe: Tensor | None = None
        self.features = nn.Sequential(
            nn.Conv2d(len(Channel), width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=4, dilation=4),
            nn.GELU(),
            nn.Conv2d(width, width, 1),
        )
        self.project = nn.Linear(query_dim, width)
        self.bias = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def forward(self, texture: Texture, query: Query) -> Tensor:
        """Score every tile: fp32 [R, C] in [0, 1]. Not differentiable: train on `logits`."""
        return self.logits(texture.maps[None], query.embedding[None], texture.cells)[0].sigmoid()

    def logits(self, maps: Tensor, embedding: Tensor, cells: int) -> Tensor:
        """Logit of every tile, for training.

        Args:
            maps: [B, 13, R*cells, C*cells], any floating dtype.
            embedding: [B, D] questions, any floating dtype.
            cells: cells along one edge of a tile.

        Returns:
            fp32 [B, R, C].
        """
        assert embedding.shape == (maps.shape[0], self.query_dim), (embedding.shape, self.query_dim)
        query = self.project(functional.layer_norm(embedding.float(), (self.query_dim,)))
        cell = torch.einsum("bdhw,bd->bhw", self._convolve(maps.float()), query) / self.width**0.5
        return functional.max_pool2d(cell + self.bias, cells)

    def _convolve(self, maps: Tensor) -> Tensor:
        """`features`; for inference on CUDA in full fp32, where torch would round to TF32.

        The precision is an argument of each call: torch's own switch is global, and so no thread's to flip.
        """
        if not maps.is_cuda or torch.is_grad_enabled():
            return self.features(maps)  # type: ignore[no-any-return]
        for layer in self.features:
            maps = exact_convolution(layer, maps) if isinstance(layer, nn.Conv2d) else layer(maps)
        return maps

    def fits(self, probe: Tensor) -> bool:
        """Whether the head was fitted to these embeddings, fp32 [n, D], to within rounding to 8 bits."""
        if self.probe is None or self.probe.shape != probe.shape:
            return False
        difference = (self.probe - probe.to(self.probe.device)).norm() / self.probe.norm()
        return bool(difference < 2**-7)

    def save(self, path: str | Path, fingerprint: str, probe: Tensor | None = None) -> None:
        """Write the weights as safetensors; the file appears whole or not at all.

        Args:
            path: the file to write, by custom `TEXTURE_HEAD_FILE` in the model's folder.
            fingerprint: of the model whose embeddings the head was fitted to.
            probe: fp32 [n, D], a few of those embeddings (`QwenVL.embedding_probe`).
        """
        self.fingerprint, self.probe = fingerprint, probe
        sizes = {"query_dim": str(self.query_dim), "width": str(self.width)}
        metadata = {"format": TEXTURE_HEAD_FORMAT, "fingerprint": fingerprint, **sizes}
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.state_dict().items()}
        if probe is not None:
            weights[_PROBE] = probe.detach().float().cpu().contiguous()
        handle, temporary = tempfile.mkstemp(dir=Path(path).parent, suffix=".partial")
        os.close(handle)
        try:
            save_file(weights, temporary, metadata)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, query_dim: int, device: torch.device | str = "cpu") -> TextureHead:
        """Read a head written by `save`, ready for inference on `device`.

        Raises:
            ModelError: the file is missing, damaged, of another format, or for another `query_dim`.
        """
        weights, metadata = _read(Path(path))
        _check_metadata(Path(path), metadata, query_dim)
        try:
            head = cls(query_dim, int(metadata["width"]))
            head.probe = weights.pop(_PROBE, None)
            head.load_state_dict(weights)
        except (KeyError, ValueError, RuntimeError) as error:
            raise _damaged(Path(path), str(error)) from error
        head.fingerprint = metadata.get("fingerprint", "")
        return head.requires_grad_(False).to(device).eval()


def exact_convolution(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    """What a convolution with padding by zeros gives for fp32 [B, in, h, w], whatever torch rounds to."""
    assert isinstance(layer.padding, tuple), "numbers"
    assert layer.padding_mode == "zeros"
    return torch._convolution(
        maps, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation,
        transposed=False, output_padding=(0, 0), groups=layer.groups,
        benchmark=False, deterministic=False, cudnn_enabled=True, allow_tf32=False,
    )  # fmt: skip


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names: Iterable[str] = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _check_metadata(path: Path, metadata: dict[str, str], query_dim: int) -> None:
    if metadata.get("format") != TEXTURE_HEAD_FORMAT:
        raise _damaged(path, f"its format is {metadata.get('format')!r}")
    if metadata.get("query_dim") != str(query_dim):
        raise ModelError(
            f"{path.name} was fitted to embeddings of width {metadata.get('query_dim')}",
            f"width {query_dim}, that of this model",
            "Fit the head anew for this model with `arrcoc fit`, or remove the file",
        )


def _damaged(path: Path, reason: str) -> ModelError:
    detail = (reason.splitlines() or [""])[0]
    remedy = "Copy the file again, fit it anew with `arrcoc fit`, or remove it"
    return ModelError(f"{path} cannot be read ({detail})", f"a file in format {TEXTURE_HEAD_FORMAT}", remedy)
