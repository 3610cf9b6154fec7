"""The explorer's page: its formulas are the planner's, it fetches nothing, a browser shows its figures."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import random
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli.main import run
from trimtab.errors import InputError
from trimtab.planning import devices, models
from trimtab.planning.explorer import contents, drawing, graphs
from trimtab.planning.memory import memory_of
from trimtab.planning.methods import CARDS
from trimtab.planning.quick import QuickConfig, quick_job
from trimtab.planning.time import time_of
from trimtab.planning.trace import evaluate
from trimtab.studies import explore_command
from trimtab.studies.explore_command import explorer_page, served, write_page


@pytest.fixture(scope="module")
def page() -> str:
    return explorer_page()


@pytest.fixture(scope="module")
def data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    read: dict[str, Any] = json.loads(found[1])
    return read


def shown(data: dict[str, Any], values: list[float], choice: dict[str, str]) -> dict[str, Any]:
    """What the page reads of a choice, by its own way through the data."""
    place = 0
    for name, options in data["dimensions"]:
        place = place * len(options) + options.index(choice[name])
    least, seconds, *phases = data["graphs"][data["which"][place]]
    found: dict[str, Any] = {"least": values[least], "seconds": values[seconds], "phases": {}}
    for number in phases:
        name, *parts = data["phases"][number]
        read = [data["parts"][part] for part in parts]
        found["phases"][data["phase_names"][name]] = [
            (data["roles"][role], data["kinds"][kind], values[formula]) for role, kind, formula in read
        ]
    return found


def random_sizes(rng: random.Random, context: float) -> dict[str, int]:
    """Lengths that the model can read, and a micro-batch that holds two answers."""
    most = int(min(context or 4096, 4096))
    prompt = rng.randint(1, most // 2)
    response = rng.randint(1, most - prompt)
    devices = rng.choice([2, 3, 8, 64])
    return {
        "prompt": prompt,
        "response": response,
        "groups": rng.randint(devices, 64),
        "responses": rng.randint(2, 16),
        "micro_batch_tokens": 2 * (prompt + response) + rng.randint(0, 20000),
        "rank": rng.choice([1, 8, 64]),
        "devices": devices,
    }


def quick_plan(combination: graphs.Combination, name: str, sizes: dict[str, int]) -> Any:
    """The job that ``trimtab plan`` makes of these options."""
    c, own = combination, dict(sizes)
    card = CARDS[c.method]
    options: dict[str, Any] = {"method": c.method, "model": name, "dtype": c.compute, "engine": c.engine}
    if c.adapter == "none":
        del own["rank"]
    if not card.rollouts:
        del own["responses"]
    if c.reward == "model" and card.rollouts:
        options["reward_model"] = name
    if own["devices"] > 1:
        options["weights"] = "shard" if c.shard == "yes" else "replicate"
    options |= {"adapter": c.adapter, "recompute": c.recompute, **own}
    return quick_job(QuickConfig(**options))


def test_the_page_computes_what_trimtab_plan_computes(data: dict[str, Any]) -> None:
    """Every combination of options, every model: the formulas written down against the planner on numbers."""
    rng = random.Random(8)
    combinations = list(graphs.combinations())
    met: set[tuple[Any, ...]] = set()
    for i, model in enumerate(data["models"]):
        sizes = random_sizes(rng, model["context"])
        cards = {card.engine: card for card in rng.sample(list(devices.CARDS.values()), len(devices.CARDS))}
        table = {
            engine: evaluate(data["table"], sizes | model["numbers"] | _numbers(data, card.name))
            for engine, card in cards.items()
        }
        for c in {*combinations[i :: len(data["models"])], *rng.sample(combinations, 6)}:
            choice = {name: getattr(c, name) for name in ("method", *graphs.OPTIONS)} | {
                "kind": model["kind"]
            }
            found = shown(data, table[c.engine], choice)
            job = quick_plan(c, model["key"], sizes)
            memory = memory_of(job)
            assert list(found["phases"]) == [phase.name for phase in memory.phases]
            for phase in memory.phases:
                plain = [(part.role, part.kind, part.bytes) for part in phase.parts]
                traced = found["phases"][phase.name]
                assert [p[:2] for p in traced] == [p[:2] for p in plain], c
                assert [p[2] for p in traced] == pytest.approx([p[2] for p in plain], rel=1e-9), (c, model)
            assert found["seconds"] == pytest.approx(time_of(job, cards[c.engine]).step_s, rel=1e-9), c
            met.add((c, model["kind"]))
    assert {c for c, _ in met} == set(combinations)
    assert {kind for _, kind in met} == set(data["dimensions"][0][1])


def _numbers(data: dict[str, Any], device: str) -> dict[str, float]:
    [numbers] = [one["numbers"] for one in data["devices"] if one["key"] == device]
    found: dict[str, float] = numbers
    return found


def test_too_small_a_micro_batch_is_said_and_made_to_hold(data: dict[str, Any]) -> None:
    """A pair of 100 + 2·300 tokens needs 700; 600 would leave the prompt out, 800 count it twice."""
    model = next(one for one in data["models"] if one["kind"].endswith("True"))
    sizes = dict.fromkeys(graphs.SIZES, 1) | {"prompt": 100, "response": 300, "groups": 4}
    choice = {name: options[0] for name, options in data["dimensions"]} | {"kind": model["kind"]}

    def found(method: str, budget: int) -> dict[str, Any]:
        inputs = sizes | {"responses": 8, "micro_batch_tokens": budget} | model["numbers"]
        values = evaluate(data["table"], inputs | _numbers(data, "H100-SXM"))
        return shown(data, values, choice | {"method": method})

    assert found("dpo", 50)["least"] == 700
    assert found("kto", 50)["least"] == 400
    assert found("grpo", 50)["least"] == 400, "a group's answers may be spread over several trees"
    assert found("dpo", 50)["phases"] == found("dpo", 700)["phases"] != found("dpo", 1400)["phases"]


def test_a_model_that_asks_no_option_shares_its_formulas() -> None:
    """What was traced of one kind of model serves another only where nothing asked for the difference."""
    combination = next(graphs.combinations())
    cards = list(models.cards().values())
    tracer = graphs.Tracer(memory_of, time_of)
    first = tracer.formulas(combination, cards[0])
    assert tracer.formulas(combination, cards[0]).memory is first.memory
    packed = next(m for m in cards if m.packed)
    unpacked = next(m for m in cards if not m.packed)
    assert tracer.formulas(combination, packed).memory is not tracer.formulas(combination, unpacked).memory


class Read(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(page: str) -> None:
    read = Read(page)
    for tag, attributes in read.tags:
        assert tag not in ("iframe", "object", "embed", "base"), tag
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,", "no style, font or picture from elsewhere"
    assert "@import" not in page
    assert "url(" not in page
    assert len(page.encode()) < 1.5e6
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page, "the browser would not run it"
    assert "fetch(" not in script
    for style in re.findall(r"<style>(.*?)</style>", page, re.DOTALL):
        assert style.count("{") == style.count("}"), "what stands behind an open brace is left out"


def test_every_field_has_its_name_and_every_id_is_one(page: str) -> None:
    read = Read(page)
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = {a.get("for") for tag, a in read.tags if tag == "label"}
    for tag, attributes in read.tags:
        if tag in ("input", "select"):
            assert attributes.get("id") in named or attributes.get("aria-label"), attributes
        if "aria-describedby" in attributes:
            assert attributes["aria-describedby"] in ids
    assert [a.get("aria-live") for _, a in read.tags if a.get("role") == "status"] == ["polite"]


def test_methods_stand_beside_each_other(page: str, data: dict[str, Any]) -> None:
    assert [method["key"] for method in data["methods"]] == ["ppo", "dpo", "grpo", "kto", "simpo", "orpo"]
    for method in graphs.METHODS:
        assert CARDS[method].best_for in page
        for _, what in drawing.told(CARDS[method].flow):
            assert what.replace("&", "&amp;") in page
    for name in models.cards():
        assert f'<option value="{name}">' in page


def _corners(text: str, pattern: str) -> list[list[float]]:
    return [[float(x) for x in found] for found in re.findall(pattern, text)]


@pytest.mark.parametrize("method", CARDS)
def test_no_arrow_crosses_a_box(method: str) -> None:
    flow = CARDS[method].flow
    drawn = drawing.draw(flow, method)
    number = r"([\d.]+)"
    boxes = _corners(drawn, f'<rect [^>]*x="{number}" y="{number}" width="{number}" height="{number}"')
    assert len(boxes) == len(flow.nodes)
    for (x, y, width, height), (x2, y2, width2, height2) in itertools.combinations(boxes, 2):
        assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    paths = re.findall(r'class="edge[^"]*" d="M([^"]*)"', drawn)
    assert len(paths) == len(flow.edges) == drawn.count("<circle")
    for path in paths:
        points = [tuple(map(float, point.split())) for point in path.split("L")]
        for (x1, y1), (x2, y2) in itertools.pairwise(points):
            for step in range(1, 100):
                at = (x1 + (x2 - x1) * step / 100, y1 + (y2 - y1) * step / 100)
                for left, top, width, height in boxes:
                    inside = left + 1 < at[0] < left + width - 1 and top + 1 < at[1] < top + height - 1
                    assert not inside, (method, path)
    for x, *_ in _corners(drawn, f'cx="{number}" cy="{number}"'):
        assert 9 <= x <= drawing.WIDTH - 9, "a number is cut off"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script in")
def test_the_script_computes_the_pages_formulas(data: dict[str, Any], tmp_path: Path) -> None:
    """All formulas of the page, for three models, in JavaScript and in Python."""
    rng = random.Random(3)
    chosen = rng.sample(data["models"], 3)
    inputs = [
        random_sizes(rng, m["context"]) | m["numbers"] | rng.choice(data["devices"])["numbers"]
        for m in chosen
    ]
    source = (explore_command.FOLDER / "evaluate.js").read_text(encoding="utf-8")
    script = tmp_path / "run.js"
    told = json.dumps([data["table"], inputs])
    script.write_text(
        f"{source}\nconst [table, inputs] = {told};\n"
        "console.log(JSON.stringify(inputs.map((one) => evaluate(table, one))));"
    )
    done = subprocess.run(["node", str(script)], capture_output=True, text=True, check=True, timeout=60)
    for one, values in zip(inputs, json.loads(done.stdout), strict=True):
        assert values == pytest.approx(evaluate(data["table"], one), rel=1e-12)


@pytest.mark.skipif(CHROMIUM is None, reason="no browser to show the page in")
def test_a_browser_shows_the_planners_figures(page: str, data: dict[str, Any], tmp_path: Path) -> None:
    """The address sets the page; what it then says is the plan."""
    file = tmp_path / "explorer.html"
    file.write_text(page, encoding="utf-8")
    model = data["models"][0]
    sizes = {"prompt": 64, "response": 192, "groups": 8, "responses": 4}
    sizes |= {"micro_batch_tokens": 4096, "rank": 16, "devices": 1}
    address = "&".join(f"{key}={value}" for key, value in sizes.items())
    chosen = f"model={model['key']}&device=T4&memory=2.5&adapter=lora&method=kto&nonsense=1"
    done = subprocess.run(
        [
            *(
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path}/user",
            ),
            *("--virtual-time-budget=3000", "--dump-dom", f"file://{file}#{chosen}&{address}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = html.unescape(re.sub(r"<[^>]*>", "", done.stdout.partition("<body>")[2]))
    told = " ".join(text.split())
    for method in graphs.METHODS:
        c = graphs.Combination(method, "gpu", "no", "lora", "bfloat16", "none", "function")
        memory = memory_of(quick_plan(c, model["key"], sizes))
        gib = memory.peak / 2**30
        words = f"{gib:.1f}".removesuffix(".0") + " GiB" if gib >= 0.9995 else f"{gib * 1024:.0f} MiB"
        assert f"{contents.SHORT[method]}{words} in {memory.fullest.name}" in told
    assert "KTO, phase by phase" in told
    assert "does not know, and leaves out: nonsense=1" in told
    assert f"trimtab plan kto --model {model['key']}" in told


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(explore_command, "explorer_page", lambda: "<p>the page</p>")
    with served(0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()
        thread.join(5)


def test_serving(server: str) -> None:
    with urllib.request.urlopen(server + "/?x=1", timeout=5) as answer:
        assert answer.read() == b"<p>the page</p>"
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    with urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=5) as answer:
        assert answer.headers["Content-Length"] == "15"
        assert answer.read() == b""
    for path in ("/etc/passwd", "/../../etc/passwd", "/explorer.html/x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server + path, timeout=5)
    port = server.rpartition(":")[2]
    with pytest.raises(InputError, match=f"port {port} cannot be had"), served(int(port)):
        pass


def test_ctrl_c_ends_the_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(explore_command, "explorer_page", lambda: "")
    monkeypatch.setattr(explore_command.ThreadingHTTPServer, "serve_forever", interrupted)
    assert run(["explore", "--serve", "0"]) == 0
    told = capsys.readouterr()
    assert re.match(r"http://127\.0\.0\.1:\d+/  \(Ctrl-C ends\)\n\nended\n$", told.out)
    assert told.err == ""


def test_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(explore_command, "explorer_page", lambda: "<p>the page</p>")
    monkeypatch.chdir(tmp_path)
    assert run(["explore"]) == 0
    assert capsys.readouterr().out == "explorer.html\n"
    assert Path("explorer.html").read_text() == "<p>the page</p>"
    assert write_page(str(tmp_path / "a b.HTML")).exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "page.txt"], "ends in .html"),
        (["--out", "folder.html"], "is a folder"),
        (["--out", "none/page.html"], "there is no folder none"),
        (["--out", "a.html", "--serve"], "choose one"),
        (["--serve", "-1"], "--serve"),
        (["--serve", "http"], "a port is a number from 0 to 65535"),
        (["--serve", "70000"], "a port is a number from 0 to 65535"),
        (["--serve", "²"], "a port is a number"),
        (["--serve", "9" * 5000], "a port is a number"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(explore_command, "explorer_page", lambda: "")
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    assert run(["explore", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
