import json
import math
import os
import resource
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.memory import hybrid
from dmosnet_jax.train import checkpoints, table_files
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints

OPTIMISER = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam(), optax.scale(-1e-3))
META = {"model": {"name": "osnet_x0_25"}, "config": {"seed": 3}, "loop": {"indep_threshold": 0.25}}


def make_state(mesh, *, seed=0, step=5, memory=False, width=6):
    """A state with random numbers in every array."""
    rng = np.random.default_rng(seed)
    params = {"conv1": {"kernel": rng.normal(size=(3, width))}, "fc": {"0": {"bias": rng.normal(size=(width,))}}}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    state = train_state.create(params, {"bn": {"mean": np.float32([1, 2])}}, OPTIMISER, seed=seed, mesh=mesh)
    state = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.integers(1, 9, leaf.shape), leaf.dtype), state)
    if memory:
        features = rng.normal(size=(20, 4)).astype(np.float32)
        labels = rng.integers(0, 5, 20)
        state = state.replace(memory=hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh))
    return state.replace(step=jnp.int32(step))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def save(workdir, *states, keep=3, scores=()):
    store = Checkpoints(workdir, keep=keep)
    for number, state in enumerate(states):
        score = scores[number] if scores else None
        store.save(state, META, metrics=None if score is None else {"mAP": score, "rank1": 0.5})
    store.close()


def steps_in(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 1), (8, 1), (1, 8), (8, 4)])
def test_a_new_process_on_any_device_count_restores_every_bit(tmp_path, memory, saved_on, restored_on):
    state = make_state(make_mesh(jax.devices()[:saved_on]), memory=memory)
    save(tmp_path, state)
    mesh = make_mesh(jax.devices()[:restored_on])
    like = make_state(mesh, seed=1, memory=memory)
    shapes = train_state.shapes(like.params, like.stats, OPTIMISER).replace(memory=like.memory)
    store = Checkpoints(tmp_path)
    assert store.latest() == 5
    assert store.meta(5) == META
    if memory:
        # A memory knows the devices that it is on.
        state = state.replace(memory=state.memory.replace(mesh=mesh))
    for target in (like, shapes):
        restored = store.restore(target, 5, mesh)
        assert_same(restored, state)
        places = train_state.shardings(like, mesh)
        for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(places), strict=True):
            assert leaf.sharding == place
    store.close()


def test_latest_ones_and_the_best_are_kept(tmp_path):
    mesh = make_mesh()
    states = [make_state(mesh, step=step) for step in range(1, 7)]
    save(tmp_path, *states, keep=2, scores=[0.2, 0.7, None, 0.5, None, None])
    assert steps_in(tmp_path) == ["2", "5", "6"]
    # The scores are read again by a new process, and a better one takes the place.
    save(tmp_path, make_state(mesh, step=7), make_state(mesh, step=8), keep=2, scores=[0.6, None])
    assert steps_in(tmp_path) == ["2", "7", "8"]
    save(tmp_path, make_state(mesh, step=9), make_state(mesh, step=10), keep=1, scores=[0.8, 0.1])
    assert steps_in(tmp_path) == ["10", "9"]
    assert checkpoints.find(tmp_path / "best")[1] == 9


def test_a_step_is_saved_once(tmp_path):
    mesh = make_mesh()
    store = Checkpoints(tmp_path)
    assert store.latest() is None
    store.save(make_state(mesh, seed=0), META)
    store.save(make_state(mesh, seed=1), {"loop": {}})
    store.close()
    store = Checkpoints(tmp_path)
    assert_same(store.restore(make_state(mesh, seed=2), 5, mesh), make_state(mesh, seed=0))
    store.close()


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path):
    mesh = make_mesh()
    state = make_state(mesh)
    expected = jax.tree.map(np.array, state)
    store = Checkpoints(tmp_path)
    store.save(state, META)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state))
    store.close()
    found = checkpoints.load_model(tmp_path)
    assert_same(found.params, expected.params)


def test_arrays_that_all_devices_hold_are_saved_by_one(tmp_path, monkeypatch):
    devices, original = [], checkpoints.ocp.CheckpointManager.save

    def noting(self, step, *, args, metrics):
        leaves = jax.tree.leaves([args[item].item for item in ("model", "train")])
        devices.extend(leaf.sharding.num_devices for leaf in leaves)
        return original(self, step, args=args, metrics=metrics)

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", noting)
    state = make_state(make_mesh(), memory=True)
    assert state.params["conv1"]["kernel"].sharding.num_devices == 8
    save(tmp_path, state)
    assert len(devices) > 8
    assert set(devices) == {1}


