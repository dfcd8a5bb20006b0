"""Which cores are beside a GPU."""

from pathlib import Path

from torchtitan.distributed.numa import cores_beside


def test_the_cores_of_the_devices_node(tmp_path: Path) -> None:
    device, nodes = tmp_path / "bus/pci/devices/0009:01:00.0", tmp_path / "devices/system/node"
    for folder in (device, nodes / "node0", nodes / "node1"):
        folder.mkdir(parents=True)
    (nodes / "node0/cpulist").write_text("0-71\n")
    (nodes / "node1/cpulist").write_text("72-74,80\n")
    (device / "numa_node").write_text("1\n")
    assert cores_beside("0009:01:00.0", tmp_path) == {72, 73, 74, 80}


def test_nothing_where_it_is_not_known(tmp_path: Path) -> None:
    device = tmp_path / "bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    assert cores_beside("0000:3b:00.0", tmp_path) == set()
    (device / "numa_node").write_text("-1\n")
    assert cores_beside("0000:3b:00.0", tmp_path) == set()
