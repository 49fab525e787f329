"""The records that pass from stage to stage: plain data, no behaviour beyond shape arithmetic.

Letters used in shapes: R, C rows and columns of tiles; K tiles; s side (tokens along one edge of an
encoded tile); n vision tokens; L DeepStack planes; D width of the text model; S side of LOD high.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from torch import Tensor


class Lod(IntEnum):
    """Level of detail of one tile; the value indexes `Config.sides`."""

    BACKGROUND = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3


class _Word(str, Enum):
    """A string with a name; it prints as the string, as `enum.StrEnum` of Python 3.11 does."""

    __str__ = str.__str__


class Layout(_Word):
    """How overview and tiles are laid out in the prompt (see `arrcoc.sequence`)."""

    REPLACE = "replace"
    REFINE = "refine"
    CROPS = "crops"


class Channel(_Word):
    """The 13 texture channels, in the order in which `Texture.maps` holds them."""

    RED = "red"
    GREEN = "green"
    BLUE = "blue"
    LIGHTNESS = "lightness"
    GREEN_RED = "green_red"
    BLUE_YELLOW = "blue_yellow"
    SOBEL_X = "sobel_x"
    SOBEL_Y = "sobel_y"
    SOBEL_MAGNITUDE = "sobel_magnitude"
    Y = "y"
    X = "x"
    ECCENTRICITY = "eccentricity"
    DETAIL = "detail"

    @property
    def row(self) -> int:
        """Row of this channel in `Texture.maps`."""
        return _CHANNEL_ROW[self]


_CHANNEL_ROW = {channel: row for row, channel in enumerate(Channel)}


@dataclass(frozen=True, slots=True)
class Grid:
    """Tiles of a frame: `rows` x `cols` squares of `tile` pixels."""

    rows: int
    cols: int
    tile: int

    @property
    def count(self) -> int:
        """Number of tiles, R*C."""
        return self.rows * self.cols

    @property
    def height(self) -> int:
        """Frame height in pixels."""
        return self.rows * self.tile

    @property
    def width(self) -> int:
        """Frame width in pixels."""
        return self.cols * self.tile

    def shape_in_tokens(self, side: int, stride: int = 1) -> tuple[int, int]:
        """Rows and columns of tokens of the whole frame at `side` tokens a tile, one for every `stride`."""
        return -(-self.rows * side // stride), -(-self.cols * side // stride)


@dataclass(frozen=True, slots=True)
class Frame:
    """An image on the device, resized so that its edges are whole tiles.

    Attributes:
        pixels: uint8 [3, R*tile, C*tile], RGB.
        background: uint8 [3, R*t0, C*t0], the frame at LOD background (t0 = background side in pixels).
        grid: the tile grid.
        hashes: int64 [R*C, 4], content hash of each tile's pixels (128 bits, 32 to a word), raster order, on
            the device or the host;
            [0, 4] where tiles are encoded with a halo, for they are told apart by more than their own pixels.
        source: height and width of the image after its EXIF orientation, in pixels.
        content: height and width of the part of the frame that shows the image; what lies below and
            to the right of it repeats the image's edge.
        distortion: relative change of the aspect ratio made by the resize, 0 for none:
            max(sy/sx, sx/sy) - 1 with sy, sx the vertical and horizontal scale.
        scale: frame pixels per source pixel, geometric mean of both axes.
    """

    pixels: Tensor
    background: Tensor
    grid: Grid
    hashes: Tensor
    source: tuple[int, int]
    content: tuple[int, int]
    distortion: float
    scale: float


@dataclass(frozen=True, slots=True)
class Texture:
    """Thirteen named feature maps of a frame.

    Attributes:
        maps: fp16 [13, R*cells, C*cells], each channel scaled by fixed constants to about [-1, 1].
        grid: the tile grid.
        cells: cells along one edge of a tile.
    """

    maps: Tensor
    grid: Grid
    cells: int

    def __getitem__(self, channel: Channel) -> Tensor:
        """One channel as fp32 [R*cells, C*cells]."""
        return self.maps[channel.row].float()


@dataclass(frozen=True, slots=True)
class Query:
    """A question, as text and as the model's own embedding of it.

    Attributes:
        text: the question.
        ids: its token ids, without any chat template.
        embedding: fp32 [D], mean of the token embeddings.
    """

    text: str
    ids: tuple[int, ...]
    embedding: Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Three relevance maps, each fp32 [R, C] in [0, 1]."""

    propositional: Tensor
    perspectival: Tensor
    participatory: Tensor