def test_what_a_killed_process_left_is_removed(tmp_path):
    mesh = make_mesh()
    save(tmp_path, make_state(mesh, step=1), make_state(mesh, step=2))
    folder = tmp_path / "checkpoints"
    # Killed while writing step 3, and while deleting step 0.
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    (folder / ".old" / "0" / "model").mkdir(parents=True)
    store = Checkpoints(tmp_path)
    assert store.latest() == 2
    store.save(make_state(mesh, step=3), META)
    store.close()
    assert steps_in(tmp_path) == ["1", "2", "3"]


def test_find_takes_workdir_folder_step_and_best(tmp_path):
    mesh = make_mesh()
    workdir = tmp_path / "7"
    save(workdir, *(make_state(mesh, step=step) for step in (3, 12, 20)), scores=[0.4, 0.9, 0.6])
    folder = workdir / "checkpoints"
    for path, step in [
        (workdir, 20),
        (folder, 20),
        (folder / "3", 3),
        (folder / "best", 12),
        (workdir / "best", 12),
        (workdir / "12", 12),
    ]:
        assert checkpoints.find(path) == (folder, step)
        assert checkpoints.find(str(path)) == (folder, step)


def test_best_of_checkpoints_without_scores_is_the_latest(tmp_path):
    mesh = make_mesh()
    save(tmp_path, make_state(mesh, step=0), make_state(mesh, step=4))
    assert checkpoints.find(tmp_path / "best")[1] == 4
    save(tmp_path / "zero", make_state(mesh, step=0), make_state(mesh, step=4), scores=[0.5, None])
    assert checkpoints.find(tmp_path / "zero" / "best")[1] == 0


def test_find_says_what_is_there(tmp_path):
    save(tmp_path / "run", make_state(make_mesh(), step=3))
    (tmp_path / "file").write_text("")
    for path in ("nowhere", "file", "nowhere/best", "nowhere/3"):
        with pytest.raises(DataError, match="no checkpoint here: give a run's workdir"):
            checkpoints.find(tmp_path / path)
    with pytest.raises(DataError, match=r"run/checkpoints/8: no such checkpoint; there are 3"):
        checkpoints.find(tmp_path / "run" / "checkpoints" / "8")


def test_weights_alone_are_read_without_a_state(tmp_path):
    state = make_state(make_mesh(), memory=True)
    save(tmp_path, state)
    found = checkpoints.load_model(tmp_path)
    assert (found.step, found.path, found.meta) == (5, tmp_path / "checkpoints" / "5", META)
    assert_same(found.params, jax.tree.map(np.asarray, state.params))
    assert_same(found.stats, jax.tree.map(np.asarray, state.stats))


def test_another_models_checkpoint_is_refused_with_every_difference(tmp_path):
    mesh = make_mesh()
    save(tmp_path, make_state(mesh))
    store = Checkpoints(tmp_path)
    with pytest.raises(DataError, match="checkpoint of another model or setting: params") as error:
        store.restore(make_state(mesh, width=7), 5, mesh)
    text = str(error.value)
    assert "params.conv1.kernel has shape (3, 6), not (3, 7)" in text
    assert "params.fc.0.bias has shape (6,), not (7,)" in text
    assert "\n" not in text
    with pytest.raises(DataError, match=r"missing memory\.features"):
        store.restore(make_state(mesh, memory=True), 5, mesh)
    store.close()


def files_of(workdir):
    folder = workdir / "checkpoints" / "5"
    # Orbax's own notes on the saving, which nothing is read from.
    notes = ("_CHECKPOINT_METADATA", "commit_success.txt")
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name not in notes)


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    os.truncate(path, 0)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resume(workdir, like, mesh):
    store = Checkpoints(workdir)
    try:
        assert store.meta(5) == META
        return store.restore(like, 5, mesh)
    finally:
        store.close()


