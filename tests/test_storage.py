"""Atomic writes and exclusive locks; errors of failed writes give advice."""

import errno
import io
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from patchcl_qupath.datatypes import Box, Nuclei, Tile, UncertaintyGrid, centroids_of
from patchcl_qupath.errors import ConfigError, ImageError, StorageError
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.exports.nuclei import read_batches
from patchcl_qupath.storage import files
from patchcl_qupath.storage.files import (
    atomic_write,
    copy_once,
    exclusive_lock,
    remove_file,
    remove_folder,
    remove_partial_files,
    write_bytes,
    writing,
)
from patchcl_qupath.storage.layout import Layout, file_name
from patchcl_qupath.storage.parquet import (
    encoding,
    from_table,
    read_geoarrow,
    read_measured,
    read_near,
    read_nuclei,
    read_uncertainty_grid,
    to_table,
    write_uncertainty_grid,
)


def some_nuclei(n):
    polygons = shapely.buffer(shapely.points(np.arange(n), np.arange(n)), 3)
    ids = np.array([f"{i:036d}" for i in range(n)], dtype="U36")
    return Nuclei(polygons, {"Area µm^2": np.arange(n, dtype=np.float32)}, ids)


UNCERTAINTY = UncertaintyGrid((256.5, 255.25), *np.arange(15).reshape(5, 3))


TILE = Tile(row=0, col=1, read=Box(0, 0, 9, 9), write=Box(0, 0, 9, 9))


def encoded(n):
    return TileStore.encode(some_nuclei(n), UNCERTAINTY)


def stored(folder, nuclei):
    """A store in which one tile is finished."""
    store = TileStore.open(folder, {})
    store.write(TILE, TileStore.encode(nuclei, UNCERTAINTY))
    return store


@pytest.mark.parametrize("left", [0, 3, -1], ids=["nothing", "three bytes", "all but the last"])
def test_a_tile_that_a_power_failure_cut_is_segmented_again(tmp_path, left):
    store = TileStore.open(tmp_path, {})
    store.write(TILE, encoded(3))
    assert store.missing([TILE]) == []
    store.path(TILE).write_bytes(encoded(3)[:left])
    assert store.missing([TILE]) == [TILE]


def all_of(store):
    """What the store reads of its tile, by each of its ways."""
    (nuclei,), (contours,) = store.nuclei([TILE]), store.contours([TILE])
    (measured,) = store.measurements([TILE], ["Area µm^2"])
    (grid,) = store.uncertainty_grids([TILE])
    store.check(TILE)
    content = from_table(TileStore.decode(store.content(TILE))[0])
    return [
        *(store.count([TILE]), nuclei.uuids.tolist(), measured["Area µm^2"].tolist()),
        *(shapely.to_wkb(each).tolist() for each in (contours, nuclei.polygons, content.polygons)),
        *(store.points(TILE)[0].tolist(), grid.entropy.tolist()),
    ]


def test_a_damaged_tile_is_never_read_and_is_segmented_again(tmp_path):
    """Wherever a block of the disk was lost: in contours, measurements, or what describes them."""
    store = stored(tmp_path, some_nuclei(300))
    content, expected = store.path(TILE).read_bytes(), all_of(store)
    for place in range(0, len(content) - 100, 509):
        lost = content[place : place + 512]
        damaged = content[:place] + bytes(len(lost)) + content[place + 512 :]
        store.path(TILE).write_bytes(damaged[:-4] + content[-4:])
        try:
            found = all_of(store)
        except StorageError:
            assert store.missing([TILE]) == [TILE]
        else:
            assert found == expected, place


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, os.strerror(errno.EIO)), pa.ArrowMemoryError("malloc failed")]
)
def test_a_tile_is_kept_where_the_disk_or_memory_fails(tmp_path, monkeypatch, error):
    store = stored(tmp_path, some_nuclei(3))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(StorageError, match="run again"):
        [*store.nuclei([TILE])]
    assert store.missing([TILE]) == []


def test_tiles_of_a_disk_that_fails_are_neither_finished_nor_missing(tmp_path, monkeypatch):
    store = stored(tmp_path, some_nuclei(3))

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patched:
        patched.setattr("patchcl_qupath.execution.tile_store.is_whole_parquet", fail)
        with pytest.raises(
            StorageError, match=r"finished tiles in .* cannot be read .*: run again"
        ):
            store.missing([TILE])
    assert store.missing([TILE]) == []


