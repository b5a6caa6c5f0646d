"""Lists of prompts with their checksums, and samples.jsonl written by several processes."""

import json
import multiprocessing
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import CAPTIONS
from mogan.data import prompts as prompts_module
from mogan.data.lists import read_prompts
from mogan.data.prompts import KNOWN, about, fingerprint, warn_if_changed
from mogan.errors import UserError
from mogan.evaluation.evaluate import evaluate
from mogan.sampling.folder import jobs_of
from mogan.sampling.sample import sample
from mogan.sampling.samples import append_samples, listed_samples, refuse_others


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("p.txt", "one\r\n\n two \none\n", ["one", "two"]),
        ("metadata.csv", 'file_name,caption\na.mp4,one\nb.mp4,"a, b"\n', ["one", "a, b"]),
        ("metadata.csv", "caption\rone\rtwo\r", ["one", "two"]),
        ("P.JSONL", '{"file_name": "a.mp4", "caption": "one"}\n"two"\n', ["one", "two"]),
        ("p.txt", "\ufeffone\na line\u2028that goes on\n", ["one", "a line\u2028that goes on"]),
        ("p.jsonl", '{"caption": "three"}\n{"prompt": "four"}\n', ["three", "four"]),
        ("VBench_full_info.json", '[{"prompt_en": "a", "dimension": ["scene"]}, {"prompt_en": "b"}]', ["a", "b"]),
        ("p.json", '["a", "b", "a"]', ["a", "b"]),
    ],
)
def test_prompts_are_read_from_every_kind_of_file(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == found


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"\n", "holds no prompts"),
        ("p.jsonl", b'{"caption": "three"}\n{"prom', r"p\.jsonl line 2 is not JSON"),
        ("p.json", b"[1, 2]", r"p\.json entry 1 is not a JSON object"),
        ("p.json", b"7", r"p\.json is not a list"),
        ("p.json", b'[{"other": "x"}]', "holds no prompts"),
        ("p.txt", b"\xff\xfe\x00", "line 1 is not UTF-16 text"),
        ("metadata.csv", b"caption\nfoo\rbar\n", r"metadata\.csv line 2 holds a carriage return"),
        (None, b"", r"is not there: give a \.txt file"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused_in_one_sentence(tmp_path, name, content, words):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_prompts(tmp_path / (name or "absent.txt"))
    assert "\n" not in str(error.value)


TEXTS = st.lists(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1), min_size=1)


@given(TEXTS, st.randoms())
def test_a_fingerprint_knows_no_order_repetition_or_white_space(lines, random):
    shuffled = [f"  {line} " for line in lines + lines]
    random.shuffle(shuffled)
    assert fingerprint(shuffled) == fingerprint(lines)
    assert fingerprint([*lines, "\x00 one more"]) != fingerprint(lines)


def test_a_fingerprint_is_the_sha256_of_sorted_lines():
    import hashlib

    assert fingerprint(["b  c", "a", "a"]) == hashlib.sha256(b"a\nb c").hexdigest()
    assert fingerprint(["rocas fac\u0327ades"]) == fingerprint(["rocas fa\u00e7ades"])


def test_a_benchmark_is_known_by_its_prompts_and_a_false_one_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN, fingerprint(["x", "y"]), "VideoJAM-Bench (2 prompts)")
    assert about(["y", "x", "x"]) == {
        "count": 2,
        "sha256": fingerprint(["x", "y"]),
        "set": "VideoJAM-Bench (2 prompts)",
    }
    assert about(["x"])["set"] is None
    path = tmp_path / "VideoJAM_prompts.txt"
    assert warn_if_changed(path, ["x", "y"]) is None
    assert "not VideoJAM-Bench's" in warn_if_changed(path, ["x", "z"])
    assert warn_if_changed(tmp_path / "mine.txt", ["x", "z"]) is None
    assert all(len(sha) == 64 and int(sha, 16) for sha in prompts_module.KNOWN)


# ---------------------------------------------------------------------------------------------- samples.jsonl


