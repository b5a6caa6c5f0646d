"""``mogan report``: one page that holds everything and asks nothing of the network."""

import base64
import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mogan.data.video import write_video
from mogan.errors import UserError
from mogan.evaluation.evaluate import evaluate
from mogan.report import report
from mogan.report.figures import characters_told, curve_figure, to_svg
from mogan.report.footage import by_difference, choose, gather
from mogan.report.page import Background, _digits, _how, _warnings, write_page
from mogan.report.sources import Curves, Result, distinct_names, read_sources
from mogan.world.scenes import make_scene, render


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    for system, seed in (("dmd", 1), ("mogan", 9)):
        (root / system).mkdir()
        for prompt in range(3):
            scene = make_scene(seed, prompt, motion="rich", frames=5)
            text = make_scene(1, prompt, motion="rich").caption
            write_video(root / system / f"{text}-0.mp4", render(scene), 16)
    evaluate((root / "dmd", root / "mogan"), out=root / "results.json", flow="farneback", quick=True)
    run = root / "run"
    run.mkdir()
    rows = [
        {"iteration": i, "update": update, "loss": 1 / (i + 1), "seconds": 0.5, "note": "text", "gap": 0.1 * i}
        for i in range(30)
        for update in ("student", "fake_score")
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 30, "upd')
    (run / "warnings.log").write_text("iteration 20: the student is stiller than its start\n")
    return root


@pytest.fixture(scope="module")
def page(inputs):
    report((inputs / "results.json", inputs / "run"), out=inputs / "report.html", figures=inputs / "figures")
    return (inputs / "report.html").read_text()


class Reader(HTMLParser):
    """Collects tags with their attributes and checks that they close."""

    void = ("meta", "br", "img", "input", "link", "hr")

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    for tag, attrs in reader.tags:
        for name in ("src", "href", "xlink:href", "poster", "action"):
            target = attrs.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, target[:60])
    outside = set(re.findall(r"""(?:url\(|@import|fetch\()[^)]{0,40}""", page))
    assert all("url(#" in use for use in outside), outside


def test_every_clip_loops_silently_under_its_flow(page):
    reader = Reader()
    reader.feed(page)
    videos = [attrs for tag, attrs in reader.tags if tag == "video"]
    assert len(videos) >= 2 * 2 * 3
    for attrs in videos:
        assert {"muted", "loop", "playsinline", "autoplay", "aria-label"} <= set(attrs)
        assert attrs["src"].startswith("data:video/mp4;base64,AAAA")
        assert attrs.get("poster", "data:image/jpeg;base64,/9j/").startswith("data:image/jpeg;base64,/9j/")
    assert sum("poster" in attrs for attrs in videos) == len(videos) / 2
    assert "one scale for every clip" in page
    assert "image-rendering: pixelated" in page


def test_numbers_warnings_curves_and_settings_are_all_there(page):
    for words in (
        "Dynamic degree", "Temporal flickering", "95 % intervals", "What would mislead", "only 3 prompts", "stiller than its start",
        "Training", "student: loss", "fake_score: gap", "How it was measured", "farneback", "flow-warp", "against dmd",
        "What would change the verdict", "Dynamic degree at other thresholds",
    ):  # fmt: skip
        assert words in page, words
    assert page.count("<svg") == 3
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["systems"] == ["dmd", "mogan"]
    assert len(data["rows"]) == 3


def test_the_same_input_gives_the_same_page(inputs, page, tmp_path):
    report((inputs / "results.json", inputs / "run"), out=tmp_path / "again.html")

    def without_videos(text):  # OpenCV's Farneback is not the same to the last bit in every process
        return re.sub(r"data:video/mp4;base64,[^\"]+", "", text)

    assert without_videos((tmp_path / "again.html").read_text()) == without_videos(page)


def test_characters_that_the_font_lacks_are_told_once_and_only_of_pictures(tmp_path, capsys):
    figure = Figure()
    figure.suptitle("样本 and 样")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "样本" in to_svg(figure, "x")
        assert capsys.readouterr().out == ""
        with characters_told("a.png"):
            figure.savefig(tmp_path / "a.png")
    assert capsys.readouterr().out.startswith("a.png: matplotlib's font lacks 样本, drawn as boxes")
    with pytest.warns(UserWarning, match="another"), characters_told("a.png"):
        warnings.warn("another", UserWarning, stacklevel=1)


def test_figures_and_sheets_are_written_for_papers(inputs, page):
    names = {path.name for path in (inputs / "figures").iterdir()}
    assert {"intervals.png", "spread.png", "curves.png", "clips-0.png", "clips-2.png"} <= names
    with Image.open(inputs / "figures" / "clips.gif") as moving:
        assert (moving.n_frames, moving.info["duration"], moving.info["loop"]) == (5, 60, 0)
        assert moving.size == (3 * (2 * 116 + 12) - 16, 18 + 18 + 112)


