import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dataio.draws import cutmix_partner
from dataio.loader import Loader, _one_torch_thread
from dataio.plan import PLAN_VERSION
from dataio.quarantine import Quarantine
from dataio.spec import DataError, DataSpec, Perturbation, RoleNeeds, RoleSpec
from dataio.stream import RoleStream

from .fakes import jpeg, labelled, metadata, png, shards_of, smooth, unlabelled, write_dataset, write_labels

STRONG = Perturbation(jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, cutmix_p=0.7)
STUDENT = {"labelled": RoleNeeds(), "unlabelled": RoleNeeds(sidecar=True)}
S = 56
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_thread_left_behind():
    before = set(threading.enumerate())  # an earlier test's may wait for the garbage collector; the kernels' stay
    yield
    names = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in names if name.startswith(("fathom-loader", "fathom-maps"))]


@pytest.fixture(scope="module")
def student_data(tmp_path_factory):
    """Labelled : unlabelled 1:2, sizes that end passes at odd places."""
    root = tmp_path_factory.mktemp("student")
    photographs = shards_of([9, 8, 12], unlabelled, "u")
    return DataSpec(
        roles={
            "labelled": RoleSpec(
                datasets=(write_dataset(root / "l", shards_of([6, 5], labelled, "l")),), batch=4, lanes=4
            ),
            "unlabelled": RoleSpec(
                datasets=(write_dataset(root / "u", photographs, with_depth=False),),
                labels=(write_labels(root / "labels", photographs),),
                batch=8,
                lanes=4,
                perturbation=STRONG,
            ),
        },
        input_size=S,
        shuffle_window=5,
    )


def batches(data, needs, count, *, views=("student", "clean"), **options):
    with Loader(data, needs, views=views, seed=5, **options) as loader:
        return [next(loader) for _ in range(count)]


def only(data_folder, *, batch=4, lanes=1, perturbation=None, labels=(), **spec):
    role = RoleSpec(
        datasets=(str(data_folder),),
        labels=labels,
        batch=batch,
        lanes=lanes,
        perturbation=perturbation or Perturbation(),
    )
    return DataSpec(roles={"labelled": role}, input_size=S, **spec)


def rows_by_key(batch):
    """(role, key) -> everything of that row; absent slots left out."""
    rows = {}
    for role, _ in batch.roles:
        for i in range(*batch.rows(role).indices(len(batch))):
            if batch.keys[i]:
                tensors = [view[i] for _, view in sorted(batch.views.items())]
                tensors += [target.value_BHW[i] for target in batch.targets.values()]
                rows[role, batch.keys[i]] = [*tensors, batch.region_BHW[i], batch.weight_B[i]]
    return rows


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


def test_shapes_rows_and_cursor(student_data):
    first, second = batches(student_data, STUDENT, 2)
    assert len(first) == 12
    assert first.roles == (("labelled", 4), ("unlabelled", 8))
    assert first.views["student"].shape == first.views["clean"].shape == (12, 3, S, S)
    assert first.targets["disparity"].value_BHW.shape == first.region_BHW.shape == (12, S, S)
    assert first.region_BHW.dtype == torch.uint8
    assert first.weight_B.tolist() == [1.0] * 12
    assert first.cursor == {"labelled": 4, "unlabelled": 8}
    assert second.cursor == {"labelled": 8, "unlabelled": 16}
    labelled_rows = first.rows("labelled")
    assert torch.equal(first.views["student"][labelled_rows], first.views["clean"][labelled_rows])
    assert not torch.equal(first.views["student"][4:], first.views["clean"][4:])
    assert set(first.region_BHW[labelled_rows].unique().tolist()) <= {0, 1}
    assert 2 in first.region_BHW[4:]
    value = first.targets["disparity"].value_BHW[labelled_rows]
    assert value.amin() == 0
    assert value.amax() == 1