@pytest.mark.parametrize("harm", [truncated, emptied, flipped, os.unlink])
def test_damage_to_any_file_is_one_line(tmp_path, capfd, harm):
    mesh = make_mesh()
    save(tmp_path / "whole", make_state(mesh, step=2), make_state(mesh, memory=True), scores=[0.5, 0.1])
    like = make_state(mesh, memory=True)
    for name in files_of(tmp_path / "whole"):
        if name.name == "checksums.json" and harm is os.unlink:
            continue
        workdir = tmp_path / "harmed"
        shutil.copytree(tmp_path / "whole", workdir)
        harm(workdir / "checkpoints" / "5" / name)
        with pytest.raises(DataError, match=r"checkpoints/5: checkpoint is damaged") as error:
            resume(workdir, like, mesh)
        assert str(name) in str(error.value) or name.name == "checksums.json"
        assert "\n" not in str(error.value)
        # Loading a model looks neither at the files of optimiser and memory nor at their checksums.
        if name.parts[0] not in ("train", "memory") and name.name != "checksums.json":
            with pytest.raises(DataError, match=r"checkpoints/5: checkpoint is damaged"):
                checkpoints.load_model(workdir)
        shutil.rmtree(workdir)
    assert capfd.readouterr() == ("", "")


def test_checkpoints_without_checksums_are_read_and_damage_is_still_an_error(tmp_path):
    mesh = make_mesh()
    save(tmp_path, make_state(mesh))
    folder = tmp_path / "checkpoints" / "5"
    (folder / "checksums.json").unlink()
    assert checkpoints.load_model(tmp_path).step == 5
    emptied(folder / "model" / "_METADATA")
    with pytest.raises(DataError, match=r"checkpoints/5: checkpoint can't be read"):
        checkpoints.load_model(tmp_path)
    shutil.rmtree(folder / "model")
    with pytest.raises(DataError, match=r"checkpoints/5: checkpoint can't be read"):
        resume(tmp_path, make_state(mesh), mesh)


def without_checksums(workdir, state):
    """A checkpoint as a stranger may give it, which can be anything."""
    save(workdir, state)
    folder = workdir / "checkpoints" / "5"
    (folder / "checksums.json").unlink()
    return folder


