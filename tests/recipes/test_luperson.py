"""LUPerson's whole chain: a raw copy is converted, and the paper's pre-training runs on it."""

import json
import pathlib

import pytest

from dmosnet_jax.data.splits import load_split

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_pretraining_finds_the_converted_data_set(cli, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from data_prep import convert
    from data_prep.synthetic.pedestrians import Scene
    from tests.data_prep import raw_copies

    scene = Scene(train_ids=8, test_ids=4, cameras=4, images=2, image_size=(64, 32))
    labels = raw_copies.write("luperson", tmp_path / "raw", scene, form="lmdb")["train"]
    options = {"workers": 1, "shard_mib": 0.05}
    convert.convert("luperson", tmp_path / "data", source=tmp_path / "raw", options=options)
    fields = {
        "data_dir": tmp_path / "data",
        "image_size": "(64, 32)",
        "batch_size": 16,
        "model.dtype": "float32",
        "model.bn_group_size": 8,
        "eval.batch_size": 16,
        "data.threads": 1,
        "spcl.k1": 8,
        "spcl.k2": 3,
        "train.steps_per_epoch": 3,
        "train.log_every_steps": 1,
    }
    # The best names first, as published lists have them.
    published = [f"{label.filename}.jpg" for label in reversed(labels)]
    (tmp_path / "list.txt").write_text("\n".join(published))
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"{ROOT}/configs/spcl_luperson.py:osnet_x0_25,epochs=1,cfs={tmp_path / 'list.txt'}"
    finished = cli.forked(f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags)
    assert finished.status == 0, finished.err
    assert finished.errors == []
    kept = -(-len(labels) // 2)
    assert f"{kept} of {len(labels)} images, the best by" in finished.out
    assert "0 of them not in the data set" in finished.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    assert load_split(tmp_path / "data", "luperson", "train").filenames([0]) == [f"{labels[0].filename}.jpg"]
