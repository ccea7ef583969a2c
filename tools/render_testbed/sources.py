"""Write the table of sources that travels with the data, from the sources_*.json beside this file."""

import json
import sys
from pathlib import Path

from tools.render_testbed.freedoom import copyright_of

HEAD = """# Where the images come from

Every image of the testbed was rendered or cut from the packages below by the scripts in
`tools/render_testbed`. Images under CC-BY licences are used with the attribution given here; they were scaled
to 32 pixels, reduced to few colours and, for flags, passed through a synthetic capture.

| what | package and version | licence | author | used for |
|---|---|---|---|---|
"""


def main(sources: Path, out: Path) -> None:
    """Write `out`/SOURCES.md, with Freedoom's notice out of its package in `sources`."""
    files = sorted(Path(__file__).parent.glob("sources_*.json"))
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    package = next((sources / "apt").glob("freedoom_*.deb"))
    lines = []
    for row in sorted(rows, key=lambda row: (row["used for"], row["what"].lower())):
        package_version = f"{row['package']} {row['version']}"
        cells = (row["what"], package_version, row["licence"], row["author"], row["used for"])
        lines.append(f"| {' | '.join(cells)} |".replace("\n", " "))
    notice = f"\n\n## Freedoom's copyright notice\n\n```\n{copyright_of(package)}\n```\n"
    (out / "SOURCES.md").write_text(HEAD + "\n".join(lines) + notice, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