def test_a_pass_shows_every_sample_once_and_ends_partial(student_data):
    count = {"labelled": 3, "unlabelled": 4}  # 11 by 4, 29 by 8
    found = batches(student_data, STUDENT, 12)
    for role, size in (("labelled", 11), ("unlabelled", 29)):
        for start in range(0, 12, count[role]):
            group = found[start : start + count[role]]
            keys = [key for batch in group for key in batch.keys[batch.rows(role)] if key]
            assert len(keys) == len(set(keys)) == size
        last = found[count[role] - 1]
        missing = [i for i in range(*last.rows(role).indices(12)) if not last.keys[i]]
        assert len(missing) == -size % {"labelled": 4, "unlabelled": 8}[role]
        assert not last.weight_B[missing].any()
        assert not last.region_BHW[missing].any()
        assert not last.views["student"][missing].any()
    assert [batch.cursor["labelled"] for batch in found[:4]] == [4, 8, 11, 15]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_what_one_rank_sees(student_data, world_size):
    alone = batches(student_data, STUDENT, 5)
    shares = [batches(student_data, STUDENT, 5, rank=r, world_size=world_size) for r in range(world_size)]
    for step, batch in enumerate(alone):
        union = {}
        for share in shares:
            assert share[step].cursor == batch.cursor
            union |= rows_by_key(share[step])
        expected = rows_by_key(batch)
        assert union.keys() == expected.keys()
        for key, tensors in expected.items():
            for mine, theirs in zip(tensors, union[key], strict=True):
                assert torch.allclose(mine.float(), theirs.float(), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_a_restart_goes_on_bit_for_bit(student_data, steps):
    whole = batches(student_data, STUDENT, steps + 3)
    resumed = batches(student_data, STUDENT, 3, cursor=whole[steps - 1].cursor)
    for expected, found in zip(whole[steps:], resumed, strict=True):
        assert found.keys == expected.keys
        assert found.cursor == expected.cursor
        assert same(rows_by_key(expected), rows_by_key(found))


def test_cutmix_pastes_another_row_of_the_same_lane(student_data):
    mixed = batches(student_data, STUDENT, 2)
    plain_role = RoleSpec(
        **{
            **vars(student_data.roles["unlabelled"]),
            "perturbation": Perturbation(jitter_p=0.8, grayscale_p=0.2, blur_p=0.5),
        }
    )
    plain_data = DataSpec(**{**vars(student_data), "roles": {**student_data.roles, "unlabelled": plain_role}})
    plain = batches(plain_data, STUDENT, 2)
    seen = 0
    for with_mix, without in zip(mixed, plain, strict=True):
        for i in range(4, 12):
            partner = 4 + ((i - 4) ^ 1)  # two rows per lane
            pasted = with_mix.region_BHW[i] == 2
            seen += bool(pasted.any())
            for name in ("student", "clean"):
                expected = torch.where(pasted, without.views[name][partner], without.views[name][i])
                assert torch.equal(with_mix.views[name][i], expected)
            target = torch.where(
                pasted, without.targets["disparity"].value_BHW[partner], without.targets["disparity"].value_BHW[i]
            )
            assert torch.equal(with_mix.targets["disparity"].value_BHW[i], target)
    assert seen > 3


def test_cutmix_partners_are_drawn_anew_for_every_place_of_every_pass(tmp_path):
    folder = write_dataset(tmp_path / "d", shards_of([16], unlabelled), with_depth=False)
    needs = {"labelled": RoleNeeds(target="none")}
    plain, mixed = (
        batches(only(folder, batch=8, lanes=2, perturbation=Perturbation(cutmix_p=p)), needs, 4, views=("clean",))
        for p in (0, 1)
    )
    offsets = []
    for number, (without, with_mix) in enumerate(zip(plain, mixed, strict=True)):
        epoch, offset = divmod(4 * number, 8)  # two batches to a pass: each lane has 8 samples, 4 of a batch
        for i in range(8):
            lane, own = divmod(i, 4)
            partner = cutmix_partner(own, 4, 5, "labelled", epoch, 8 * lane + offset + own)
            offsets.append((partner - own) % 4)
            pasted = with_mix.region_BHW[i] == 2
            assert pasted.any()
            expected = torch.where(pasted, without.views["clean"][4 * lane + partner], without.views["clean"][i])
            assert torch.equal(with_mix.views["clean"][i], expected), (number, i)
    assert len({tuple(offsets[start : start + 8]) for start in range(0, 32, 8)}) == 4


def test_views_and_targets_only_as_asked(student_data, tmp_path):
    folder = write_dataset(tmp_path / "d", shards_of([6], unlabelled), with_depth=False)
    (batch,) = batches(only(folder), {"labelled": RoleNeeds(target="none")}, 1, views=("clean",))
    assert set(batch.views) == {"clean"}
    assert not batch.targets
    assert batch.region_BHW.eq(1).all()
    (batch,) = batches(only(folder), {"labelled": RoleNeeds(target="none")}, 1, views=("student",))
    assert set(batch.views) == {"student"}


def test_targets_line_up_with_images(tmp_path):
    """Disparity painted into the image: after crop and flip the two still agree."""
    samples = {}
    for i in range(8):
        disparity_HW = smooth(i, 70, 90)[..., 0].astype(float) / 255 * 0.9 + 0.1
        image = np.repeat((disparity_HW * 255).astype(np.uint8)[..., None], 3, -1)
        samples[f"k{i}"] = {"depth.png": png((1000 / disparity_HW).astype(np.uint16)), "jpg": jpeg(image)}
    (batch,) = batches(only(write_dataset(tmp_path / "d", [samples]), batch=8), {"labelled": RoleNeeds()}, 1)
    for i in range(8):
        grey = batch.views["clean"][i, 0]
        stretched = (grey - grey.min()) / (grey.max() - grey.min())
        assert (stretched - batch.targets["disparity"].value_BHW[i]).abs().max() < 0.06


def test_every_kind_of_bad_sample_keeps_its_slot(tmp_path):
    good = labelled(0)
    hollow = png(np.zeros((48, 56), np.uint16))
    samples = {
        "bad_image": {**good, "jpg": good["jpg"][:-200]},
        "bad_image_2": {**good, "jpg": b"nothing"},
        "bad_metadata": {**good, "json": b"{"},
        "bad_target": {**good, "depth.png": png(np.ones((48, 56), np.uint8))},
        "bad_target_2": {**good, "depth.png": good["depth.png"][:-3000]},
        "missing_image": {"depth.png": good["depth.png"]},
        "missing_target": unlabelled(1),
        "no_valid_pixels": {**good, "depth.png": hollow},
        "size_mismatch": {**good, "jpg": labelled(2, 40, 40)["jpg"]},
        "sky_only": {**good, "depth.png": hollow, "sky.png": png(np.full((48, 56), 255, np.uint8))},
        "good": {**labelled(3), "json": metadata(scale=0.002)},
        "good_2": labelled(4),
    }
    path = str(tmp_path / "quarantine.jsonl")
    data = only(write_dataset(tmp_path / "d", [samples]), batch=12, perturbation=STRONG)
    quarantine = Quarantine(path, 1.0)
    with Loader(data, {"labelled": RoleNeeds()}, views=("student",), seed=0, quarantine=quarantine) as loader:
        batch = next(loader)
    alive = {"sky_only", "good", "good_2"}
    for i, key in enumerate(batch.keys):
        assert batch.weight_B[i] == (key in alive)
        if key not in alive:
            assert not batch.views["student"][i].any()
            assert not batch.region_BHW[i].any()
            assert not batch.targets["disparity"].value_BHW[i].any()
    assert torch.isfinite(batch.views["student"]).all()
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in lines} == {
        key: key.removesuffix("_2") for key in samples if key not in alive
    }