def test_a_tile_without_a_column_is_damaged(tmp_path):
    store = stored(tmp_path, some_nuclei(3))
    content = store.path(TILE).read_bytes()
    store.path(TILE).write_bytes(content.replace(b"geometry", b"geometrx"))
    with pytest.raises(StorageError, match="run again"):
        store.points(TILE)
    assert store.missing([TILE]) == [TILE]


@pytest.mark.parametrize("n", [0, 7])
def test_nuclei_survive_the_tile_store(tmp_path, n):
    nuclei = some_nuclei(n)
    store = stored(tmp_path / "store", nuclei)
    (back,) = store.nuclei([TILE])
    assert store.missing([TILE]) == []
    assert store.count([TILE]) == n
    assert shapely.equals_exact(back.polygons, nuclei.polygons).all()
    assert list(back.measurements) == ["Area µm^2"]
    np.testing.assert_array_equal(back.measurements["Area µm^2"], np.arange(n))
    np.testing.assert_array_equal(back.uuids, nuclei.uuids)
    (contours,) = store.contours([TILE])
    assert shapely.equals_exact(contours, nuclei.polygons).all()
    (measured,) = store.measurements([TILE], ["Area µm^2"])
    np.testing.assert_array_equal(measured["Area µm^2"], np.arange(n))
    assert len(read_nuclei(store.path(TILE))) == n  # GeoParquet, as any other


def damaged_files(path):
    """A file of which 4 KB are zeros, as after a power failure, at one place after the other."""
    content = path.read_bytes()
    for place in range(0, len(content), 4096):
        lost = content[place : place + 4096]
        path.write_bytes(content[:place] + bytes(len(lost)) + content[place + len(lost) :])
        yield place


def measured_table(path):
    centroids, measured = read_measured(path, ["Area µm^2"])
    return pa.table({"x": centroids[:, 0], "y": centroids[:, 1], **measured})


def test_nuclei_are_read_in_part(tmp_path, monkeypatch):
    """As many at a time as are asked for, and in whatever row groups they are."""
    path, nuclei = tmp_path / "nuclei.parquet", some_nuclei(50)
    table = to_table(nuclei)
    pq.write_table(table, path, row_group_size=9, **encoding(table.column_names))
    monkeypatch.setattr("patchcl_qupath.storage.parquet._BATCH", 4)
    centroids, measured = read_measured(path, ["Area µm^2", "Solidity"])
    np.testing.assert_array_equal(centroids, centroids_of(nuclei.polygons))
    assert list(measured) == ["Area µm^2"]
    np.testing.assert_array_equal(measured["Area µm^2"], np.arange(50))
    areas = shapely.box(*np.transpose(shapely.bounds(nuclei.polygons[[30, 7]])))
    meets = shapely.intersects(shapely.envelope(nuclei.polygons)[:, None], areas).any(axis=1)
    assert 2 <= meets.sum() < 50
    assert shapely.equals_exact(read_near(path, areas), nuclei.polygons[meets]).all()


def test_damaged_nuclei_are_never_read(tmp_path):
    """By any reader: all at once, for GeoArrow, and a batch at a time for exports."""
    path, nuclei = tmp_path / "nuclei.parquet", some_nuclei(700)
    table = to_table(nuclei)
    pq.write_table(table, path, **encoding(table.column_names))
    image = SimpleNamespace(id="1", name="a.svs", nuclei=path, check_current=lambda: None)
    some_areas = shapely.box(*np.transpose(shapely.bounds(nuclei.polygons[200:210])))
    readers = {
        "nuclei": lambda: to_table(read_nuclei(path)),
        "GeoArrow": lambda: read_geoarrow(path),
        "batches": lambda: pa.concat_tables(read_batches(image)),
        "measured": lambda: measured_table(path),
        "near": lambda: pa.table({"near": shapely.to_wkb(read_near(path, some_areas)).tolist()}),
    }
    expected = {name: read().to_pydict() for name, read in readers.items()}
    damaged = 0
    for place in damaged_files(path):
        for name, read in readers.items():
            try:
                found = read().to_pydict()
            except (OSError, pa.ArrowException, ImageError):
                damaged += 1
            else:
                assert found == expected[name], (name, place)
    assert damaged > 40


