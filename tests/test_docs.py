# SPDX-License-Identifier: Apache-2.0
"""The README and docs/: their length, links, paths and code."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

import specedit_kernels
from specedit_kernels import SpecEditConfig, ops

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "bench" / "results" / "latest"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "bench").rglob("*.md")),
]
if not DOCS.is_dir():
    pytest.skip("docs/ is in a clone alone", allow_module_level=True)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def anchors(text):
    """Of each heading, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "")).strip().lower().replace(" ", "-") for h in headings}


def code_blocks(path, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_readme_is_at_most_900_words():
    words = [w for w in (ROOT / "README.md").read_text(encoding="utf-8").split() if re.search(r"\w", w)]
    assert 300 < len(words) <= 900


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_the_text_exist(page):
    """Files and folders that a page names in code, of the folders that a clone has."""
    text = page.read_text(encoding="utf-8")
    roots = "bench|tests|examples|docs|csrc|triton_kernels|specedit_kernels/assets"
    for path in re.findall(rf"(?<![\w/.])((?:{roots})/[\w./-]*\w/?)(?![\w<])", text):
        assert (ROOT / path).exists(), f"{name_of(page)}: {path}"


@pytest.mark.parametrize("number", range(len(code_blocks(DOCS / "ops.md"))))
def test_code_of_the_ops_page_runs(number):
    block = code_blocks(DOCS / "ops.md")[number]
    exec(compile(block, f"docs/ops.md, block {number + 1}", "exec"), {"__name__": "docs"})


def test_every_op_has_a_section_with_an_example_and_a_reference():
    text = (DOCS / "ops.md").read_text(encoding="utf-8")
    examples = "\n".join(code_blocks(DOCS / "ops.md"))
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    for op in ops.names():
        assert re.search(rf"^## .*\b{op}(?!\w)", text, re.MULTILINE), f"docs/ops.md: no section for {op}"
        assert f"ops.{op}(" in examples, f"docs/ops.md: no example calls {op}"
        assert f"::: specedit_kernels.ops.{op}\n" in api, f"docs/api.md: {op} is missing"


def test_public_names_are_in_the_reference():
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in specedit_kernels.__all__:
        if not name.isupper() and name not in ("__version__", "ops"):
            assert f"::: specedit_kernels.{name}\n" in api or f"`{name}`" in api, f"docs/api.md: {name} is missing"


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent in (ROOT, DOCS)], ids=name_of)
def test_code_of_other_pages_is_python(page):
    for number, block in enumerate(code_blocks(page), 1):
        compile(block, f"{name_of(page)}, block {number}", "exec")


def test_results_are_the_newest_run_of_a_device():
    assert sorted(p.name for p in RESULTS.parent.iterdir()) == ["README.md", "latest"]
    listed = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    for path in (p for device in RESULTS.iterdir() for p in device.iterdir()):
        assert not re.search(r"\d{4}-\d\d|_[0-9a-f]{7}\b|_own", path.stem), f"{path.name}: expected a plain stem"
        assert f"`{path.name}`" in listed or (f"`{path.stem}." in listed and f"`{path.suffix}`" in listed), path.name
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


def rows(device, name):
    return json.loads((RESULTS / device / name).read_text(encoding="utf-8"))["rows"]


def test_the_readme_says_what_the_results_say():
    """The README's first table, row by row: seconds and quality of the same setting."""
    flux, quality = rows("h200", "flux_kontext.json"), rows("h200", "quality_table.json")
    qwen = rows("h100-80gb-hbm3", "qwen_image_edit.json")
    guided = rows("h100-80gb-hbm3", "quality_table_qwen_guided.json")
    pairs = (("plain-50", "plain-50"), ("compiled plain-9", "plain-9"),
             ("specedit-9-locked-bracket graph, 10%", "9-coarse-locked-bracket"),
             ("specedit-9-locked graph, 10%", "9-coarse-locked"),
             ("specedit-9-locked-cached graph, 10%", "9-coarse-locked-kv9"))  # fmt: skip
    expected = [(flux[own], flux["plain-50"], quality[judged]) for own, judged in pairs]
    expected += [
        (qwen["plain-50"], qwen["plain-50"], guided["plain-50"]),
        (qwen["compiled plain-9"], qwen["plain-50"], guided["plain-9"]),
        (
            qwen["specedit-9-locked-cached, locked text graph, 10%"],
            qwen["plain-50"],
            guided["9-coarse-locked-cached-text"],
        ),
    ]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| setting") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(expected)
    for line, (own, base, judged) in zip(table, expected):
        cells = [cell.strip() for cell in line.strip("| ").split("|")[1:]]
        seconds, times, *shown = map(float, cells)
        assert seconds == pytest.approx(own["seconds"], rel=0.01), line
        assert times == pytest.approx(base["seconds"] / own["seconds"], rel=0.02), line
        local = judged["summary"]["local"]
        assert shown == pytest.approx([local["right"], local["psnr_in"], local["sharpness"]], abs=0.06), line
        assert shown[::2] == pytest.approx([local["right"], local["sharpness"]], abs=0.0006), line