def test_text_from_outside_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    clip = {
        "prompt": evil,
        "index": 0,
        "seed": None,
        "file": "gone.mp4",
        "width": 64,
        "fps": 16,
        "values": {"flow_top5": 1.0},
    }
    results = {"systems": {evil: {"metrics": {evil: {"mean": 1.0, "ci95": None, "n": 1}}, "how": {}, "clips": [clip]}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    report((tmp_path / "results.json",), out=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in text
    assert "is not there any more" in text


@pytest.mark.parametrize(
    ("mean", "ends", "digits"),
    [
        (0.99543, (0.9951, 0.99571), 5),
        (0.787, (0.64, 0.93), 3),
        (52.0, (50.0, 53.0), 3),
        (0.0, (-0.1, 0.1), 3),
        (1.0, (1.0, 1.0), 3),
        (16 / 17, (16 / 17 - 1.2e-16, 16 / 17), 3),
        (0.5, None, 3),
    ],
)
def test_a_number_has_the_digits_that_its_interval_is_wide(mean, ends, digits):
    assert _digits(mean, ends) == digits


def test_a_warning_is_written_once_with_all_whom_it_is_true_of():
    systems = [
        Result(name, Path(), {}, {"warnings": ["few clips", *own]}, []) for name, own in (("a", ()), ("b", ("cut",)))
    ]
    assert _warnings(systems, []) == [("a, b", "few clips"), ("b", "cut")]


def test_what_was_not_given_is_left_out_of_how_it_was_measured():
    facts = {
        "quick": True,
        "missing": [],
        "reference": None,
        "flow": {"name": "lab", "weights_sha256": None, "crop": [2, 3]},
    }
    assert _how(Result("a", Path(), {}, facts, [])) == [("quick", "yes"), ("flow", "name lab, crop 2 x 3")]


def test_a_run_alone_makes_a_page(inputs, tmp_path):
    report((inputs / "run",), out=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Training" in text
    assert "<video" not in text


def test_clips_are_chosen_by_position_and_not_by_score():
    def result(name, prompts):
        clips = [{"prompt": p, "index": k, "values": {}} for p in prompts for k in (0, 1)]
        return Result(name, None, {}, {}, clips)

    many = [f"p{i:02}" for i in range(20)]
    assert choose([result("a", many), result("b", many[:11])], 3) == [("p00", 0), ("p05", 0), ("p10", 0)]
    assert len(choose([result("a", ["x"]), result("b", ["x"])], 4)) == 2


def test_rows_whose_systems_differ_most_in_speed_come_first():
    def row(name, **values):
        return name, 0, [(None, {"values": {m: pair[i] for m, pair in values.items()}}) for i in (0, 1)]

    some = [
        row("same", lab_speed=(1.0, 1.0), flow_top5=(0.0, 9.0)),
        row("far", lab_speed=(0.0, 3.0), flow_top5=(1.0, 1.0)),
        row("near", lab_speed=(2.0, 1.0), flow_top5=(1.0, 1.0)),
    ]
    rows, by = by_difference(some)
    assert ([r[0] for r in rows], by) == (["far", "near", "same"], "lab_speed")
    rows, by = by_difference([*some, row("untracked", lab_speed=(None, 1.0), flow_top5=(1.0, 1.0))])
    assert (rows[0][0], by) == ("same", "flow_top5")
    assert by_difference([row("b"), row("a")]) == ([row("b"), row("a")], "")


def test_rows_are_sorted_by_the_systems_that_are_shown_first():
    def row(name, *speeds):
        return name, 0, [(None, {"values": {"lab_speed": speed}}) for speed in speeds]

    rows = [row("few", 0.0, 1.0, 0.0, 0.0, 9.0), row("many", 0.0, 0.0, 0.0, 2.0, 2.0)]
    assert [r[0] for r in by_difference(rows)[0]] == ["many", "few"]


@pytest.fixture(scope="module")
def six(inputs):
    """Results of six systems, whose clips are those of two."""
    (one, two) = json.loads((inputs / "results.json").read_text())["systems"].values()
    systems = {f"system {number}": (one, two)[number % 2] for number in range(6)}
    (inputs / "six.json").write_text(json.dumps({"systems": systems}))
    return inputs / "six.json"


def test_clips_that_browsers_do_not_play_are_encoded_anew(inputs, tmp_path):
    system = json.loads((inputs / "results.json").read_text())["systems"]["dmd"]
    (tmp_path / "dmd").mkdir()
    for clip in system["clips"]:
        with av.open(str(inputs / clip["file"])) as read, av.open(str(tmp_path / clip["file"]), "w") as out:
            stream = out.add_stream("mpeg4", 16)  # MPEG-4 part 2, as OpenCV's mp4v writes it
            stream.width = stream.height = 64
            for frame in read.decode(video=0):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
            out.mux(stream.encode(None))
    (tmp_path / "results.json").write_text(json.dumps({"systems": {"dmd": system}}))
    report((tmp_path / "results.json",), out=tmp_path / "r.html")
    videos = re.findall(r'src="data:video/mp4;base64,([^"]+)"', (tmp_path / "r.html").read_text())
    assert videos
    for video in videos:
        with av.open(io.BytesIO(base64.b64decode(video))) as shown:
            assert shown.streams.video[0].codec_context.name == "h264"


def test_four_systems_are_shown_at_first_and_the_others_wait(six, tmp_path):
    report((six,), out=tmp_path / "r.html", clips=1)
    reader = Reader()
    reader.feed((tmp_path / "r.html").read_text())
    boxes = [(attrs["value"], "checked" in attrs) for tag, attrs in reader.tags if attrs.get("type") == "checkbox"]
    assert boxes == [(f"system {number}", number < 4) for number in range(6)]
    shots = [(attrs["data-system"], "hidden" in attrs) for tag, attrs in reader.tags if "data-system" in attrs]
    assert shots[:6] == [(f"system {number}", number >= 4) for number in range(6)]
    kept = [{"src", "data-src"} & set(attrs) for tag, attrs in reader.tags if tag == "video"]
    assert kept[:12] == [{"src"}] * 8 + [{"data-src"}] * 4


def test_systems_for_whose_clips_a_page_has_no_room_are_named(six, tmp_path, monkeypatch):
    monkeypatch.setattr("mogan.report.footage.BUDGET", 1)
    results, _ = read_sources((six,))
    footage = gather(results, 2)
    assert footage.systems == tuple(f"system {number}" for number in range(4))
    assert footage.left_out == ("system 4", "system 5")
    assert len(footage.rows) == 1
    assert [shot.system for shot in footage.rows[0].shots] == list(footage.systems)
    report((six,), out=tmp_path / "r.html")
    assert "So were the clips of system 4, system 5." in (tmp_path / "r.html").read_text()


def test_clips_come_first_then_a_sentence_for_each_system_then_warnings_then_numbers(page):
    order = [
        page.index(words)
        for words in ('<section id="clips"', '<section id="verdict"', 'id="w"', '<section id="numbers"')
    ]
    assert order == sorted(order)
    lead = page[order[1] : order[2]]
    assert lead.count("<li>") == 1
    assert "<li><strong>mogan</strong>" in lead
    assert page.index("All that is clear, in words") > order[3]
    assert page.index('class="beware">What would mislead (') < order[0]


def test_a_system_alone_is_said_to_have_nothing_beside_it(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(changed({})))
    report((tmp_path / "results.json",), out=tmp_path / "r.html")
    assert "One system alone: there is nothing to compare it with." in (tmp_path / "r.html").read_text()


def test_a_page_says_what_stands_beside_it_and_holds_systems_against_their_bases(tmp_path):
    one = changed({})["systems"]["a"]
    (tmp_path / "results.json").write_text(json.dumps({"systems": dict.fromkeys("abc", one)}))
    known = Background("Clips of one seed; the table is", "table.md", {"c": ("b",)})
    write_page((tmp_path / "results.json",), tmp_path / "r.html", background=known)
    text = (tmp_path / "r.html").read_text()
    assert 'Clips of one seed; the table is <a href="table.md">table.md</a>.' in text
    assert "<strong>b</strong> differs clearly from a in nothing" in text
    assert "<strong>c</strong> differs clearly from b in nothing" in text


GOOD = {"prompt": "p", "index": 0, "file": "a.mp4", "width": 64, "fps": 16, "values": {"flow_top5": 1.0, "cuts": None}}
METRIC = {"mean": 1.0, "ci95": [0.5, 2], "n": 3}


def changed(system, **entries):
    return {"systems": {"a": {"metrics": {"flow_top5": METRIC}, "how": {}, "clips": [GOOD]} | entries | system}}


@pytest.mark.parametrize(
    ("results", "where"),
    [
        ({"systems": {}}, "holds no system"),
        ({"systems": ["a"]}, "AttributeError"),
        (changed({"metrics": {"flow_top5": METRIC | {"mean": "1"}}}), "flow_top5 of a"),
        (changed({"metrics": {"flow_top5": METRIC | {"mean": float("nan")}}}), "flow_top5 of a"),
        (changed({"metrics": {"flow_top5": METRIC | {"ci95": [1]}}}), "flow_top5 of a"),
        (changed({"metrics": {"flow_top5": {"mean": 1.0, "ci95": None}}}), "flow_top5 of a"),
        (changed({"how": {"flow": 3}}), "TypeError"),
        (changed({"how": {"flow": {}}}), "flow of a"),
        (changed({"how": {"failed": ["x.mp4"]}}), "failed of a"),
        (changed({"how": {"warnings": [3]}}), "warnings of a"),
        (changed({"clips": [GOOD | {"prompt": None}]}), "a clip of a"),
        (changed({"clips": [GOOD | {"values": {"flow_top5": "x"}}]}), "a clip of a"),
        (changed({"clips": [GOOD | {"values": None}]}), "AttributeError"),
        (changed({"clips": [{k: v for k, v in GOOD.items() if k != "width"}]}), "a clip of a has no width"),
        (changed({"clips": [1]}), "TypeError"),
    ],
)
def test_a_results_file_that_was_damaged_is_refused_with_the_place(results, where, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(changed({})))
    assert read_sources((tmp_path / "results.json",))[0][0].good == [GOOD]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=rf"no results.json of this version \(.*{where}.*\): make it again"):
        read_sources((tmp_path / "results.json",))


def test_bytes_that_are_no_text_in_a_runs_log_do_not_stop_a_report(tmp_path):
    damaged = b'{"iteration": Infinity, "update": "a"}\n{"iteration": 1, "update": "a", "loss": 1' + b"0" * 400 + b"}\n"
    (tmp_path / "metrics.jsonl").write_bytes(
        b"\xff\xfe torn\n" + damaged + b"[" * 100_000 + b'\n{"iteration": 0, "update": "a", "loss": 1}\n'
    )
    (tmp_path / "warnings.log").write_bytes(b"caf\xe9\n")
    (curves,) = read_sources((tmp_path,))[1]
    assert curves.series == {("a", "loss"): [(0, 1.0)]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"old": 1}', "no results.json of this version"),
        ("{", "no results.json of this version"),
        ("[]", "no results.json of this version"),
        ('{"systems": {"a": {"metrics": {}, "how": {"version": 0}}}}', "holds numbers of version 0, where this is"),
    ],
)
def test_an_old_results_file_is_refused_in_one_sentence(tmp_path, content, words):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_sources((tmp_path / "results.json",))


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["s/dmd/seed0/run", "s/mogan/seed0/run"], ["dmd", "mogan"]),
        (["s/dmd/seed0/run", "s/dmd/seed1/run", "other"], ["s/dmd/seed0/run", "s/dmd/seed1/run", "other"]),
        (["one/run", "two/three/run"], ["one", "two/three"]),
        (["same/run", "same/run"], ["run", "run"]),
        (["a/b", "a/b/b"], ["a/b", "a/b/b"]),
    ],
)
def test_runs_in_folders_of_one_name_are_told_apart(folders, names):
    assert distinct_names([Path(folder) for folder in folders]) == names