def in_chunks(folder, name, shape, chunks):
    """Claims other sizes of an array; its one chunk is zeros of that size, compressed."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    claimed = json.loads(store.read(f"{name}/.zarray").result().value)
    claimed |= {"shape": shape, "chunks": chunks, "compressor": {"id": "zlib", "level": 1}}
    packer = zlib.compressobj(1)
    packed = [packer.compress(bytes(2**20)) for _ in range(0, math.prod(chunks) * 4, 2**20)] + [packer.flush()]
    store.write(f"{name}/.zarray", json.dumps(claimed).encode()).result()
    store.write(f"{name}/{'.'.join('0' for _ in shape)}", b"".join(packed)).result()


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [([2**40], [2**20]), ([2**62], [2**20]), ([2**27], [2**27]), ([6], [2**27]), ([2**20] * 2, [2**10] * 2)],
    ids=["shape", "overflow", "bomb", "chunk", "matrix"],
)
def test_sizes_that_a_checkpoint_claims_are_refused_before_memory_is_taken(tmp_path, shape, chunks):
    mesh = make_mesh()
    folder = without_checksums(tmp_path, make_state(mesh))
    in_chunks(folder / "model", "params.fc.0.bias", shape, chunks)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2**22
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"5/model: claims to hold arrays of [\d,]+ bytes in files of") as error:
        checkpoints.load_model(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"claims to hold arrays of|has shape"):
        resume(tmp_path, make_state(mesh), mesh)
    # Kilobytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 2**50),
        ("rows", -1),
        ("block", 0),
        ("first", 2**50),
        ("first", "0"),
        ("file", "../features.0.bin"),
        ("file", "/dev/zero"),
        ("checksums", 5),
        ("checksums", []),
    ],
)
def test_tables_that_are_not_what_their_description_claims(tmp_path, field, value):
    mesh = make_mesh()
    folder = without_checksums(tmp_path, make_state(mesh, memory=True))
    path = folder / "memory" / "part-0.json"
    described = json.loads(path.read_text())
    described["features"]["parts"][0][field] = value
    path.write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"5: checkpoint is damaged \(memory/part-0\.json describes no tables\)"):
        resume(tmp_path, make_state(mesh, memory=True), mesh)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"features": []}', '{"features": {"shape": [4]}}', "[" * 100_000]
)
def test_tables_without_a_description(tmp_path, text):
    mesh = make_mesh()
    folder = without_checksums(tmp_path, make_state(mesh, memory=True))
    (folder / "memory" / "part-0.json").write_text(text)
    with pytest.raises(DataError, match=r"checkpoints/5: checkpoint "):
        resume(tmp_path, make_state(mesh, memory=True), mesh)


@pytest.mark.parametrize("text", ["[]", "null", "5", '{"model": []}', '{"config": "x"}', "[" * 100_000])
@pytest.mark.parametrize("name", ["meta/metadata", "model/_METADATA"])
def test_descriptions_of_another_kind_are_one_line(tmp_path, name, text):
    folder = without_checksums(tmp_path, make_state(make_mesh()))
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=r"checkpoints/5: checkpoint can't be read") as error:
        checkpoints.load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model/_METADATA", "model/manifest.ocdbt", "meta/metadata", "memory/part-0.json"])
def test_pipes_in_a_checkpoint_are_not_waited_for(tmp_path, name):
    mesh = make_mesh()
    folder = without_checksums(tmp_path, make_state(mesh, memory=True))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=rf"checkpoints/5: checkpoint is damaged \({name} is no file\)"):
        resume(tmp_path, make_state(mesh, memory=True), mesh)


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    mesh = make_mesh()
    save(tmp_path, make_state(mesh, step=5))
    store = Checkpoints(tmp_path)

    def full(*unused, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.checksums, "write", full)
    store.save(make_state(mesh, step=6), META)
    with pytest.raises(DataError, match=r"checkpoints/6: checkpoint can't be written \(.*No space left on device"):
        store.wait()
    monkeypatch.undo()
    assert checkpoints.find(tmp_path)[1] == 5
    assert checkpoints.load_model(tmp_path).step == 5


def memories(found):
    return {
        name: np.asarray(getattr(found.memory, name)) for name in ("features", "labels", "class_sums", "class_counts")
    }


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 8), (8, 1), (4, 2)])
def test_class_sums_that_were_left_out_follow_from_features_and_labels(tmp_path, saved_on, restored_on):
    state = make_state(make_mesh(jax.devices()[:saved_on]), memory=True)
    whole, compact = tmp_path / "whole", tmp_path / "compact"
    save(whole, state)
    save(compact, state.replace(memory=state.memory.compacted()))
    sizes = [sum(path.stat().st_size for path in w.rglob("memory/*.bin")) for w in (whole, compact)]
    rows = state.memory.features.shape[0]
    # Sums have the shape of the features; counts and labels are 4 bytes a row.
    assert sizes == [rows * (2 * 4 * 4 + 8), rows * (4 * 4 + 4)]
    mesh = make_mesh(jax.devices()[:restored_on])
    like = make_state(mesh, seed=1, memory=True)
    expected = memories(state)
    for workdir in (whole, compact):
        restored = resume(workdir, like, mesh)
        places = train_state.shardings(like, mesh).memory
        for name, value in memories(restored).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
            assert getattr(restored.memory, name).sharding.is_equivalent_to(getattr(places, name), value.ndim)


def test_a_memory_that_was_saved_with_the_optimiser_is_read(tmp_path, monkeypatch):
    mesh = make_mesh()
    state = make_state(mesh, memory=True)
    split, tables = checkpoints._split, checkpoints._tables
    monkeypatch.setattr(checkpoints, "_tables", lambda memory: {})

    def early(given):
        found = split(given)
        return {**found, "train": found["train"] | {"memory": tables(given.memory)}}

    monkeypatch.setattr(checkpoints, "_split", early)
    save(tmp_path, state)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.bin"))
    assert_same(resume(tmp_path, make_state(mesh, seed=1, memory=True), mesh), state)


def test_a_process_reads_only_the_blocks_of_its_rows(tmp_path, monkeypatch):
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    monkeypatch.setattr(table_files, "BLOCK_BYTES", 3 * 8)
    table_files.write(tmp_path, {"t": ((20, 2), [(0, rows[:10]), (10, rows[10:])])})
    content = bytearray((tmp_path / "t.10.bin").read_bytes())
    content[-1] ^= 1
    (tmp_path / "t.10.bin").write_bytes(content)
    parts = table_files._descriptions(tmp_path)[0]["t"]["parts"]

    def read(start, stop):
        found = table_files._aligned((stop - start, 2), np.float32)
        assert sum(table_files._fill(tmp_path, part, found, start) for part in parts) == stop - start
        np.testing.assert_array_equal(found, rows[start:stop])

    for start in range(20):
        for stop in range(start + 1, 20):
            read(start, stop)
    with pytest.raises(table_files.DamagedTableError, match=r"the checksum of .*/t\.10\.bin differs"):
        read(18, 20)


def test_meta_is_plain_json(tmp_path):
    save(tmp_path, make_state(make_mesh()))
    assert json.loads((tmp_path / "checkpoints" / "5" / "meta" / "metadata").read_text()) == META