def test_damaged_uncertainty_grids_are_never_read(tmp_path):
    path = tmp_path / "image.parquet"
    values = np.random.default_rng(0).integers(0, 2**62, (5, 3000))
    grid = UncertaintyGrid((256.5, 255.25), *values)
    write_uncertainty_grid(path, grid)
    damaged = 0
    for place in damaged_files(path):
        try:
            found = read_uncertainty_grid(path)
        except (OSError, pa.ArrowException):
            damaged += 1
        else:
            assert same(found, grid), place
    assert damaged > 20


def same(one, other):
    return one.bin_size == other.bin_size and all(
        np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one)
    )


def test_measurements_are_stored_plain_and_contours_compressed():
    group = pq.ParquetFile(io.BytesIO(encoded(50))).metadata.row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    assert {column.path_in_schema: column.compression for column in columns} == {
        "id": "LZ4",
        "geometry": "LZ4",
        "Area µm^2": "UNCOMPRESSED",
    }
    assert not any(column.has_dictionary_page for column in columns)


def test_uncertainty_grids_survive_parquet(tmp_path):
    (grid,) = stored(tmp_path / "store", some_nuclei(2)).uncertainty_grids([TILE])
    assert same(grid, UNCERTAINTY)
    write_uncertainty_grid(tmp_path / "image.parquet", UNCERTAINTY)
    assert same(read_uncertainty_grid(tmp_path / "image.parquet"), UNCERTAINTY)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_read_only_file_is_copied(tmp_path):
    """Such a data.qpdata is replaced by QuPath: so may be we, once there is a copy of it."""
    path, copy = tmp_path / "data.qpdata", tmp_path / "backups" / "data.qpdata"
    path.write_bytes(b"saved")
    os.utime(path, ns=(10**18, 10**18))
    path.chmod(0o444)
    copy_once(path, copy)
    assert (copy.read_bytes(), copy.stat().st_mtime_ns) == (b"saved", 10**18)
    assert copy.stat().st_mode & stat.S_IWUSR  # without it, no person but root can flush it
    path.chmod(0o644)
    path.write_bytes(b"later")
    copy_once(path, copy)
    assert copy.read_bytes() == b"saved"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "results" / "1"
    for name in ("first", "second"):
        with atomic_write(path) as new:
            new.mkdir()
            (new / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["second"]
    assert [file.name for file in path.parent.iterdir()] == ["1"]


@pytest.mark.skipif(sys.platform != "linux", reason="it sees what is flushed by /proc")
def test_what_is_durable_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda file: flushed.append(str(Path(f"/proc/self/fd/{file}").readlink()))
    )

    def of_results():
        found = {re.sub(r"\.(\w+)\.[0-9a-f]{8}\.partial", r"\1", path) for path in flushed}
        flushed.clear()
        assert not any("partial" in path for path in found)
        return sorted(str(Path(path).relative_to(tmp_path)) for path in found)

    for durable, expected in ((True, ["1", "1/a", "1/b", "1/b/c"]), (False, [])):
        with atomic_write(tmp_path / "1", durable) as new:
            (new / "b").mkdir(parents=True)
            (new / "a").touch()
            (new / "b" / "c").touch()
        assert of_results() == expected
        write_bytes(tmp_path / "file", b"", durable)
        assert of_results() == ["file"] * durable


def test_partial_files_of_killed_writers_are_removed(tmp_path):
    killed = atomic_write(tmp_path / "file")  # it never ends
    killed.__enter__().write_text("half")
    (tmp_path / "complete").write_text("whole")
    assert len([*tmp_path.iterdir()]) == 2
    remove_partial_files(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["complete"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "disk is full: make room"),
        (errno.EROFS, "read-only: copy the project"),
        (errno.EACCES, "no permission"),
        (errno.EIO, r"\[Errno \d+\] Input/output error: mend that, or copy the project"),
    ],
)
def test_errors_of_the_operating_system_are_explained(tmp_path, code, advice):
    with (
        pytest.raises(StorageError, match=rf"cannot write .*wanted.*{advice}"),
        writing(tmp_path / "wanted"),
    ):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("name", ["file/a.json", "file/folder/a.json"])