def test_failed_labels_and_cutmix_partners(tmp_path):
    shards = shards_of([8], unlabelled)
    failed = ["s0_000", "s0_003", "s0_005"]
    data = only(
        write_dataset(tmp_path / "u", shards, with_depth=False),
        batch=8,
        perturbation=Perturbation(cutmix_p=1.0),
        labels=(write_labels(tmp_path / "labels", shards, fail=failed),),
        max_bad_fraction=0.5,
    )
    (batch,) = batches(data, {"labelled": RoleNeeds(sidecar=True)}, 1)
    for i, key in enumerate(batch.keys):
        assert batch.weight_B[i] == (key not in failed)
        if key not in failed:
            assert not batch.views["clean"][i].eq(0).all(0).any()  # nothing blank was pasted


def test_too_many_bad_samples_stop_the_run(tmp_path):
    samples = {f"k{i}": labelled(i) if i % 2 else unlabelled(i) for i in range(8)}
    data = only(write_dataset(tmp_path / "d", [samples]))
    with Loader(data, {"labelled": RoleNeeds()}, views=("clean",), seed=0) as loader:
        next(loader)
        with pytest.raises(DataError, match="4 of 8 samples are bad: 4 missing_target"):
            next(loader)
        with pytest.raises(DataError):
            next(loader)


