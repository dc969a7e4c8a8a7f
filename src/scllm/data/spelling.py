"""Correcting gene names that are spelt differently from a vocabulary, where only one gene can be meant."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scllm._typing import IntArray

__all__ = ["ENSEMBL", "Mended", "mend", "strip_version"]

ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{11}(\.\d+)?$", re.IGNORECASE)
# 10x prefixes names with the assembly if the reference has two species
_ASSEMBLY = re.compile(r"^(?:GRC[a-z]\d+|hg\d+|mm\d+|rn\d+)[-_.]+(?=.)", re.IGNORECASE)
_ID_FIRST = re.compile(r"^(ENS[A-Z]*G\d{11})(?:\.\d+)?[|_:;,/ -]+(.+)$")
_ID_LAST = re.compile(r"^(.+?)[|_:;,/ -]+(ENS[A-Z]*G\d{11})(?:\.\d+)?$")
# anndata appends -1, pandas and R .1
_REPEAT = re.compile(r"[-.]\d{1,2}$")
# the only human symbols with lower-case letters
_HUMAN_ORF = re.compile(r"^C(\d+|X|Y)orf\d")
# characters that R's make.names and Seurat replace
_PUNCTUATION = str.maketrans(dict.fromkeys("-_/ :()+@|", "."))


@dataclass(frozen=True)
class Mended:
    """Tokens of gene names after correcting their spelling.

    Parameters
    ----------
    token_ids
        Token of each name, as given or corrected, ``(n_genes,)``; -1 if there is none.
    kinds
        Number of names corrected for each reason.
    examples
        The first corrected name for each reason, with the name that it is read as.
    unclear
        Names that may stand for several genes, or for a gene that is already among the names, each with a gene that
        resembles it.
    other_case
        Names that differ only in case from a gene and may belong to another species, each with that gene.
    """

    token_ids: IntArray
    kinds: Mapping[str, int]
    examples: Mapping[str, tuple[str, str]]
    unclear: Sequence[tuple[str, str]]
    other_case: Sequence[tuple[str, str]]

    @property
    def n(self) -> int:
        """Number of names that were corrected."""
        return sum(self.kinds.values())

    def __str__(self) -> str:
        return ", ".join(
            f"{n:,} {kind} ({self.examples[kind][0]!r} is read as {self.examples[kind][1]!r})"
            for kind, n in self.kinds.items()
        )


def mend(names: Sequence[str], token_ids: IntArray, id_of: Mapping[str, int]) -> Mended:
    """Find the tokens of names that have none (-1) by correcting their spelling, where that is unambiguous.

    The following are ignored: surrounding blanks, an assembly prefix, an Ensembl id next to the symbol, the number that
    makes repeated names unique, and punctuation that R changes. A token is given only if no other name has or would get
    it. Case is corrected if most names are spelt as in the vocabulary, but not between the spellings of two species
    (``Actb`` and ``ACTB``).
    """
    if (token_ids >= 0).all():
        return Mended(token_ids, {}, {}, (), ())
    alike, folded = _unique(id_of, _loose), _unique(id_of, _folded)
    found: dict[int, tuple[str, str, int]] = {}  # place: kind, what it is read as, token
    other_case: dict[int, tuple[str, str, int]] = {}
    for place in np.flatnonzero(token_ids < 0).tolist():
        if (hit := _meant(names[place], id_of, alike)) is not None:
            found[place] = hit
        elif (hit := _in_other_case(names[place], folded)) is not None:
            other_case[place] = hit
    n_known = int((token_ids >= 0).sum()) + len(found)
    if n_known >= len(other_case):
        same = {place: hit for place, hit in other_case.items() if not _of_two_species(hit[1], hit[0])}
        found |= {place: ("with different case", token, i) for place, (_, token, i) in same.items()}
        other_case = {place: hit for place, hit in other_case.items() if place not in same}
    taken = Counter(token_ids[token_ids >= 0].tolist())
    taken.update(token for _, _, token in found.values())
    mended, kinds, unclear = token_ids.copy(), Counter[str](), []
    examples: dict[str, tuple[str, str]] = {}
    for place, (kind, meant, token) in found.items():
        if taken[token] > 1:
            unclear.append((names[place], meant))
            continue
        mended[place] = token
        kinds[kind] += 1
        examples.setdefault(kind, (names[place], meant))
    return Mended(
        mended, kinds, examples, unclear, [(names[place], token) for place, (_, token, _) in other_case.items()]
    )


def strip_version(names: Iterable[str]) -> list[str]:
    """Convert names to strings, and Ensembl ids to upper case without version (``ENSG00000141510.17``: no ``.17``)."""
    names = [str(name) for name in names]
    return [name.split(".")[0].upper() if ENSEMBL.match(name) else name for name in names]


def _meant(name: str, id_of: Mapping[str, int], alike: Mapping[str, tuple[str, int]]) -> tuple[str, str, int] | None:
    """Return the kind of correction, the corrected name and its token; ``None`` if no correction gives a gene."""
    forms = list(_forms(name))
    for kind, form in forms:
        if form in id_of:
            return kind, form, id_of[form]
    for kind, form in [("with different punctuation", name), *forms]:
        for loose in (_loose(form), _loose(form[1:]) if re.match(r"X\d", form) else ""):
            if loose in alike:
                return kind, *alike[loose]
    for _, form in [("", name), *forms]:
        base = _REPEAT.sub("", form)
        if base != form and (base in id_of or _loose(base) in alike):
            meant = (base, id_of[base]) if base in id_of else alike[_loose(base)]
            return "numbered as repeats", *meant
    return None


def _forms(name: str) -> Iterator[tuple[str, str]]:
    """Yield the parts of a name that may be the gene, the most certain first."""
    bare = name.strip()
    if bare != name:
        yield "with surrounding blanks", strip_version([bare])[0]
    rest = _ASSEMBLY.sub("", bare)
    if rest != bare:
        yield "with an assembly prefix", strip_version([rest])[0]
    if (pair := _ID_FIRST.match(rest) or _ID_LAST.match(rest)) is not None:
        for part in sorted(pair.groups(), key=lambda part: ENSEMBL.match(part) is None):
            yield "with an Ensembl id and a symbol", part


def _in_other_case(name: str, folded: Mapping[str, tuple[str, int]]) -> tuple[str, str, int] | None:
    """The name without what surrounds it, and the gene that differs from it in case only."""
    for form in (name, *(form for _, form in _forms(name))):
        if _folded(form) in folded:
            return form, *folded[_folded(form)]
    return None


def _of_two_species(gene: str, name: str) -> bool:
    """Whether one name is spelt as in human (``ACTB``) and the other as in mouse or zebrafish (``Actb``, ``actb``)."""
    upper, other = (gene, name) if gene.isupper() else (name, gene)
    is_human = not upper.isupper() or _HUMAN_ORF.match(other) is not None
    return not is_human and other in (other.capitalize(), other.lower())


def _unique(id_of: Mapping[str, int], change: object) -> dict[str, tuple[str, int]]:
    """Map changed names that belong to only one token to its name and id; special tokens are skipped."""
    found: dict[str, tuple[str, int]] = {}
    twice = set()
    for name, token in id_of.items():
        if name.startswith("<"):
            continue
        key = change(name)  # type: ignore[operator]
        if found.setdefault(key, (name, token))[1] != token:
            twice.add(key)
    return {key: meant for key, meant in found.items() if key not in twice}


def _loose(name: str) -> str:
    return name.translate(_PUNCTUATION)


def _folded(name: str) -> str:
    return name.translate(_PUNCTUATION).casefold()