def test_a_file_in_the_place_of_a_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(
        StorageError, match=r"a\.json: a file is where a folder of it should be: mo"
    ):
        write_bytes(tmp_path / name, b"")


def test_windows_says_no_to_what_is_open_in_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WINDOWS", True)
    denied = errors_of_replace(monkeypatch, 3)
    write_bytes(tmp_path / "a.parquet", b"new")
    assert len(denied) == 3  # a virus scanner has closed it by then
    monkeypatch.setattr(files, "_BUSY_S", 0.1)
    errors_of_replace(monkeypatch, 10**6)
    with pytest.raises(StorageError, match=r"a\.parquet: another program has it open: close it"):
        write_bytes(tmp_path / "a.parquet", b"newer")
    assert (tmp_path / "a.parquet").read_bytes() == b"new"
    long = tmp_path / ("x" * 200) / ("y" * 100)
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    with pytest.raises(StorageError, match="longer than 259 characters: move"), writing(long):
        raise missing
    with pytest.raises(StorageError, match="No such file"), writing(tmp_path):
        raise missing


def test_windows_removes_what_is_open_in_another_program_once_that_closes_it(tmp_path, monkeypatch):
    def denied(_, *arguments, **options):
        left.append(0)
        if len(left) < 4:
            raise PermissionError(errno.EACCES, "it is open")
        return

    monkeypatch.setattr(files, "WINDOWS", True)
    for function, remove in [("rmtree", remove_folder), ("unlink", remove_file)]:
        left: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(shutil if function == "rmtree" else Path, function, denied)
            remove(tmp_path)
        assert len(left) == 4


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_be_waited_for_is_written_to(tmp_path, monkeypatch, code):
    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    write_bytes(tmp_path / "a.parquet", b"new")
    assert (tmp_path / "a.parquet").read_bytes() == b"new"
    code = errno.EIO
    with pytest.raises(StorageError, match=r"a\.parquet"):
        write_bytes(tmp_path / "a.parquet", b"newer")
    assert (tmp_path / "a.parquet").read_bytes() == b"new"


@pytest.mark.parametrize("named", [0, 1], ids=["filename", "filename2"])
def test_windows_refuses_a_path_that_is_longer_than_the_one_to_write(tmp_path, monkeypatch, named):
    monkeypatch.setattr(files, "WINDOWS", True)
    path = tmp_path / ("x" * (250 - len(str(tmp_path))))
    with pytest.raises(StorageError, match="longer than 259 characters: move"):
        write_text_that_fails(path)  # its temporary path is longer; Arrow's errors name none
    names = ["short", None, "short"]
    names[2 * named] = f"{path}.{'y' * 20}"
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), names[0], None, names[2])
    with pytest.raises(StorageError, match="longer than 259 characters: move"), writing(path):
        raise missing


