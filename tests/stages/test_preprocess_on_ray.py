"""Preprocessing on real Ray clusters of processes of this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import web_server
from made_world import (
    ROOT,
    command,
    identities,
    run_on,
    write_captions,
    write_video,
)

from opensora_jax.data import bucket_folders, dataset
from opensora_jax.data.joined import load_joined
from opensora_jax.preprocessing.options import Options, PreprocessError
from opensora_jax.stages.preprocess_buckets import preprocess_buckets

ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "XLA_FLAGS": "",
    "JAX_PLATFORMS": "cpu",
    # Without it, Ray takes a machine this full for one that is out of memory.
    "RAY_memory_monitor_refresh_ms": "0",
}


@pytest.fixture(scope="module")
def many(tmp_path_factory, world):
    """(captions, videos, dataset): 24 videos of one to three windows, and without Ray."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "videos").mkdir()
    captions = {}
    for i in range(24):
        file = f"video{i:02d}.mp4"
        captions[file] = ["a shared caption", f"caption {i}", f"caption {i // 2}"]
        if i % 7 == 3:
            (folder / "videos" / file).write_text("no video")
        else:
            write_video(folder / "videos" / file, 4 + i, seed=i)
    path = write_captions(folder / "captions.json", captions)
    options = {"videos": folder / "videos", "videos_per_part": 1, "max_frames": None}
    run_on(world, folder / "dataset", captions=path, **options)
    return path, folder / "videos", folder / "dataset"