class Tensions(NamedTuple):
    """The three opponent tensions, each in [-1, 1]; positive towards the second word.

    Fields hold 0-d fp32 tensors while on the device and floats once the plan has been read.
    """

    compress_particularize: Tensor | float
    explore_exploit: Tensor | float
    diversify_focus: Tensor | float


@dataclass(frozen=True, slots=True)
class Relevance:
    """What opponent processing made of the scores.

    Attributes:
        map: fp32 [R, C] in [0, 1].
        tensions: the three tensions that made it.
    """

    map: Tensor
    tensions: Tensions


@dataclass(frozen=True, slots=True)
class Plan:
    """The level of detail of every tile, and so the exact number of vision tokens.

    Attributes:
        lod: int64 [R, C] on the CPU, values of `Lod`.
        relevance: fp32 [R, C] on the CPU, the map the plan was made from.
        tensions: as floats.
        sides: tokens along a tile's edge for each LOD.
        layout: how tokens are laid out.
        overview_stride: glimpse tokens along each axis to one token of the overview that is part of the
            sequence: 1 is the glimpse itself, 0 no overview.
        tokens: vision tokens in all; never above `budget`.
        budget: the most tokens allowed.
        full_tokens: tokens of the whole frame at LOD high.
    """

    lod: Tensor
    relevance: Tensor
    tensions: Tensions
    sides: tuple[int, int, int, int]
    layout: Layout
    overview_stride: int
    tokens: int
    budget: int
    full_tokens: int


@dataclass(frozen=True, slots=True)
class Features:
    """Vision features of K equally large pieces of an image.

    Attributes:
        tokens: [K, m, D] merged tokens, raster order.
        deepstack: [L, K, m, D] DeepStack planes, raster order.
    """

    tokens: Tensor
    deepstack: Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """Encoded tiles of one LOD.

    Attributes:
        lod: their level of detail.
        side: tokens along a tile's edge.
        index: int64 [K] on the CPU, raster indices of the tiles, ascending.
        features: their features, m = side**2.
    """

    lod: Lod
    side: int
    index: Tensor
    features: Features


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of vision tokens that stands between its own vision_start and vision_end.

    Attributes:
        start: first token of the run in the image's tokens.
        stop: one past its last token.
        extent: what the run adds to the text position after it, in merged tokens.
        caption: text placed before the run, empty for none.
    """

    start: int
    stop: int
    extent: float
    caption: str


@dataclass(frozen=True, slots=True)
class VisionSequence:
    """The vision tokens of one image, laid out.

    Attributes:
        tokens: [n, D].
        deepstack: [L, n, D].
        positions: fp32 [3, n] (t, h, w), relative to the position at which each segment starts.
        segments: consecutive runs that together cover the n tokens.
    """

    tokens: Tensor
    deepstack: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A whole prompt, ready for the decoder.

    Attributes:
        embeds: [1, N, D] text and vision embeddings.
        positions: fp32 [3, N] M-RoPE positions.
        vision: bool [N], True where a vision token stands.
        deepstack: [L, n, D] planes of the vision tokens, in order.
        next_position: position of the first generated token.
        text_ids: ids of the text's tokens, in order; empty where they are not known.
    """

    embeds: Tensor
    positions: Tensor
    vision: Tensor
    deepstack: Tensor
    next_position: float
    text_ids: tuple[int, ...] = ()
