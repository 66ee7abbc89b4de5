"""What compute-sanitizer says, finding by finding."""

import re

HEAD = "========= "
# Lines at the margin that are no finding
_FRAME = re.compile(
    r"COMPUTE-SANITIZER|(ERROR|RACECHECK|LEAK|SYNCCHECK) SUMMARY|Target application|Warning: .*(suppress|displayed)|\d+ more"
)
_SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")


def findings(log: str) -> list[str]:
    """Each with its head and the indented lines below it, which name the kernel and where in it."""
    found: list[str] = []
    open_ = False
    for line in log.splitlines():
        if not line.startswith(HEAD.rstrip()):
            continue
        text = line[len(HEAD) :]
        if not text.strip():
            open_ = False
        elif not text.startswith(" "):
            open_ = not _FRAME.match(text)
            found += [text] * open_
        elif open_:
            found[-1] += "\n" + text.strip()
    return found


def counted(log: str) -> int:
    """How many the tool's own summary counts, which is there when the tool came to its end."""
    summary = _SUMMARY.findall(log)
    assert summary, f"no summary: {log[-2000:]}"
    return int(summary[-1][1])


def unexplained(log: str, explained: dict[str, str]) -> list[str]:
    """The findings that no pattern of `explained` matches. One that the summary counts and nobody can read is a finding too."""
    found = findings(log)
    rest = [text for text in found if not any(re.search(pattern, text) for pattern in explained)]
    return rest + ["counted in the summary, but not found in the log"] * (counted(log) > 0 and not found)
