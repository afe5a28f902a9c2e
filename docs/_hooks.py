# SPDX-License-Identifier: Apache-2.0
"""What mkdocs needs beside mkdocs.yml: pages from outside docs/, and where a public name is defined."""

import functools
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Files beside docs/ that pages link to as ../PATH; in the site they keep their path.
BESIDE = (
    "bench/log/*.md",
    "bench/quality/README.md",
    "bench/results/README.md",
    "bench/results/latest/*/*.*",
    "examples/*.py",
    "integrations/*/*.json",
)


def on_files(files, config):
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


@functools.cache
def _defined_in(name):
    """The dotted path of a public class or function: public names are read lazily, so no import says where they are."""
    pattern = re.compile(rf"^(?:class|def) {re.escape(name)}\b", re.MULTILINE)
    found = [p for p in sorted((ROOT / "specedit_kernels").rglob("*.py")) if pattern.search(p.read_text("utf-8"))]
    # a reference has the op's own name
    found = [p for p in found if p.relative_to(ROOT).parts[1] not in ("reference", "triton_kernels")]
    if len(found) != 1:
        raise ValueError(f"docs/api.md: {name} is defined in {len(found)} files: {', '.join(map(str, found))}")
    return ".".join((*found[0].relative_to(ROOT).with_suffix("").parts, name))


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri == "api.md":
        names = re.compile(r"^::: specedit_kernels\.(?:ops\.)?(\w+)$", re.MULTILINE)
        markdown = names.sub(lambda match: f"::: {_defined_in(match[1])}", markdown)
    if "/" not in page.file.src_uri:
        markdown = markdown.replace("](../", "](")
    return markdown