def at_once(work, count):
    """Run ``work(0)`` to ``work(count - 1)`` in processes of their own."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(number,), daemon=True) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=100)
    assert [worker.exitcode for worker in workers] == [0] * count


def write_many(folder, number):
    for k in range(40):
        append_samples(folder, [{"file": f"{number}-{k}.mp4", "prompt": "p" * (k * 500 + 1)}])


def test_no_line_is_lost_when_processes_write_at_once(tmp_path):
    at_once(lambda number: write_many(tmp_path, number), 4)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 160
    assert {row["file"] for row in lines} == {f"{n}-{k}.mp4" for n in range(4) for k in range(40)}
    assert all(row["prompt"] == "p" * (int(row["file"][2:-4]) * 500 + 1) for row in lines)


@pytest.mark.parametrize("whole", ["", '{"file": "a", "prompt": "p\u2028q"}\n'])
def test_a_line_torn_by_a_kill_is_replaced(tmp_path, whole):
    (tmp_path / "samples.jsonl").write_text(whole + '{"file": "b", "pro', encoding="utf-8")
    assert set(listed_samples(tmp_path)) == ({"a"} if whole else set())
    append_samples(tmp_path, [])
    append_samples(tmp_path, [{"file": "b"}, {"file": "c"}])
    assert set(listed_samples(tmp_path)) == {"b", "c"} | ({"a"} if whole else set())
    (tmp_path / "samples.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is no record"):
        listed_samples(tmp_path)


def test_one_folder_holds_one_way_of_sampling(tmp_path):
    there = {"file": "a-0.mp4", "prompt": "a", "index": 0, "seed": 0, "fps": 16, "sigmas": [1.0, 0.5]}
    refuse_others(tmp_path, {"a-0.mp4": there}, [there, there | {"file": "b-0.mp4", "seed": 3}])
    with pytest.raises(UserError, match=r"with seed 0, not 5: give another --out"):
        refuse_others(tmp_path, {"a-0.mp4": there}, [there | {"seed": 5}])
    with pytest.raises(UserError, match=r"with sigmas \[1.0, 0.5\], not None"):
        refuse_others(tmp_path, {"a-0.mp4": there}, [{k: v for k, v in there.items() if k != "sigmas"}])
    told = there | {"precision": "float32"}
    refuse_others(tmp_path, {"a-0.mp4": there}, [told])  # an older list does not say
    with pytest.raises(UserError, match="with precision 'float32', not 'bfloat16'"):
        refuse_others(tmp_path, {"a-0.mp4": told}, [there | {"precision": "bfloat16"}])
    for more in ({"flowmo": True}, {"solver": "euler"}, {"motion": "m", "motion_ratio": 0.5}):
        with pytest.raises(UserError, match=f"with {next(iter(more))} "):
            refuse_others(tmp_path, {"a-0.mp4": there}, [there | more])


def test_a_folder_of_other_prompts_clips_takes_none_of_another_model_and_tells_of_them(family, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a moom\n")
    (tmp_path / "corrected.txt").write_text("a moon\n")
    out = tmp_path / "clips"
    sample(prompts=tmp_path / "p.txt", out=out, model=str(family / "student"))
    assert "other prompts" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"lists a moom-0\.mp4 with .*: give another --out"):
        sample(prompts=tmp_path / "corrected.txt", out=out, model=str(family / "teacher"), steps=2)
    sample(prompts=tmp_path / "corrected.txt", out=out, model=str(family / "student"))
    assert "also holds 1 clips of other prompts, such as a moom-0.mp4" in capsys.readouterr().out
    (out / "a moom-0.mp4").unlink()
    sample(prompts=tmp_path / "corrected.txt", out=out, model=str(family / "student"))
    assert "other prompts" not in capsys.readouterr().out


def test_a_folder_keeps_to_the_weights_it_was_begun_with(family, tmp_path):
    (tmp_path / "p.txt").write_text("a moon\n")
    student = tmp_path / "student"
    shutil.copytree(family / "student", student)
    options = {"prompts": tmp_path / "p.txt", "out": tmp_path / "clips", "model": str(student)}
    sample(**options)
    sample(**options, seeds=2)
    (one, two) = listed_samples(tmp_path / "clips").values()
    assert one["weights"] == two["weights"]
    path = next((student / "transformer").glob("*.safetensors"))
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 1e-3}, path)
    with pytest.raises(UserError, match=r"made by a model with other weights: give another --out"):
        sample(**options, seeds=2)
    listed = listed_samples(tmp_path / "clips")
    older = {file: {k: v for k, v in row.items() if k != "weights"} for file, row in listed.items()}
    refuse_others(tmp_path, older, list(listed.values()))  # lists written before weights were noted


def test_prompts_whose_clips_would_have_one_name_are_refused():
    assert [job.seed for job in jobs_of(["a", "b"], 2, 7)] == [7, 8, 7, 8]
    with pytest.raises(UserError, match="two prompts would both be called a_b-0"):
        jobs_of(["a/b", "a_b"], 1, 0)
    with pytest.raises(UserError, match="two prompts would both"):
        jobs_of(["x" * 300 + "a", "x" * 300 + "b"], 1, 0)


def test_two_shards_make_one_folder_that_can_be_evaluated(family, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"prompt_en": text, "dimension": []} for text in CAPTIONS[:3]]))
    out = tmp_path / "tiny"

    def shard(number):
        sample(
            prompts=tmp_path / "p.json", out=out, model=str(family / "student"), seeds=2, batch=2, shard=f"{number}/2"
        )

    at_once(shard, 2)
    files = {f"{text}-{k}.mp4" for text in CAPTIONS[:3] for k in range(2)}
    whole = listed_samples(out)
    assert set(whole) == files == {path.name for path in out.glob("*.mp4")}
    assert {row["prompts_sha256"] for row in whole.values()} == {fingerprint(CAPTIONS[:3])}

    # a clip that no line names may be anybody's; whose shard the last lines are of depends on who was faster
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join(lines[:4]) + lines[5][:30])
    strange = {path: path.read_bytes() for path in (out / json.loads(line)["file"] for line in lines[4:])}
    with pytest.raises(UserError, match=r"2 of these clips in no line of samples\.jsonl, first .*move them away"):
        sample(prompts=tmp_path / "p.json", out=out, model=str(family / "student"), seeds=2, batch=2)
    assert all(path.read_bytes() == clip for path, clip in strange.items())
    # a kill: one line torn, one clip gone; its line comes first, so none is without
    for path in (*strange, out / json.loads(lines[0])["file"]):
        path.unlink()
    for number in range(2):
        shard(number)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {row["file"]: row for row in rows} == whole
    assert len(rows) == 6  # nothing twice

    found = evaluate((out,), out=tmp_path / "r.json", flow="farneback", quick=True)["systems"]["tiny"]
    assert found["metrics"]["dynamic_degree"]["n"] == 6
    told = found["how"]["prompts"]
    assert told["count"] == 3
    assert told["sha256"] == fingerprint(CAPTIONS[:3]) == told["sampled_from"][0]["sha256"]
    assert found["how"]["missing"] == []
    with pytest.raises(UserError, match="with seed 0, not 4"):
        sample(prompts=tmp_path / "p.json", out=out, model=str(family / "student"), first_seed=4)
