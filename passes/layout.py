"""Places boxes in ranks, one below the other, so that few edges cross and most run straight down.

In: the boxes' sizes and ranks, and edges that lead from a lower rank to a higher one. Out: coordinates of boxes and bends of
edges. The method is Sugiyama's (1981): an edge over several ranks gets a bend in each, ranks are ordered by barycentres, and
positions are the least-squares fit to the neighbours' that leaves no overlap. No edge runs through a box that is not its own.
No model and no graph library is known here.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SWEEPS = 48
STRAIGHT = 8.0  # how much more a bend follows a bend than a box
COLUMN_GAP, RANK_GAP = 18.0, 30.0
BEND = 10.0  # room that a passing edge gets
LOW_RANK = 60.0  # an edge may slant past the boxes of a rank lower than this, if it touches none
CLEAR = 4.0  # how near an edge may come to a box that is not its own
SAMPLES = 12  # points of a curve's piece at which it is looked at
Point = tuple[float, float]
Cubic = tuple[Point, Point, Point, Point]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`left` and `top` of each box, the points of each edge from its source's bottom to its target's top, and the picture's size.

    `ranks` gives top and bottom of each rank.
    """

    left: list[float]
    top: list[float]
    routes: list[list[Point]]
    ranks: list[tuple[float, float]]
    width: float
    height: float


def place(
    sizes: Sequence[tuple[float, float]], ranks: Sequence[int], edges: Sequence[tuple[int, int]], extra: Sequence[float] = ()
) -> Placement:
    """Place boxes of `sizes` (width, height). `extra[r]` is space above rank r, for a heading; missing entries are 0."""
    count = max(ranks, default=-1) + 1
    widths, levels, chains = [w for w, _ in sizes], list(ranks), list[list[int]]()
    links: list[tuple[int, int]] = []
    for source, target in edges:
        assert ranks[source] < ranks[target], "edges lead down"
        chain = [source]
        for level in range(ranks[source] + 1, ranks[target]):
            chain.append(len(widths))
            widths.append(BEND)
            levels.append(level)
        chain.append(target)
        chains.append(chain)
        links += itertools.pairwise(chain)
    rows: list[list[int]] = [[] for _ in range(count)]
    for item, level in enumerate(levels):
        rows[level].append(item)
    above: list[list[int]] = [[] for _ in widths]
    below: list[list[int]] = [[] for _ in widths]
    for a, b in links:
        below[a].append(b)
        above[b].append(a)
    centre = _centres(rows, widths, above, below, len(sizes))
    _gather(rows, widths, below, centre)
    ranges = _rank_heights(rows, sizes, extra)
    left_edge = min((centre[i] - widths[i] / 2 for i in range(len(widths))), default=0.0)
    centre = [c - left_edge for c in centre]
    top = [ranges[ranks[i]][0] + (ranges[ranks[i]][1] - ranges[ranks[i]][0] - h) / 2 for i, (_, h) in enumerate(sizes)]
    left = [centre[i] - w / 2 for i, (w, _) in enumerate(sizes)]
    boxes: list[list[tuple[int, float, float, float, float]]] = [[] for _ in ranges]
    for i, (w, h) in enumerate(sizes):
        boxes[ranks[i]].append((i, left[i], top[i], left[i] + w, top[i] + h))

    def route(chain: list[int], slanting: bool) -> list[Point]:
        source, target = chain[0], chain[-1]
        points = [(centre[source], top[source] + sizes[source][1])]
        points += [] if slanting else [(centre[source], ranges[levels[source]][1])]
        for bend in chain[1:-1]:
            upper, lower = ranges[levels[bend]]
            low = slanting and lower - upper < LOW_RANK
            points += [(centre[bend], (upper + lower) / 2)] if low else [(centre[bend], upper), (centre[bend], lower)]
        points += [] if slanting else [(centre[target], ranges[levels[target]][0])]
        return [*points, (centre[target], top[target])]

    def touches(points: list[Point], own: tuple[int, int]) -> bool:
        for x, y in (point for piece in curve(points) for point in samples(piece)):
            rank = bisect.bisect(ranges, y, key=lambda pair: pair[0]) - 1
            for i, west, north, east, south in boxes[rank] if rank >= 0 else []:
                if i not in own and west - CLEAR < x < east + CLEAR and north - CLEAR < y < south + CLEAR:
                    return True
        return False

    routes = []
    for chain in chains:
        slanting = route(chain, True)
        routes.append(route(chain, False) if touches(slanting, (chain[0], chain[-1])) else slanting)
    return Placement(
        left=left,
        top=top,
        routes=routes,
        ranks=ranges,
        width=max((centre[i] + widths[i] / 2 for i in range(len(widths))), default=0.0),
        height=ranges[-1][1] if ranges else 0.0,
    )


