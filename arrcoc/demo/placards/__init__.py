"""Signs with codes on large canvases, and questions about them: a proving ground for few tokens."""

from arrcoc.demo.placards.dataset import PICTURE, PlacardDataset, families_for, placard_range, sample
from arrcoc.demo.placards.labels import MOST_EVIDENCE, NO_GLYPH, evidence, glyph_labels, target_tiles
from arrcoc.demo.placards.questions import FAMILIES
from arrcoc.demo.placards.records import Ask, Example, Kind, Picture, Placard
from arrcoc.demo.placards.sheet import contact_sheet
from arrcoc.demo.placards.vocabulary import ALPHABET, COLOURS, SHAPES, Split, split_of

__all__ = [
    "ALPHABET",
    "COLOURS",
    "FAMILIES",
    "MOST_EVIDENCE",
    "NO_GLYPH",
    "PICTURE",
    "SHAPES",
    "Ask",
    "Example",
    "Kind",
    "Picture",
    "Placard",
    "PlacardDataset",
    "Split",
    "contact_sheet",
    "evidence",
    "families_for",
    "glyph_labels",
    "placard_range",
    "sample",
    "split_of",
    "target_tiles",
]
