"""Rows that are bad, rows without targets, and what is counted."""

import numpy as np
import pytest

from dataio.loader import Loader
from dataio.spec import DataError, DataSpec, RoleNeeds, RoleSpec

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