def write_text_that_fails(path):
    with atomic_write(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def errors_of_replace(monkeypatch, count, only=lambda _: True):
    """Have the next renames fail, ``count`` of those that ``only`` chooses; -> those that did."""
    denied = []
    replace = Path.replace

    def deny(path, other):
        if only(path) and len(denied) < count:
            denied.append(path)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return replace(path, other)

    monkeypatch.setattr(Path, "replace", deny)
    return denied


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "results" / "1"
    path.mkdir(parents=True)
    (path / "old").touch()
    denied = errors_of_replace(monkeypatch, 1, lambda path: path.suffix == ".partial")

    def write():
        with atomic_write(path) as new:
            new.mkdir()
            (new / "new").touch()

    with pytest.raises(StorageError, match="no permission"):
        write()
    assert len(denied) == 1
    assert [file.name for file in path.iterdir()] == ["old"]
    assert [file.name for file in path.parent.iterdir()] == ["1"]


def replace_folder(path, monkeypatch, between):
    """Replace a folder, and call something between its two renames."""
    rename = files.replace_file

    def replace(new, other):
        if other == path and new.name.endswith(".partial"):
            between()
        rename(new, other)

    with monkeypatch.context() as patched, atomic_write(path) as new:
        patched.setattr(files, "replace_file", replace)
        new.mkdir()
        (new / "new").touch()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("end", ["killed", "stopped", "Ctrl-C"])
def test_a_folder_is_there_however_its_replacement_ends(tmp_path, monkeypatch, end):
    """What nobody can make again, as nuclei that a person was given, must not go between two names:
    with its process, with a call that is stopped, or with what is half-written at the end of it."""
    path = tmp_path / "changes" / "1"
    path.mkdir(parents=True)
    (path / "old").touch()

    def stop():
        raise KeyboardInterrupt

    if end == "killed":
        process = os.fork()
        if not process:
            replace_folder(path, monkeypatch, lambda: os._exit(9))
        assert os.waitpid(process, 0)[1] == 9 << 8
        assert not path.exists()
    else:
        between = stop if end == "stopped" else files.remove_unfinished
        with exclusive_lock(tmp_path), pytest.raises((KeyboardInterrupt, StorageError)):
            replace_folder(path, monkeypatch, between)
    with exclusive_lock(tmp_path):
        assert [file.name for file in path.iterdir()] == ["old"]
        assert [file.name for file in path.parent.iterdir()] == ["1"]


def test_tiles_are_kept_where_their_plan_cannot_be_read_for_the_moment(tmp_path, monkeypatch):
    store = stored(tmp_path / "store", some_nuclei(1))

    def deny(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("read_text", "read_bytes"):
        monkeypatch.setattr(Path, name, deny)
    with pytest.raises(StorageError, match=r"plan\.json cannot be read"):
        TileStore.open(store.folder, {})
    monkeypatch.undo()
    assert TileStore.open(store.folder, {}).missing([TILE]) == []


def test_tiles_of_another_plan_that_cannot_be_removed_are_no_finished_ones(tmp_path, monkeypatch):
    store = stored(tmp_path / "store", some_nuclei(1))
    unlink = os.unlink

    def deny(path, *more, **options):
        if str(path).endswith(".parquet"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, *more, **options)

    monkeypatch.setattr(os, "unlink", deny)
    with pytest.raises(StorageError, match="no permission"):
        TileStore.open(store.folder, {"another": "plan"})
    monkeypatch.undo()
    assert TileStore.open(store.folder, {"another": "plan"}).missing([TILE]) == [TILE]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_disk_without_locks_is_used_without(tmp_path, monkeypatch, code):
    def acquire(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.FileLock, "acquire", acquire)
    if code == errno.EIO:
        with pytest.raises(StorageError), exclusive_lock(tmp_path):
            pass
        return
    with exclusive_lock(tmp_path):
        write_bytes(tmp_path / "file", b"")


def test_files_of_a_killed_script_are_removed_once_old(tmp_path):
    """Of QuPath's, which takes no lock: a new one may be being written."""
    labels = tmp_path / "labels"
    labels.mkdir()
    name = "1.geojson.0a1b2c3d-0000-4000-8000-0123456789ab.partial"
    old, new = labels / name, labels / name.replace("1.", "2.", 1)
    kept = labels / "a-person's.partial"
    for path in (old, new, kept):
        path.touch()
    for path in (old, kept):
        os.utime(path, (1e9, 1e9))
    with exclusive_lock(tmp_path):
        assert not old.exists()
        assert new.exists()
        assert kept.exists()


def test_an_export_that_is_under_way_is_left_alone(tmp_path):
    """It reads results, and takes no lock: a run may begin meanwhile."""
    with atomic_write(tmp_path / "exports" / "nuclei.csv") as writing_to:
        writing_to.write_text("half")
        old = writing_to.with_name(".cells.csv.00000000.partial")
        other = tmp_path / "results" / ".nuclei.parquet.00000000.partial"
        other.parent.mkdir()
        for path in (old, other):
            path.touch()
        os.utime(old, (1e9, 1e9))
        with exclusive_lock(tmp_path):
            assert not old.exists()
            assert not other.exists()
            files.remove_unfinished()
    assert (tmp_path / "exports" / "nuclei.csv").read_text() == "half"


def test_a_partial_file_that_cannot_be_removed_stops_nothing(tmp_path, monkeypatch):
    """Another person's, or on Windows one that is open: neither a run nor the end of one."""
    partial = tmp_path / ".1.parquet.0.partial"
    partial.touch()

    def deny(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "unlink", deny)
    monkeypatch.setattr(Path, "unlink", deny)
    with exclusive_lock(tmp_path):
        files.remove_unfinished()
    monkeypatch.undo()
    with exclusive_lock(tmp_path):
        assert not partial.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="flock is of Unix")
@pytest.mark.parametrize("left", ["", "1\nanother-node\n"], ids=["elsewhere", "by another node"])
def test_a_lock_file_that_was_left_locks_nothing(tmp_path, monkeypatch, recwarn, left):
    """Where there is no flock; the file may have come with the project."""

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    (tmp_path / ".lock").write_text(left)
    with exclusive_lock(tmp_path):
        write_bytes(tmp_path / "file", b"")
    assert not recwarn.list


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", r"a\b", "C:x", "a?", "con", "Nul.1", "end.", "end "]
)
def test_a_model_has_a_name_that_every_system_can_write(tmp_path, name):
    with pytest.raises(ConfigError, match="a model cannot be named"):
        Layout(tmp_path).model(name)


