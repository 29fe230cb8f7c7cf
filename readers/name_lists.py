"""Lists of classes as people write them: a name a line, or a value and a name."""

import re

from ground.errors import UserError
from readers.pictures import brief

_HEADER = re.compile(  # the first line of tables
    r"# .*|(name)?\s*[,;]\s*r(ed)?\s*[,;].*|r(ed)?\s*[,;]\s*g.*|pixel value\s*,.*"
    r"|(id|value|index)\s*[,;\t]\s*(name|class|label).*|(name|class|label)\s*[,;\t]\s*(id|value|index)",
    re.IGNORECASE,
)
# A value, then a name. Some classes are called "2 wheeler": only if every line begins with a
# number, it is one.
FIRST = re.compile(r"\(?(\d+)\)?\s*(?:[:=](?=.)|[,;.)\t]\s*(?=\D)|\s-\s|\s(?=\D))\s*(.+)")
LAST = re.compile(r"(\D.*?)\s*[,;:=\t]\s*(\d+)")
# What no name looks like: lines that mean to say a value, or more.
ODD = re.compile(
    r"\(?\d+\)?\s*[,;:=.)\t].*|\d+\s+-\s.*|.*[,;:=\t]\s*\(?\d+\)?|.*\(\d+\)|.*\d\s*[,;\s]\s*\d+"
    r"|.*[,;]\s*#[0-9a-fA-F]{6}.*"
)
FORMS = "expected a name in every line, or VALUE:NAME in every line"


def lines_of(text: str) -> list[str]:
    """The lines that say something: without quotes, empty ones, and the head of a table."""
    rows = [row.strip() for row in text.splitlines()]
    rows = [row.replace('"', "") if row.count('"') % 2 == 0 else row for row in rows]
    return [row for row in rows if row and not _HEADER.fullmatch(row)]


def numbered(rows: list[str], where: str) -> list[tuple[int, str]] | None:
    """(value, name) of lines that say both, in either order; None of lines that are names.

    Raises: UserError for lines of which it cannot be told.
    """
    for form, value, name in ((FIRST, 1, 2), (LAST, 2, 1)):
        found = [form.fullmatch(row) for row in rows]
        if rows and all(found):
            pairs = [(int(row[value]), row[name].strip()) for row in found]
            odd = [row for row, (_, name) in zip(rows, pairs) if _lists_more(name)]
            break
    else:
        pairs = None
        odd = [row for row in rows if ODD.fullmatch(row)]
        spaced = [re.fullmatch(r"(\D.*?)\s+(\d+)", row) for row in rows]
        if all(spaced) and 1 < len({row[1] for row in spaced}) == len(rows):
            odd = odd or rows  # not class 1, class 2, ...
    if odd or not rows:
        raise UserError(f"{where}: {brief(odd[0] if odd else rows)}; {FORMS}")
    return pairs


def _lists_more(name: str) -> bool:
    """Whether a name has colours or numbers after it, as the columns of a table."""
    return re.search(r"[,;\t]\s*(#[0-9a-fA-F]{6}|\d+)\b|\d\s+\d+", name) is not None