def test_systems_of_one_name_are_told_apart_by_their_files(tmp_path):
    files = [tmp_path / of / "seed0" / "results.json" for of in ("dmd", "redmd", "mogan")]
    files.append(tmp_path / "dmd" / "seed0" / "other.json")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(changed({})))
    named = [result.name for result in read_sources((*files[:3], files[0]))[0]]
    assert named == ["dmd/a", "redmd/a", "mogan/a"]
    named = [result.name for result in read_sources((files[0], files[3]))[0]]
    assert named == ["results/a", "other/a"]


def test_the_repeats_of_an_update_are_one_point_of_its_curve(tmp_path):
    rows = [{"iteration": i, "update": "judge", "repeat": r, "loss": 10.0 * i + r} for i in (0, 1) for r in (2, 0, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, (run,) = read_sources((tmp_path,))
    assert run.series == {("judge", "loss"): [(0, 1.0), (1, 11.0)]}


def test_the_legend_of_curves_names_every_run_once():
    runs = [
        Curves(n, {(u, "loss"): [(0, 1.0), (1, 0.5)], ("", "seconds"): [(0, 1.0), (1, 1.0)]}, ())
        for n, u in ["ax", "by"]
    ]
    figure = curve_figure(runs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_the_curves_of_many_runs_are_told_apart():
    runs = [Curves(str(i), {("", "loss"): [(0, 1.0), (1, 0.5)]}, ()) for i in range(40)]
    lines = curve_figure(runs).legends[0].get_lines()
    assert len({(line.get_color(), str(line._unscaled_dash_pattern), line.get_linestyle()) for line in lines}) == 40


def test_inputs_that_are_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="neither a results"):
        report((tmp_path,), out=tmp_path / "r.html")
    with pytest.raises(UserError, match="at least one"):
        report((), out=tmp_path / "r.html")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no number yet"):
        report((tmp_path,), out=tmp_path / "r.html")