def test_a_shard_that_vanishes_is_raised_in_the_consumer(tmp_path):
    data = only(write_dataset(tmp_path / "d", shards_of([4, 4], labelled)), shuffle_window=4, prefetch=1)
    with Loader(data, {"labelled": RoleNeeds()}, views=("clean",), seed=0) as loader:
        for tar in (tmp_path / "d" / "shards").glob("*.tar"):
            tar.unlink()
        with pytest.raises(DataError, match="missing"):
            next(loader)


def test_what_comes_before_a_failure_is_handed_out(tmp_path, monkeypatch):
    """The shard is gone while two batches decode: they are shown first."""
    data = only(write_dataset(tmp_path / "d", shards_of([16], labelled)), shuffle_window=4, prefetch=1)
    with Loader(data, {"labelled": RoleNeeds()}, views=("clean",), seed=0) as loader:
        whole = [next(loader).keys for _ in range(3)]
    read, times = RoleStream.read, []

    def fail_late(stream, cursor):
        times.append(cursor)
        if len(times) == 4:
            raise DataError("gone")
        return read(stream, cursor)

    monkeypatch.setattr(RoleStream, "read", fail_late)
    with Loader(data, {"labelled": RoleNeeds()}, views=("clean",), seed=0) as loader:
        assert [next(loader).keys for _ in range(3)] == whole
        for _ in range(2):
            with pytest.raises(DataError, match="gone"):
                next(loader)


