"""What others wrote stays text on the page, wherever it comes from."""

import json
import shlex

from made_run import Page, write_dit_metrics, write_rest, write_samples, write_vqvae
from ml_collections import ConfigDict

from opensora_jax.report import sections
from opensora_jax.stages import report
from opensora_jax.train.metrics_log import MetricsWriter

# Every end that the page's HTML has to get out of, and what templates and Matplotlib would run.
HOSTILE = (
    """--></p></td></pre></title></style></svg>"'><script>alert(1)</script>"""
    """<img src=x onerror="alert(1)"> &lt;&amp; {{ 7 * 7 }} {% raw %} {# ${title} $\\frac{"""
)


def reported(workdir, text, monkeypatch):
    """The page of a run in which `text` is in every place that others can write to."""
    name = text.replace("/", "|")[:120]  # of a file
    workdir = workdir / name
    workdir.mkdir()
    monkeypatch.setattr(sections, "_MAX_PROMPTS", 1)  # so that the remark names the folder
    monkeypatch.setattr(sections, "_RECONSTRUCTION_BYTES", 1)  # and this section the file
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "opensora_jax.main", text])
    write_samples(workdir, 10, [text, "other"])
    write_vqvae(workdir)
    write_dit_metrics(workdir)
    write_rest(workdir)
    prompts = workdir / "dit" / "samples" / "step000010" / "prompts.json"
    entries = json.loads(prompts.read_text())
    entries[0]["file"] = f"{name}.mp4"
    (prompts.parent / "00.mp4").rename(prompts.parent / f"{name}.mp4")
    prompts.write_text(json.dumps(entries))
    metadata = json.loads((workdir / "dataset" / "metadata.json").read_text())
    metadata |= {"vqvae": text, "text_model": text, "fps": text, "n_codes": text}
    metadata |= {"resolution": [text, text], "latent_shape": [text], "counts": {text: 1}}
    for kind in ("filtered", "failed"):
        metadata[kind] = [{"file": text, "reason": text}]
    (workdir / "dataset" / "metadata.json").write_text(json.dumps(metadata))
    (workdir / "seconds.json").write_text(json.dumps({text: 1.0}))
    writer = MetricsWriter(workdir / "vqvae", 100)
    writer.write(200, {f"held_out/detected_{text}": 0.5, "held_out/detected_all": 0.5})
    writer.write(200, {f"validation_loss/t={text}": 0.5, "validation_loss": 0.5})
    report.run(ConfigDict({"sample": {"prompts": (text,)}}), workdir)
    return Page(workdir), name


def outline(page):
    """Every element, with the names of its attributes; long labels leave lines nothing to show."""
    return [(tag, attributes.keys() - {"d"}) for tag, attributes in page.tags]


def test_whatever_others_wrote_is_text(tmp_path, monkeypatch):
    plain, _ = reported(tmp_path, "plain", monkeypatch)
    page, name = reported(tmp_path, HOSTILE, monkeypatch)
    # No element and no attribute came of it, so no script and no handler of events.
    assert outline(page) == outline(plain)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}

    assert page.inside("title") == page.inside("h1") == [f"Text to video: {name}"]
    assert shlex.split(page.inside("code")[0])[-1] == HOSTILE
    assert page.inside("p").count(HOSTILE) == 1  # the prompt
    assert any(name in text for text in page.inside("p"))  # the folder of the other prompt
    assert any(name in text for text in page.inside("figure"))  # the file that is too large
    assert f"videos {HOSTILE}" in page.inside("span")
    cells = page.inside("td")
    assert cells.count(HOSTILE) == 4 + 2 * 2 + 1
    assert f"{HOSTILE} × {HOSTILE}" in cells
    assert str(tmp_path / name) in cells
    assert f"Time for {HOSTILE}" in page.inside("th")
    assert json.loads("".join(page.inside("pre"))) == {"sample": {"prompts": [HOSTILE]}}
    assert page.inside("text").count(HOSTILE.rpartition("/")[2]) == 2  # in two charts


def test_only_samples_get_onto_the_page(tmp_path):
    write_samples(tmp_path, 10)
    prompts = tmp_path / "dit" / "samples" / "step000010" / "prompts.json"
    (tmp_path / "secret").write_bytes(b"of another folder")
    prompts.write_text(json.dumps([{"file": "../../../secret", "prompt": "a circle"}]))
    report.run(ConfigDict({}), tmp_path)
    assert Page(tmp_path).videos == []


def test_a_name_that_is_not_unicode_is_shown(tmp_path):
    (tmp_path / "dataset").mkdir()
    entry = {"file": "caf\udce9.mp4", "reason": "not a video"}
    (tmp_path / "dataset" / "metadata.json").write_text(json.dumps({"failed": [entry]}))
    report.run(ConfigDict({}), tmp_path)
    assert r"caf\udce9.mp4" in Page(tmp_path).inside("td")