def lines_with(path, *starts):
    """The first line of a page that begins with each of `starts`, in their order; None where there is none."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [next((x for x in lines if x.startswith(start)), None) for start in starts]


def runs_of(name):
    return json.loads((RESULTS / "h200" / name).read_text(encoding="utf-8"))["runs"]


@pytest.mark.parametrize(
    "shown, row",
    (
        ("optimum-quanto int8", "quanto int8"),
        ("GGUF Q8_0", "gguf Q8_0"),
        ("GGUF Q4_K", "gguf Q4_K"),
        ("DoRA of rank 16", "dora 16"),
        ("torchao fp8, dynamic", "torchao fp8 dynamic"),
        ("torchao int8, weight-only", "torchao int8 weight-only"),
        ("bitsandbytes NF4", "bitsandbytes nf4"),
    ),
)
def test_the_conditions_say_what_the_results_say(shown, row):
    """docs/memory.md, beside the newest run that has the row."""
    run = next(r for r in sorted(runs_of("conditions.json"), key=lambda r: r["date"], reverse=True) if row in r["rows"])
    found, base = run["rows"][row], run["rows"]["bf16 graph"]
    peak = (found["peak_bytes"] + found["graph_bytes"]) / 2**30
    (line,) = lines_with("docs/memory.md", f"| {shown} | .")
    seconds, times, gib, difference = (float(cell.strip(" x")) for cell in line.strip("| ").split("|")[1:])
    assert (seconds, difference) == pytest.approx((found["seconds"], found["applied"]), abs=0.0006), line
    assert times == pytest.approx(found["seconds"] / base["seconds"], abs=0.006), line
    assert gib == pytest.approx(peak, abs=0.06), line


def test_group_offload_says_what_the_results_say():
    run = next(r for r in runs_of("conditions.json") if "group offload, leaves, stream" in r["rows"])["rows"]
    starts = "| group offload, leaves,", "| group offload, single blocks,", "| on the card |"
    names = "group offload, leaves, stream", "group offload, blocks, stream", "bf16 graph"
    for line, name in zip(lines_with("docs/memory.md", *starts), names):
        gib, seconds = (float(cell.strip("* ")) for cell in line.strip("| ").split("|")[1:])
        assert gib == pytest.approx(run[name]["peak_bytes"] / 2**30, abs=0.06), line
        assert seconds == pytest.approx(run[name]["seconds"], rel=0.002), line


def test_flash_edit_says_what_the_results_say():
    """docs/benchmarks.md and docs/use.md, of each row's newest run."""
    runs = sorted(runs_of("flash_edit.json"), key=lambda run: run["date"])
    rows = {name: row for run in runs for name, row in run["rows"].items()}
    use = (DOCS / "use.md").read_text(encoding="utf-8")
    shown = "| bf16 |", "| `merged=True` |", '| `precision="fp8"` |'
    for line, kind in zip(lines_with("docs/benchmarks.md", *shown), ("", ", merged", ", fp8")):
        given, drafted = (rows[f"flash graph, 10 %{kind}{more}"] for more in ("", ", drafted"))
        cells = line.strip("| ").split("|")
        assert figures(cells[1] + cells[2]) == pytest.approx([given["seconds"], drafted["seconds"]], abs=0.0006), line
        for row in (given, drafted):
            assert f"{row['seconds']:.3f}".removeprefix("0") in use


def test_native_detail_says_what_the_results_say():
    """The first table of bench/log/native.md at full size, and docs/use.md."""
    found = json.loads((RESULTS / "h200" / "native.json").read_text(encoding="utf-8"))
    rows, large = found["rows"], "4096 x 3072, 5 %, native"
    times = rows[large]["seconds"] / rows["edit"]["seconds"]
    assert rows[large]["commit"] == rows["edit"]["commit"] == "c404a9e"
    starts = (
        "| the edit at 1024 x 1024 |",
        '| 4096 x 3072, 5 %, `detail="native"` |',
        '| the same, `detail="working"` |',
    )
    shown = [figures(line)[0] for line in lines_with("bench/log/native.md", *starts)]
    wanted = [rows[n]["seconds"] for n in ("edit", large, "4096 x 3072, 5 %, working")]
    assert shown == pytest.approx(wanted, abs=0.0006)
    assert f"{wanted[1]:.3f} s, {times:.2f} times the edit" in (ROOT / "bench/log/native.md").read_text("utf-8")
    assert f"{wanted[1]:.2f} s, {times:.1f} times" in (DOCS / "use.md").read_text(encoding="utf-8")
    for name, row in rows.items():  # the rows that were not run again
        if row["commit"] == "769c52a" and "2.5 %" not in name:
            start = "| " + name.removesuffix(", native").replace(
                "1.25 %", "1.25; 2.5 %" if "4096" in name else "1.25 %"
            )
            (line,) = lines_with("bench/log/native.md", start)
            assert line.count(f"{row['seconds']:.3f}") == 1, line


