"""One weight matrix of a model: a canonical name, a shape, and the two spaces it joins.

Orientation is always ``(d_out, d_in)``, ``y = W x + b`` (the `nn.Linear` convention), whatever
the checkpoint stores.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mi_weightspace.core.errors import SiteError
from mi_weightspace.core.space import Space

Kind = Literal[
    "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out", "embed", "unembed"
]
KINDS: tuple[Kind, ...] = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.o",
    "mlp.gate",
    "mlp.in",
    "mlp.out",
    "embed",
    "unembed",
)
Side = Literal["read", "write"]
SIDES: tuple[Side, ...] = ("read", "write")


@dataclass(frozen=True)
class Site:
    """A weight matrix.

    Attributes:
        name: canonical name, ``blocks.5.mlp.out``, ``embed`` or ``unembed``.
        kind: what it does (``mlp.out`` …); `layer` is None for ``embed`` and ``unembed``.
        d_out, d_in: shape of the canonical matrix ``(d_out, d_in)``.
        reads, writes: the spaces of its input and output. For a matrix behind a pre-norm, `reads`
            is the stream *before* the norm (`reads_through_norm` is then True); for a matrix
            in front of a post-norm, `writes` is the stream (`writes_through_norm` is then True).
        n_heads, d_head: heads among the rows of q/k/v (k/v: key-value heads) or among the columns
            of o; 0 elsewhere.
    """

    name: str
    kind: Kind
    layer: int | None
    d_out: int
    d_in: int
    reads: Space
    writes: Space
    reads_through_norm: bool = False
    writes_through_norm: bool = False
    n_heads: int = 0
    d_head: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def stream_sides(self) -> tuple[Side, ...]:
        """The sides whose space is the residual stream, where stream directions project."""
        sides: list[Side] = []
        if self.reads.is_stream:
            sides.append("read")
        if self.writes.is_stream:
            sides.append("write")
        return tuple(sides)

    def space(self, side: Side) -> Space:
        return self.reads if side == "read" else self.writes

    def width(self, side: Side) -> int:
        return self.d_in if side == "read" else self.d_out


def select_sites(sites: Iterable[Site], select: str | Sequence[str] | None) -> list[Site]:
    """Sites whose names match any of the globs (comma-separated or a sequence); None is all.

    Raises:
        SiteError: when a glob matches nothing; the message offers the nearest names.
    """
    every = list(sites)
    if select is None:
        return every
    globs = [g.strip() for g in select.split(",")] if isinstance(select, str) else list(select)
    chosen: list[Site] = []
    for glob in globs:
        found = [site for site in every if fnmatch.fnmatchcase(site.name, glob)]
        if not found:
            names = [site.name for site in every]
            near = difflib.get_close_matches(glob.replace("*", "0"), names, n=3, cutoff=0.3)
            raise SiteError(
                f"site pattern {glob!r}",
                given="a pattern that matches no site",
                expected=f"a glob over {len(names)} sites such as {near or names[:3]}",
                remedy="List them with `mi-weightspace sites MODEL`.",
            )
        chosen.extend(site for site in found if site not in chosen)
    return [site for site in every if site in chosen]