def test_the_loaders_thread_alone_has_one_torch_thread(student_data, monkeypatch):
    counts = []
    record = Quarantine.record
    monkeypatch.setattr(Quarantine, "record", lambda *args: (counts.append(torch.get_num_threads()), record(*args))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Loader(student_data, STUDENT, views=("student",), seed=0) as loader:
            next(loader)
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (set(counts), torch.get_num_threads(), later) == ({1}, 3, [3])
    finally:
        torch.set_num_threads(before)


def test_a_loader_left_open_is_closed_at_the_end_of_the_program(tmp_path):
    """Before the interpreter takes its threads down, one of which would be inside DALI."""
    folder = write_dataset(tmp_path / "d", shards_of([16], labelled))
    program = f"""
import atexit, threading
from dataio.loader import Loader  # and DALI, which ends its pipelines behind this:
from dataio.spec import DataSpec, RoleNeeds, RoleSpec
atexit.register(lambda: print([t.name for t in threading.enumerate() if t.name == "fathom-loader"]))
data = DataSpec(roles={{"r": RoleSpec(datasets=({folder!r},), batch=4)}}, input_size=56)
loader = Loader(data, {{"r": RoleNeeds()}}, views=("clean",), seed=0)
next(loader)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-2000:]


def test_close_lets_go_of_what_was_prepared(tmp_path):
    data = only(write_dataset(tmp_path / "d", shards_of([8], labelled)))
    loader = Loader(data, {"labelled": RoleNeeds()}, views=("clean",), seed=0)
    next(loader)
    while loader._ready.empty():
        time.sleep(0.01)
    loader.close()
    assert loader._ready.empty()


def test_loaders_that_start_together_leave_the_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(200):
            both = [threading.Thread(target=_one_torch_thread) for _ in range(2)]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()
        counts = []
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert counts == [2]
    finally:
        torch.set_num_threads(before)


def test_close_is_quick_idempotent_and_final(student_data):
    loader = Loader(student_data, STUDENT, views=("student",), seed=0)
    loader.close()
    loader = Loader(student_data, STUDENT, views=("student",), seed=0)
    next(loader)
    began = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - began < 5
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_description_tells_datasets_apart(student_data, tmp_path):
    with Loader(student_data, STUDENT, views=("clean",), seed=5) as loader:
        description = loader.describe()
        assert loader.samples("unlabelled") == 29
    assert description["plan_version"] == PLAN_VERSION
    assert description["seed"] == 5
    assert description["roles"]["unlabelled"]["samples"] == 29
    assert len(description["roles"]["unlabelled"]["labels"]) == 1
    json.dumps(description)
    other = only(write_dataset(tmp_path / "d", shards_of([3], labelled)))
    with Loader(other, {"labelled": RoleNeeds()}, views=("clean",), seed=5) as loader:
        assert loader.describe()["roles"]["labelled"]["datasets"] != description["roles"]["labelled"]["datasets"]


def test_perturbed_rows_change_with_the_epoch(tmp_path):
    data = only(write_dataset(tmp_path / "d", shards_of([4], labelled)), perturbation=Perturbation(jitter_p=1.0))
    first, second = batches(data, {"labelled": RoleNeeds()}, 2)
    a, b = rows_by_key(first), rows_by_key(second)
    assert a.keys() == b.keys()
    assert not any(torch.equal(a[key][1], b[key][1]) for key in a)


def _refused(data, needs=None, **options):
    Loader(data, needs or {"labelled": RoleNeeds()}, **{"views": ("clean",), "seed": 0, **options}).close()


def test_refusals_name_the_field(tmp_path):
    folder = write_dataset(tmp_path / "d", shards_of([4], labelled))
    bare = write_dataset(tmp_path / "u", shards_of([4], unlabelled), with_depth=False)
    good = only(folder)
    cases = [
        (DataSpec(**{**vars(good), "input_size": 500}), {}, "data.input_size is 500.*for example 504"),
        (good, {"rank": 1, "world_size": 2}, "data.roles.labelled.lanes to at least 2"),
        (only(folder, lanes=3), {}, "lanes may be 1, 2, 4"),
        (only(folder, lanes=4, perturbation=STRONG), {}, "lanes may be 1, 2;|lanes may be 1, 2$"),
        (only(folder, prefetch=0), {}, "data.prefetch is 0"),
        (only(folder, max_bad_fraction=2.0), {}, "data.max_bad_fraction is 2.0"),
        (only(bare), {}, "unlabelled and the task needs a target"),
        (only(folder), {"needs": {"labelled": RoleNeeds(sidecar=True)}}, "0 labels for 1 datasets"),
        (good, {"needs": STUDENT}, "data.roles has no 'unlabelled'"),
        (good, {"cursor": {"other": 4}}, "another task's"),
        (only(folder, lanes=2), {"cursor": {"labelled": 3}}, "no state of a plan"),
        (only(tmp_path / "nowhere"), {}, "nowhere"),
    ]
    for data, options, words in cases:
        with pytest.raises(DataError, match=words):
            _refused(data, **options)
    with pytest.raises(DataError, match="the task needs no such role"):
        _refused(DataSpec(roles={**good.roles, "extra": good.roles["labelled"]}, input_size=S))
    with pytest.raises(ValueError, match="views"):
        _refused(good, views=("left",))
