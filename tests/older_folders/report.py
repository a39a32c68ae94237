"""Findings as Markdown, for interop/OLDER_FOLDERS.md."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from older_folders.read import Finding

ALIKE = 1e-4
"""Errors up to this are those of float32; it is what the parity tests allow."""


def tables(findings: Sequence[Finding], versions: Sequence[str]) -> str:
    """The tables, and what stands below them."""
    plain = [finding for finding in findings if not finding.unread]
    lines = [*_main_table(plain, versions), "", *_remarks(plain)]
    if kept := [finding for finding in findings if finding.unread and not _agrees(finding)]:
        lines += ["", *_kept_table(kept)]
    return "\n".join(lines) + "\n"


def _main_table(findings: Sequence[Finding], versions: Sequence[str]) -> Iterator[str]:
    yield _row(["family", *versions])
    yield _row(["---"] * (1 + len(versions)))
    for family, group in itertools.groupby(findings, key=lambda finding: finding.family):
        of_family = list(group)
        cells = [_cell([one for one in of_family if one.version == version]) for version in versions]
        yield _row([f"`{family}`", *cells])


def _cell(findings: Sequence[Finding]) -> str:
    """The largest error against today's transformers, and against the version that wrote the folder."""
    if not findings:
        return ""
    if all(finding.unmade for finding in findings):
        return "not made"
    if any(finding.refusal for finding in findings):
        return "refused"
    cell = f"{_largest(finding.today for finding in findings)}, {_largest(finding.writer for finding in findings)}"
    return (
        cell if all(finding.repeated or finding.unmade for finding in findings) else f"{cell}, bytes differ"
    )


def _remarks(findings: Sequence[Finding]) -> Iterator[str]:
    """A line for each thing that is not as it should be, with the versions that have it."""
    said: dict[str, list[str]] = {}
    for finding in findings:
        for remark in _remarks_on(finding):
            said.setdefault(f"`{finding.family}`, {{}}: {remark}", []).append(finding.version)
    for remark, versions in said.items():
        yield "- " + remark.replace("{}", " and ".join(dict.fromkeys(versions)), 1)


def _remarks_on(finding: Finding) -> Iterator[str]:
    if finding.unmade:
        yield f"config {finding.config} could not be made ({finding.unmade})"
    if finding.refusal:
        yield f"config {finding.config} is refused ({finding.refusal})"
    if finding.random:
        yield f"config {finding.config}: today's transformers does not find {finding.random} tensors, and draws them"
    if finding.writer is not None and finding.writer > ALIKE:
        yield f"config {finding.config}: {finding.writer:.2f} from what that version computed"
    for note in finding.notes:
        yield f"config {finding.config}: jaxmoe says “{note.partition(': ')[2]}”"


def _kept_table(findings: Sequence[Finding]) -> Iterator[str]:
    yield _row(
        ["family", "config", "field not read", "versions", "from today's", "from the writer's", "jaxmoe says"]
    )
    yield _row(["---"] * 7)
    key = lambda finding: (finding.family, finding.config, finding.unread)
    for (family, config, unread), group in itertools.groupby(sorted(findings, key=key), key=key):
        of_group = list(group)
        yield _row(
            [
                f"`{family}`",
                config.removesuffix("+"),
                ", ".join(f"`{name}`" for name in unread),
                ", ".join(finding.version for finding in of_group),
                _largest(finding.today for finding in of_group),
                _largest(finding.writer for finding in of_group),
                of_group[0].refusal
                or " ".join(of_group[0].notes).partition(": ")[2]
                or of_group[0].unmade
                or "",
            ]
        )


def _agrees(finding: Finding) -> bool:
    return finding.writer is not None and finding.writer <= ALIKE


def _largest(errors: Iterable[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.0e}".replace("e-0", "e-").replace("e+00", "") if known else "-"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
