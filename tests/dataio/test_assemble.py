"""Rows that are bad, rows without targets, and what is counted."""

import io

import numpy as np
import pytest

from dataio.loader import Loader
from dataio.spec import DataError, DataSpec, Perturbation, RoleNeeds, RoleSpec

from .fakes import labelled, metadata, png, shards_of, unlabelled, write_dataset


def only(folder, *, batch=4, **spec):
    return DataSpec(roles={"r": RoleSpec(datasets=(folder,), batch=batch, lanes=1)}, input_size=56, **spec)


def two_roles(tmp_path, labelled_shard, **spec):
    plain = write_dataset(tmp_path / "p", shards_of([12], unlabelled, "p"), with_depth=False)
    roles = {
        "labelled": RoleSpec(datasets=(write_dataset(tmp_path / "l", [labelled_shard]),), batch=4, lanes=1),
        "plain": RoleSpec(datasets=(plain,), batch=4, lanes=1),
    }
    return DataSpec(roles=roles, input_size=56, **spec), {"labelled": RoleNeeds(), "plain": RoleNeeds(target="none")}


@pytest.mark.parametrize(
    ("code", "most", "reason"),
    [
        ({"scale": 1.0, "zero": 9}, 9, "no_valid_pixels"),  # depths of 0
        ({"scale": 0.001, "shift": 1.0}, 0, "no_valid_pixels"),  # holes, whatever the shift
        ({"scale": 1e-43}, 5, "bad_metadata"),  # depths whose inverse is infinite in float32
    ],
)
def test_what_has_no_depth_at_all_is_counted(tmp_path, code, most, reason):
    depth_HW = np.full((48, 56), most, np.uint16)
    samples = {"k": {**labelled(0), "depth.png": png(depth_HW), "json": metadata(**code)}}
    data = only(write_dataset(tmp_path / "d", [samples]), batch=1)
    with (
        Loader(data, {"r": RoleNeeds()}, views=("clean",), seed=0) as loader,
        pytest.raises(DataError, match=f"1 of 1 samples are bad: 1 {reason}"),
    ):
        next(loader)


def test_a_role_without_targets_beside_one_with(tmp_path):
    data, needs = two_roles(tmp_path, {f"k{i}": labelled(i) for i in range(8)}, max_bad_fraction=0.0)
    with Loader(data, needs, views=("clean",), seed=0) as loader:
        for batch in (next(loader), next(loader)):
            rows = batch.rows("plain")
            assert batch.weight_B.eq(1).all()
            assert batch.region_BHW[rows].eq(1).all()
            assert batch.views["clean"][rows].flatten(1).any(1).all()
        assert not loader.quarantine.counts


def test_the_end_of_one_roles_pass_counts(tmp_path):
    shard = {f"k{i}": labelled(i) if i % 2 else unlabelled(i) for i in range(8)}
    data, needs = two_roles(tmp_path, shard, max_bad_fraction=0.1)
    with Loader(data, needs, views=("clean",), seed=0) as loader:
        next(loader)
        with pytest.raises(DataError, match="4 of 16 samples are bad"):
            next(loader)


def test_a_bad_row_without_targets_has_no_region(tmp_path):
    samples = {f"k{i}": unlabelled(i) for i in range(4)}
    samples |= {"k1": {"jpg": b"x"}, "k2": {"jpg": unlabelled(2)["jpg"][:-2]}}
    data = only(write_dataset(tmp_path / "d", [samples], with_depth=False), max_bad_fraction=1.0)
    with Loader(data, {"r": RoleNeeds(target="none")}, views=("clean",), seed=0) as loader:
        batch = next(loader)
    for i, key in enumerate(batch.keys):
        assert batch.weight_B[i] == (key in ("k0", "k3"))
        assert batch.region_BHW[i].eq(batch.weight_B[i]).all()


def test_metres_are_the_codes_own(tmp_path):
    """Not stretched, holes and sky left out; a float map's inverse disparity gives its depths back."""
    depth_HW = np.linspace(0.5, 79.0, 48 * 56, dtype=np.float32).reshape(48, 56)
    code_HW = np.round(depth_HW * 1000 / 2).astype(np.uint16)
    code_HW[:24, :28] = 0
    sky_HW = np.zeros((48, 56), np.uint8)
    sky_HW[24:] = 255
    half = {"jpg": labelled(0)["jpg"], "json": metadata(scale=0.002)}
    out = io.BytesIO()
    np.save(out, depth_HW)
    samples = {
        "coded": {**half, "depth.png": png(code_HW), "sky.png": png(sky_HW)},
        "float": {"jpg": labelled(1)["jpg"], "depth.npy": out.getvalue()},
        "sky": {**half, "depth.png": png(np.zeros_like(code_HW)), "sky.png": png(sky_HW)},
    }
    spec = RoleSpec(
        datasets=(write_dataset(tmp_path / "d", [samples]),), batch=3, lanes=1, perturbation=Perturbation(flip_p=0.0)
    )
    data = DataSpec(roles={"r": spec}, input_size=56, max_bad_fraction=1.0)
    with Loader(data, {"r": RoleNeeds(target="depth_m")}, views=("clean",), seed=0) as loader:
        batch, counts = next(loader), loader.quarantine.counts
    assert set(batch.targets) == {"depth_m"} and batch.targets["depth_m"].quantity == "depth_m"
    value_BHW, valid_BHW = batch.targets["depth_m"].value_BHW, batch.region_BHW > 0
    weight = dict(zip(batch.keys, batch.weight_B.tolist(), strict=True))
    assert weight == {"coded": 1, "float": 1, "sky": 0} and set(counts) == {"no_valid_pixels"}
    for key in ("coded", "float"):
        i = batch.keys.index(key)
        found = value_BHW[i][valid_BHW[i]]
        near, far = (depth_HW[0, 28], depth_HW[23, 55]) if key == "coded" else (0.5, 79.0)
        assert found.min() >= near - 0.002 and found.max() <= far + 0.1
        assert found.max() > 30 and found.unique().numel() > 300
        assert valid_BHW[i].all() == (key == "float")


def test_metres_need_a_dataset_of_depths(tmp_path):
    folder = write_dataset(tmp_path / "d", [{"k": labelled(0)}], quantity="disparity")
    with pytest.raises(DataError, match=r"role 'r': .*/d holds disparity and the task needs metres: name a dataset"):
        next(Loader(only(folder, batch=1), {"r": RoleNeeds(target="depth_m")}, views=("clean",), seed=0))
    with pytest.raises(ValueError, match="a label sidecar holds disparity"):
        RoleNeeds(target="depth_m", sidecar=True)


def test_roles_may_need_different_quantities(tmp_path):
    roles = {
        name: RoleSpec(
            datasets=(write_dataset(tmp_path / name, shards_of([4], labelled, name)),),
            batch=4,
            lanes=2,
            perturbation=Perturbation(flip_p=0.0, cutmix_p=1.0 if name == "metres" else 0.0),
        )
        for name in ("disparity", "metres")
    }
    needs = {"disparity": RoleNeeds(), "metres": RoleNeeds(target="depth_m")}
    with Loader(DataSpec(roles=roles, input_size=56), needs, views=("clean",), seed=0) as loader:
        batch = next(loader)
    metres = batch.targets["depth_m"].value_BHW[batch.rows("metres")]
    stretched = batch.targets["disparity"].value_BHW[batch.rows("disparity")]
    assert stretched.max() == 1 and 60 < metres.max() <= 65 and (batch.region_BHW[batch.rows("metres")] == 2).any()
