"""The families of questions: what is put on the canvas so that answers balance, and what the answer is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from arrcoc.demo.placards.layout import CORNERS, corner_of
from arrcoc.demo.placards.records import Ask, Kind, Placard, Rng, Spec
from arrcoc.demo.placards.vocabulary import COLOURS, SHAPES, Split, codes, neighbours

FAMILIES = ("read", "find", "count", "exists", "where", "compare")
"""Families that need nothing but this package; "picture" needs the package easy-vqa besides."""

MOST_COUNTED = 5
NEAR = 0.5
"""Probability of each near miss: a sign or a code that almost fits."""

_COLOURS = tuple(COLOURS)


class Draft(NamedTuple):
    """A question and the placards to draw for it, in drawing order."""

    ask: Ask
    specs: tuple[Spec, ...]


def compose(rng: Rng, family: str, count: int, split: Split) -> Draft:
    """Invent a question of a family and `count` placards (compare needs two) with codes of the split."""
    ask, specs = _COMPOSERS[family](rng, count, split)
    order = rng.permutation(len(specs))
    return Draft(ask, tuple(specs[i] for i in order))


def answer(ask: Ask, placards: Sequence[Placard], height: int, width: int) -> str:
    """Answer of a question from the record of the placards alone (not for pictures).

    Codes as written; colours and shapes by name; counts in digits; yes or no; corners as in `CORNERS`.
    """
    matching = [[p for p in placards if kind.matches(p.colour, p.shape)] for kind in ask.kinds]
    if ask.family == "find":
        (found,) = (p for p in placards if p.code == ask.code)
        return found.colour if ask.form == "find.colour" else found.shape
    if ask.family == "count":
        return str(len(matching[0]))
    if ask.family == "exists":
        return "yes" if matching[0] else "no"
    named = [only for (only,) in matching]
    if ask.family == "read":
        return named[0].code
    if ask.family == "where":
        corner = corner_of(named[0].box, height, width)
        assert corner is not None, "the sign of a where question lies clear of the middle"
        return corner
    if ask.form == "compare.same":
        return "yes" if named[0].code == named[1].code else "no"
    return min(named[0].code, named[1].code)


def targets(ask: Ask, placards: Sequence[Placard]) -> tuple[Placard, ...]:
    """Placards that must be seen in detail to answer.

    The signs that the question names; all placards for find, as any may carry the code; for a count of
    none and for a sign that does not exist, those that share its colour or shape, or else all.
    """
    if ask.family == "find":
        return tuple(placards)
    named = tuple(p for p in placards if any(kind.matches(p.colour, p.shape) for kind in ask.kinds))
    if named or not ask.kinds:
        return named
    near = tuple(p for p in placards if any(p.colour == k.colour or p.shape == k.shape for k in ask.kinds))
    return near or tuple(placards)


def _read(rng: Rng, count: int, split: Split) -> tuple[Ask, list[Spec]]:
    target, *others = _unique_kinds(rng, count)
    specs = _coded(rng, [target, *others], split)
    return Ask("read", "read", kinds=(target,)), specs


def _where(rng: Rng, count: int, split: Split) -> tuple[Ask, list[Spec]]:
    target, *others = _unique_kinds(rng, count)
    first, *rest = _coded(rng, [target, *others], split)
    first = first._replace(corner=CORNERS[rng.integers(4)])
    return Ask("where", "where", kinds=(target,)), [first, *rest]


def _find(rng: Rng, count: int, split: Split) -> tuple[Ask, list[Spec]]:
    specs = _coded(rng, _unique_kinds(rng, count), split)
    if count > 1 and rng.random() < NEAR:
        specs[1] = specs[1]._replace(code=_near_code(rng, specs[0].code, specs))
    form = "find.colour" if rng.random() < 0.5 else "find.shape"
    return Ask("find", form, code=specs[0].code), specs


def _count(rng: Rng, count: int, split: Split) -> tuple[Ask, list[Spec]]:
    """As many matching signs as a fair draw from 0 to five says."""
    by_colour = rng.random() < 0.5
    asked = Kind(_pick(rng, _COLOURS), None) if by_colour else Kind(None, _pick(rng, SHAPES))
    hits = int(rng.integers(0, min(MOST_COUNTED, count) + 1))
    kinds = [_kind_of(rng, asked) for _ in range(hits)] + [
        _kind_unlike(rng, [asked]) for _ in range(count - hits)
    ]
    return Ask("count", "count", kinds=(asked,)), _coded(rng, kinds, split)


def _exists(rng: Rng, count: int, split: Split) -> tuple[Ask, list[Spec]]:
    """The same near misses whether the answer is yes or no, so that they give nothing away."""
    asked = _kind_of(rng, Kind(None, None))
    kinds = [asked] if rng.random() < 0.5 else []
    near = [Kind(asked.colour, None), Kind(None, asked.shape)]
    rng.shuffle(near)
    for wanted in near:
        if len(kinds) < count and (not kinds or rng.random() < 0.8):
            kinds.append(_near_kind(rng, wanted, asked))
    kinds += [_kind_unlike(rng, [asked]) for _ in range(count - len(kinds))]
    return Ask("exists", "exists", kinds=(asked,)), _coded(rng, kinds, split)


def _compare(rng: Rng, count: int, split: Split) -> tuple[Ask, list[Spec]]:
    kinds = _unique_kinds(rng, count)
    specs = _coded(rng, kinds, split)
    asked = (kinds[0], kinds[1])
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            specs[1] = specs[1]._replace(code=specs[0].code)
        elif rng.random() < NEAR:
            specs[1] = specs[1]._replace(code=_near_code(rng, specs[0].code, specs))
        return Ask("compare", "compare.same", kinds=asked), specs
    # Digits have no place in the alphabet, and equal first letters would turn on the second glyph.
    taken = {spec.code for spec in specs}
    first = _draw_code(rng, split, lambda code: code[0].isalpha() and code not in taken)
    second = _draw_code(
        rng, split, lambda code: code[0].isalpha() and code[0] != first[0] and code not in taken
    )
    specs[:2] = [specs[0]._replace(code=first), specs[1]._replace(code=second)]
    return Ask("compare", "compare.first", kinds=asked), specs


_COMPOSERS: dict[str, Callable[[Rng, int, Split], tuple[Ask, list[Spec]]]] = {
    "read": _read,
    "find": _find,
    "count": _count,
    "exists": _exists,
    "where": _where,
    "compare": _compare,
}


def _pick(rng: Rng, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _kind_of(rng: Rng, kind: Kind) -> Kind:
    """A colour and a shape, drawn where the kind leaves them open."""
    return Kind(kind.colour or _pick(rng, _COLOURS), kind.shape or _pick(rng, SHAPES))


def _kind_unlike(rng: Rng, avoid: Iterable[Kind]) -> Kind:
    return _near_kind(rng, Kind(None, None), *avoid)


def _near_kind(rng: Rng, wanted: Kind, *avoid: Kind) -> Kind:
    """A kind within `wanted` that none of `avoid` matches."""
    while True:
        kind = _kind_of(rng, wanted)
        if not any(other.matches(str(kind.colour), str(kind.shape)) for other in avoid):
            return kind


def _unique_kinds(rng: Rng, count: int) -> list[Kind]:
    """Distinct kinds; the second often shares the first one's colour, the third its shape."""
    kinds = [_kind_of(rng, Kind(None, None))]
    near = (Kind(kinds[0].colour, None), Kind(None, kinds[0].shape))
    while len(kinds) < count:
        wanted = near[len(kinds) - 1] if len(kinds) < 3 and rng.random() < NEAR else Kind(None, None)
        kinds.append(_near_kind(rng, wanted, *kinds))
    return kinds


def _coded(rng: Rng, kinds: Iterable[Kind], split: Split) -> list[Spec]:
    """Give each kind a code of its own."""
    taken: set[str] = set()
    specs = []
    for kind in kinds:
        code = _draw_code(rng, split, lambda code: code not in taken)
        taken.add(code)
        specs.append(Spec(str(kind.colour), str(kind.shape), code))
    return specs


def _draw_code(rng: Rng, split: Split, accept: Callable[[str], bool]) -> str:
    while True:
        code = _pick(rng, codes(split))
        if accept(code):
            return code


def _near_code(rng: Rng, code: str, specs: Sequence[Spec]) -> str:
    """A code of the same split that differs in one glyph and that no sign carries yet."""
    taken = {spec.code for spec in specs}
    return _pick(rng, [other for other in neighbours(code) if other not in taken])