def curve(points: Sequence[Point]) -> list[Cubic]:
    """Return a smooth path down through all points, vertical at its ends, as Bézier pieces.

    Cubic Hermite in y with the slopes of Fritsch and Carlson (1980): between two points it never leaves their columns.
    """
    points = [point for k, point in enumerate(points) if not k or point[1] > points[k - 1][1]]
    steps = [(u - x) / (v - y) for (x, y), (u, v) in itertools.pairwise(points)]
    slopes = [0.0, *(2 * a * b / (a + b) if a * b > 0 else 0.0 for a, b in itertools.pairwise(steps)), 0.0]
    pieces = []
    for ((x, y), (u, v)), (a, b) in zip(itertools.pairwise(points), itertools.pairwise(slopes), strict=True):
        third = (v - y) / 3
        pieces.append(((x, y), (x + a * third, y + third), (u - b * third, v - third), (u, v)))
    return pieces


def samples(piece: Cubic) -> list[Point]:
    """Return points of a Bézier piece."""
    (a, b, c, d), out = piece, list[Point]()
    for k in range(SAMPLES + 1):
        t = k / SAMPLES
        weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
        x, y = (sum(w * p[axis] for w, p in zip(weights, (a, b, c, d), strict=True)) for axis in (0, 1))
        out.append((x, y))
    return out


def _rank_heights(
    rows: list[list[int]], sizes: Sequence[tuple[float, float]], extra: Sequence[float]
) -> list[tuple[float, float]]:
    ranges, y = [], 0.0
    for level, row in enumerate(rows):
        y += extra[level] if level < len(extra) else 0.0
        height = max((sizes[i][1] for i in row if i < len(sizes)), default=0.0)
        ranges.append((y, y + height))
        y += height + RANK_GAP
    return ranges


def _centres(
    rows: list[list[int]], widths: list[float], above: list[list[int]], below: list[list[int]], boxes: int
) -> list[float]:
    """Order every rank and fit its positions, sweeping down and up in turn. Items from `boxes` on are bends."""
    centre = [0.0] * len(widths)
    for row in rows:
        _fit(row, [0.0] * len(row), [1.0] * len(row), widths, centre)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in rows if down else rows[::-1]:
            order = sweep < SWEEPS // 2
            wishes, weights = dict[int, float](), dict[int, float]()
            for i in row:
                # Once the order stands, both sides count.
                near = neighbours[i] if order else above[i] + below[i]
                # A bend keeps to its bends: long edges run straight, and boxes give way.
                pulls = [(centre[n], STRAIGHT if i >= boxes and n >= boxes else 1.0) for n in near]
                weights[i] = sum(w for _, w in pulls)
                wishes[i] = sum(c * w for c, w in pulls) / weights[i] if pulls else centre[i]
            if order:
                row.sort(key=wishes.__getitem__)
            _fit(row, [wishes[i] for i in row], [max(weights[i], 0.1) for i in row], widths, centre)
    return centre


def _fit(row: list[int], wishes: list[float], weights: list[float], widths: list[float], centre: list[float]) -> None:
    """Write the positions nearest to `wishes` (least squares) that keep the row's order and gaps: pooled adjacent violators."""
    offsets, offset = [], 0.0
    for k, item in enumerate(row):
        if k:
            offset += (widths[row[k - 1]] + widths[item]) / 2 + COLUMN_GAP
        offsets.append(offset)
    pools: list[tuple[float, float, int]] = []  # weighted mean of (wish - offset), weight, members
    for wish, weight, offset in zip(wishes, weights, offsets, strict=True):
        mean, members = wish - offset, 1
        while pools and pools[-1][0] > mean:
            other, heavy, more = pools.pop()
            mean, weight = (mean * weight + other * heavy) / (weight + heavy), weight + heavy
            members += more
        pools.append((mean, weight, members))
    fitted = [mean for mean, _, members in pools for _ in range(members)]
    for item, mean, offset in zip(row, fitted, offsets, strict=True):
        centre[item] = mean + offset


def _gather(rows: list[list[int]], widths: list[float], below: list[list[int]], centre: list[float]) -> None:
    """Move parts that no edge connects together: the largest stays, each other comes as near as the ranks permit."""
    part = list(range(len(widths)))

    def root(item: int) -> int:
        while part[item] != item:
            item = part[item]
        return item

    for item, others in enumerate(below):
        for other in others:
            part[root(item)] = root(other)
    members: dict[int, list[int]] = {}
    for item in range(len(widths)):
        members.setdefault(root(item), []).append(item)
    level = {item: number for number, row in enumerate(rows) for item in row}
    taken: dict[int, tuple[float, float]] = {}
    for items in sorted(members.values(), key=len, reverse=True):
        spans: dict[int, tuple[float, float]] = {}
        for item in items:
            _widen(spans, level[item], centre[item] - widths[item] / 2, centre[item] + widths[item] / 2)
        to_the_left = [taken[r][0] - spans[r][1] - COLUMN_GAP for r in spans.keys() & taken.keys()]
        to_the_right = [taken[r][1] - spans[r][0] + COLUMN_GAP for r in spans.keys() & taken.keys()]
        shift = min(min(to_the_left), max(to_the_right), key=abs) if to_the_left else 0.0
        for item in items:
            centre[item] += shift
        for number, (left, right) in spans.items():
            _widen(taken, number, left + shift, right + shift)


def _widen(spans: dict[int, tuple[float, float]], number: int, left: float, right: float) -> None:
    old = spans.get(number, (left, right))
    spans[number] = min(old[0], left), max(old[1], right)