def test_attention_says_what_the_results_say():
    """The ranges beside FlashAttention-3, and the table of heads of 64."""
    run = rows("h200", "attention.json")
    ratios = {
        dim: [r["best FA3 / ours"]["alternating bias"] for n, r in run.items() if n.startswith(dim)]
        for dim in ("D 64", "D 128")
    }
    few, many = (f"{min(x):.2f} to {max(x):.2f}".removeprefix("0") for x in ratios.values())
    assert f"{many} times" in (ROOT / "README.md").read_text(encoding="utf-8")
    for path in ("README.md", "docs/benchmarks.md", "docs/kernels.md", "CHANGELOG.md"):
        assert few in (ROOT / path).read_text(encoding="utf-8"), path
    log = (ROOT / "bench/log/mixed_res_attn.md").read_text(encoding="utf-8")
    table = log[log.index("| queries x keys, D = 64 | ours, normal") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(ratios["D 64"])
    for line in table:
        shape, ours, one, two, normal, alternating, none, _ = (x.strip(" *") for x in line.strip("| ").split("|"))
        found = run[f"D 64, {shape}"]
        times = [found["us"][n] for n in ("ours, normal bias", "fa3", "fa3, 2 splits")]
        assert [float(x) for x in (ours, one, two)] == pytest.approx(times, abs=0.06), line
        best = [found["best FA3 / ours"][n] for n in ("normal bias", "alternating bias", "no bias")]
        assert [float(x) for x in (normal, alternating, none)] == pytest.approx(best, abs=0.006), line


KINDS = ("local", "small", "ambiguous")


def figures(text):
    return [float(x) for x in re.findall(r"\d*\.\d+", text)]


SEEDS = (20241231, 20241251, 20241261, 20241281)
# Of each line of the table: the row of its seconds, that of its quality.
QUALITY_ROWS = {
    "9 plain": ("compiled plain-9", "plain-9"),
    '"fast"': ("quality fast graph, 10%", "3+3 half ck lt"),
    '"balanced"': ("quality balanced graph, 10%", "4+5 ck2 lt kv 2"),
    '"best"': ("quality best graph, 10%", "7+5 ck4 lt kv 2"),
}


def judged(name, seed, files=("solver_tiers.json", "solver_half.json")):
    """A setting's newest row of a seed, of the first file that has it."""
    for file in files:
        for run in reversed(json.loads((RESULTS / "h200" / file).read_text(encoding="utf-8"))["runs"]):
            if run["seed"] == seed and name in run["rows"]:
                return run["rows"][name]
    raise AssertionError(f"no row {name!r} of seed {seed}")


def test_the_qualities_say_what_the_results_say():
    """The README's second table, and the first of docs/choose.md."""
    run = rows("h200", "qualities.json")
    plain = run["compiled plain-9"]["seconds"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| `quality=`") :].split("\n\n")[0].splitlines()[2:]
    choose = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    assert len(table) == len(QUALITY_ROWS)
    plain_50 = [mean([judged("plain-50", seed)[k]["right"] for seed in SEEDS]) for k in KINDS]
    for line, (kind, (timed, name_of)) in zip(table, QUALITY_ROWS.items()):
        name, own, fp8, times, right, sharp = (cell.strip() for cell in line.strip("| ").split("|"))
        seconds = run[timed]["seconds"]
        assert name.startswith(kind) and figures(own) == pytest.approx([seconds], abs=0.0006), line
        assert figures(times) == pytest.approx([plain / seconds], rel=0.02), line
        if figures(fp8):
            assert figures(fp8) == pytest.approx([run[timed.replace(" graph", " fp8 graph")]["seconds"]], abs=0.0006)
        known = [judged(name_of, seed) for seed in SEEDS]
        of_kinds = [mean([row[k]["right"] for row in known]) for k in KINDS]
        assert figures(right) == pytest.approx(of_kinds, abs=0.0006), line
        assert figures(sharp) == pytest.approx([mean([row["local"]["ratio"] for row in known])], abs=0.006), line
        assert not right.endswith("*"), line
        assert f"| {own} " in choose and f"| {right} |" in choose, line
    for where in (text, choose):
        assert ", ".join(f"{x + 1e-9:.3f}".removeprefix("0") for x in plain_50) in where
    for quality, names in (("fast", (text, choose)), ("best", (text, choose))):
        seconds = f"{run[f'quality {quality} drafted graph, 10%']['seconds']:.3f}"
        assert all(seconds in where for where in names), quality
    counts = {quality: SpecEditConfig(quality=quality).step_counts() for quality in ("fast", "balanced", "best")}
    assert {q: (c[0], sum(c[1:])) for q, c in counts.items()} == {"fast": (3, 3), "balanced": (4, 5), "best": (7, 5)}
