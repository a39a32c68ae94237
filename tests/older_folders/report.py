"""Findings as Markdown, for interop/OLDER_FOLDERS.md."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from jaxmoe.errors import shortened
from older_folders.read import Finding

ALIKE = 1e-4
"""Errors up to this are those of float32; it is what the parity tests allow."""

_QUOTED = 160
"""Characters of a refusal."""


def tables(findings: Sequence[Finding], versions: Sequence[str]) -> str:
    """Both tables, and remarks on the first.

    Args:
        findings: by family.
        versions: in the order of the columns.
    """
    plain = [finding for finding in findings if not finding.unread]
    kept = [finding for finding in findings if finding.unread and not _agrees(finding)]
    lines = [*_main_table(plain, versions), "", *_remarks(plain)]
    if kept:
        lines += ["", "With fields that the version does not read:", "", *_kept_table(kept)]
    return "\n".join(lines) + "\n"


def _main_table(findings: Sequence[Finding], versions: Sequence[str]) -> Iterator[str]:
    yield _row(["family", *versions])
    yield _row(["---"] * (1 + len(versions)))
    for family, group in itertools.groupby(findings, key=lambda finding: finding.family):
        of_family = list(group)
        cells = [_cell([one for one in of_family if one.version == version]) for version in versions]
        yield _row([f"`{family}`", *cells])


def _cell(findings: Sequence[Finding]) -> str:
    made = [finding for finding in findings if not finding.unmade]
    if not made:
        return "not made" if findings else ""
    if any(finding.refusal for finding in made):
        return "refused"
    cell = _errors(made)
    return cell if all(finding.repeated for finding in made) else f"{cell}, bytes differ"


def _errors(findings: Sequence[Finding]) -> str:
    """The largest error against today's transformers and the version itself; both where they are different things."""
    today, writer = (_largest(getattr(finding, name) for finding in findings) for name in ("today", "writer"))
    if today is None or writer is None or max(today, writer) > ALIKE:
        return f"{_figure(today)}, **{_figure(writer)}**"
    return _figure(max(today, writer))


def _remarks(findings: Sequence[Finding]) -> Iterator[str]:
    """A line for each thing that a figure does not say, with the versions and configs that it is true of."""
    said: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        for remark in _remarks_on(finding):
            said.setdefault((finding.family, remark), []).append(finding)
    for (family, remark), group in said.items():
        versions, configs = (
            dict.fromkeys(getattr(one, name) for one in group) for name in ("version", "config")
        )
        yield f"- `{family}`, {', '.join(versions)}, config {' and '.join(configs)}: {remark}"


def _remarks_on(finding: Finding) -> Iterator[str]:
    if finding.unmade:
        yield f"not made: {shortened(finding.unmade, _QUOTED)}"
    if finding.refusal:
        yield f"refused: {shortened(finding.refusal, _QUOTED)}"
    if finding.random:
        yield "today's transformers finds no tensors for some parameters, and draws those at random"
    for note in finding.notes:
        yield f"a line says that {note.partition(': ')[2]}"


def _kept_table(findings: Sequence[Finding]) -> Iterator[str]:
    yield _row(["family", "config", "field", "versions", "error", "jaxmoe says"])
    yield _row(["---"] * 6)
    key = lambda finding: (finding.family, finding.config, finding.unread)
    for (family, config, unread), group in itertools.groupby(sorted(findings, key=key), key=key):
        of_group = list(group)
        said = of_group[0].unmade or of_group[0].refusal or " ".join(of_group[0].notes).partition(": ")[2]
        yield _row(
            [
                f"`{family}`",
                config.removesuffix("+"),
                ", ".join(f"`{name}`" for name in unread),
                ", ".join(finding.version for finding in of_group),
                "refused" if of_group[0].refusal else _errors(of_group),
                said if of_group[0].notes else shortened(said, _QUOTED),
            ]
        )


def _agrees(finding: Finding) -> bool:
    return finding.writer is not None and finding.writer <= ALIKE


def _largest(errors: Iterable[float | None]) -> float | None:
    return max((error for error in errors if error is not None), default=None)


def _figure(error: float | None) -> str:
    if error is None:
        return "none"
    return f"{error:.2f}" if error > ALIKE else f"{error:.0e}".replace("e-0", "e-")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