@pytest.mark.parametrize("name", ["patchcl", "v1.2", "prüfung 3", "console", "a-b_c"])
def test_names_of_models(tmp_path, name):
    assert Layout(tmp_path).model(name) == tmp_path / "models" / f"{name}.pt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slide 1 é", "slide 1 é"),
        (r'<a:b"c/d\e|f?g*h>', "_a_b_c_d_e_f_g_h_"),
        ("a\nb\x00", "a b"),
        (".hidden. ", "hidden"),
        (" . ", ""),
        ("", ""),
        ("aux", "_aux"),
        ("Com1.of a day", "_Com1.of a day"),
        ("nul .x", "_nul .x"),
        ("auxiliary", "auxiliary"),
        ("切" * 200, "切" * 50),
        ("a" + "切" * 200, "a" + "切" * 49),
        ("x" * 149 + " y", "x" * 149),
    ],
)
def test_any_text_is_the_name_of_a_file_on_every_system(tmp_path, text, expected):
    assert file_name(text) == expected
    if expected:
        write_bytes(tmp_path / f"{expected}-{'7' * 20}.geojson.gz", b"")


def test_an_argument_that_is_not_utf8_has_a_digest():
    """Such as a class that was typed in a terminal of another encoding."""
    assert files.digest(["Tumor"]) == "3f43c742de6e"
    assert files.digest(["T\udcfcmor"]) not in {files.digest(["T?mor"]), files.digest(["T\xfcmor"])}


def test_names_are_compared_as_one_system_writes_them():
    assert files.readable("pru\u0308fung\n1") == "pr\u00fcfung 1"


def test_a_file_in_place_of_a_folder_is_explained(tmp_path):
    (tmp_path / "patchcl").write_text("a file")
    with pytest.raises(StorageError, match="patchcl"):
        write_bytes(tmp_path / "patchcl" / "a.parquet", encoded(1))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    if sys.platform != "linux":
        pytest.skip("tmpfs is of Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True
    )
    if made.returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_leaves_no_partial_file(small_disk):
    write_bytes(small_disk / "1.parquet", encoded(20))
    with pytest.raises(StorageError, match="disk is full"):
        write_bytes(small_disk / "2.parquet", encoded(20_000))
    assert [file.name for file in small_disk.iterdir()] == ["1.parquet"]
    assert len(read_nuclei(small_disk / "1.parquet")) == 20


def test_two_processes_cannot_lock_one_folder(tmp_path):
    hold = (
        "import sys; from pathlib import Path;"
        "from patchcl_qupath.storage.files import exclusive_lock;"
        "held = exclusive_lock(Path(sys.argv[1]) / 'new'); held.__enter__();"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline().strip() == b"held"
        with (
            pytest.raises(StorageError, match="another patchcl-qp is at work"),
            exclusive_lock(tmp_path / "new"),
        ):
            pass
        other.kill()
    with exclusive_lock(tmp_path / "new"), exclusive_lock(tmp_path / "other"):
        pass
    with exclusive_lock(tmp_path / "new"):
        pass