def start(words, **environment):
    return subprocess.Popen(
        [sys.executable, *words, "--engine", "ray"],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    return said


def expect_same(found, expected):
    """Row for row, and in what metadata.json says but for paths and files."""
    found, expected = dataset.open_dataset(found), dataset.open_dataset(expected)
    assert len(found) == len(expected)
    for i in range(len(expected)):
        for name, values in expected[i].items():
            np.testing.assert_array_equal(found[i][name], values, err_msg=f"{i} {name}")
        for name in ("video_file", "caption", "fps"):
            assert found.column(i, name) == expected.column(i, name)
    np.testing.assert_array_equal(found.code_counts, expected.code_counts)
    np.testing.assert_array_equal(found.codebook, expected.codebook)
    others = {"command", "checksum", "files", "engine", "n_texts", "settings"}
    for name in expected.metadata.keys() - others:
        assert found.metadata[name] == expected.metadata[name], name


@pytest.mark.slow
def test_buckets_are_the_same_with_ray(world, tmp_path):
    """Of square videos of many lengths, two sizes."""
    words = command(world, world / "captions.json", world / "videos", tmp_path / "ray")
    at = words.index("--resolution")
    words[at : at + 3] = ["--buckets", "16x16x16,8x16x16"]
    words[words.index("--videos_per_part") + 1] = "4"
    assert "4 kept, 1 filtered, 3 failed" in finish(start(words))
    models = {"vqvae": world / "vqvae", "text_model": world / "text_model"}
    options = Options(**models, window=8, videos_per_part=4)
    paths = (world / "captions.json", world / "videos", tmp_path / "local")
    preprocess_buckets(*paths, options, asked="16x16x16,8x16x16")
    folders = bucket_folders.datasets(tmp_path / "local")
    assert len(folders) == 2
    for folder in folders:
        expect_same(tmp_path / "ray" / folder.name, folder)
    one, other = (bucket_folders.read(tmp_path / name) for name in ("ray", "local"))
    assert one == other


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


@pytest.mark.slow
def test_ray_makes_the_same_rows_and_says_what_was_left_out(world, tmp_path):
    local = tmp_path / "local"
    run_on(world, local, max_frames=30, videos_per_part=3)
    words = command(world, world / "captions.json", world / "videos", tmp_path / "ray")
    said = finish(start([*words, "--videos_per_part", "3", "--max_frames", "30"]))
    assert "2 videos filtered" in said
    assert "3 videos failed" in said
    expect_same(tmp_path / "ray", local)
    found = dataset.read_metadata(tmp_path / "ray")
    assert found["counts"] == {"kept": 3, "filtered": 2, "failed": 3}
    assert not list((tmp_path / "ray").glob(".*.tmp"))
    joined, expected = load_joined(tmp_path / "ray"), load_joined(local)
    assert len(joined) == len(expected)
    for row, other in zip(joined, expected, strict=True):
        assert row["caption"] == other["caption"]
        np.testing.assert_array_equal(row["video_latent_states"], other["video_latent_states"])
    said = finish(start([*words, "--videos_per_part", "3", "--max_frames", "30"]))
    assert "done already" in said


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(world, many, tmp_path):
    captions, videos, expected = many
    words = command(world, captions, videos, tmp_path / "killed")
    process = start(words)
    wait_for(tmp_path / "killed" / "part-00002.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(dataset.DatasetError, match=r"To finish it, run: python .* --engine ray"):
        dataset.open_dataset(tmp_path / "killed")
    noted = sorted((tmp_path / "killed").glob("part-*.json"))
    folders = [
        tmp_path / "killed" / part["name"]
        for path in noted
        for part in json.loads(path.read_text())["parts"]
    ]
    made = identities([*noted, *folders])
    options = {"videos": videos, "videos_per_part": 1, "max_frames": None}
    with pytest.raises(PreprocessError, match="begun with engine='ray', not 'local'"):
        run_on(world, tmp_path / "killed", captions=captions, **options)
    (tmp_path / "killed" / "parts.json").write_text("[]")  # as of one killed while it finishes
    finish(start(words))
    assert identities([*noted, *folders]) == made
    expect_same(tmp_path / "killed", expected)


@pytest.mark.slow
def test_ctrl_c_ends_it_in_one_line(world, many, tmp_path):
    captions, videos, expected = many
    words = command(world, captions, videos, tmp_path / "stopped")
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        process = start(words)
        wait_for(tmp_path / "stopped" / "metadata.json", process)
        time.sleep(4)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == status, said
        assert "Traceback" not in said
        assert said.count("the same command goes on from here") == 1
    finish(start(words))
    expect_same(tmp_path / "stopped", expected)


@pytest.mark.slow
def test_a_node_dies_in_the_middle_and_nothing_is_lost(world, many, tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    captions, videos, expected = many
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        words = command(world, captions, videos, tmp_path / "dataset")
        process = start([*words, "--ray_address", cluster.address])
        wait_for(tmp_path / "dataset" / "part-00003.json", process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert not (tmp_path / "dataset" / "parts.json").exists()  # not over yet
        finish(process)
    finally:
        cluster.shutdown()
    expect_same(tmp_path / "dataset", expected)


@pytest.mark.slow
def test_a_video_that_never_comes_costs_that_video(world, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(world / "videos" / "whole.mp4", site)
    names = ["whole.mp4", "never.mp4", "nothing.mp4"]
    write_captions(site / "captions.json", {name: ["a red circle"] for name in names})
    with web_server.serve(site) as address:
        words = command(world, f"{address}/captions.json", address, tmp_path / "out")
        finish(start([*words, "--video_timeout", "20"]))
    failed = dataset.read_metadata(tmp_path / "out")["failed"]
    assert [(video["file"], video["reason"]) for video in failed] == [
        ("never.mp4", "not decoded after 20 seconds"),
        ("nothing.mp4", "no such file"),
    ]


TROUBLED = f"""
import runpy, trouble
from opensora_jax.preprocessing.job import Job

decoding = Job.decoding.fget
Job.decoding = property(lambda job: trouble.Troubled.like(decoding(job)))
runpy.run_path({str(ROOT / "data_prep" / "preprocess_data.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_decoder_that_hangs_or_crashes_in_the_middle_costs_that_video(world, tmp_path):
    captions = {}
    for seed, name in enumerate(("a.mp4", "hang.mp4", "crash.mp4", "b.mp4")):
        write_video(tmp_path / name, 24, seed)  # three windows
        captions[name] = ["a red circle"]
    path = write_captions(tmp_path / "captions.json", captions)
    _, *words = command(world, path, tmp_path, tmp_path / "troubled")
    finish(start(["-c", TROUBLED, *words, "--video_timeout", "10"]))
    good = {name: captions[name] for name in ("a.mp4", "b.mp4")}
    options = {"captions": write_captions(tmp_path / "good.json", good), "videos": tmp_path}
    run_on(world, tmp_path / "good", **options, videos_per_part=1)
    whole, found = (dataset.open_dataset(tmp_path / name) for name in ("good", "troubled"))
    assert [found.column(i, "video_file") for i in range(len(found))] == ["a.mp4", "b.mp4"]
    for i in range(2):
        codes = "video_latent_states"
        np.testing.assert_array_equal(found[i][codes], whole[i][codes])
    assert [video["reason"] for video in found.metadata["failed"]] == [
        "not decoded after 10 seconds",
        "its decoder crashed: SIGSEGV",
    ]


@pytest.mark.slow
def test_videos_and_dataset_may_lie_in_an_object_store(world, many, tmp_path, monkeypatch):
    from moto import server

    for name, value in {
        **{"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
        **{"AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
    }.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(ENVIRONMENT, name, value)
    store = server.ThreadedMotoServer(port=0)
    store.start()
    try:
        host, port = store.get_host_and_port()
        for of in (os.environ, ENVIRONMENT):
            monkeypatch.setitem(of, "AWS_ENDPOINT_URL", f"http://{host}:{port}")
        from etils import epath

        captions, videos, expected = many
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        bucket = epath.Path("s3://bucket")
        for path in [captions, *videos.iterdir()]:
            target = bucket / ("videos" if path != captions else "") / path.name
            target.write_bytes(path.read_bytes())
        words = command(world, bucket / "captions.json", bucket / "videos", bucket / "dataset")
        finish(start([*words, "--videos_per_part", "8"]))
        expect_same(bucket / "dataset", expected)
    finally:
        store.stop()


def test_what_engines_cannot_do_is_told_at_once(world, tmp_path):
    cases = [
        ({"engine": "dask"}, "engine=dask: expected one of local, ray"),
        ({"ray_address": "auto"}, "ray_address=auto: expected engine=ray"),
        ({"engine": "ray", "flat": True}, "flat=True: expected engine=local"),
    ]
    for options, message in cases:
        with pytest.raises(PreprocessError, match=message):
            run_on(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PreprocessError, match="expected a folder of this machine"):
        run_on(world, "gs://bucket/out")


@pytest.mark.slow
def test_no_cluster_and_a_bad_model_are_one_line(world, many, tmp_path):
    captions, videos, _ = many
    words = command(world, captions, videos, tmp_path / "out")
    process = start([*words, "--ray_address", "127.0.0.1:9"])
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "error: ray_address=127.0.0.1:9: no cluster there" in said.splitlines()[-1]
    shutil.copytree(world / "text_model", tmp_path / "text_model")
    for path in (tmp_path / "text_model").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    words[words.index("--text_model") + 1] = str(tmp_path / "text_model")
    words[words.index("-o") + 1] = str(tmp_path / "other")
    process = start(words)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/text_model/model.safetensors: header of")
