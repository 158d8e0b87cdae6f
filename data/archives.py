"""Archives of other people: unpacked whole or not at all, and never outside their folder."""
import os
import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from data.safe import DAMAGED, outside, reason, there


def members(archive):
    """(name, is a folder, open function) of every member of an open zip or tar; links and devices are refused."""
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            if (info.external_attr >> 16) & 0o170000 == 0o120000:
                raise ValueError(f"member {info.filename!r} is a link")
            yield info.filename, info.filename.endswith("/"), lambda info=info: archive.open(info)
    else:
        for info in archive:
            if not (info.isfile() or info.isdir()):
                raise ValueError(f"member {info.name!r} is a link or a device")
            yield info.name, info.isdir(), lambda info=info: archive.extractfile(info)


def unpack(archive, folder, limit=64 * 2**30):
    """Extract a .zip, .tar, .tar.gz or .tgz into `folder`: all of it or nothing.   -> number of files

    Everything is written into a folder aside and its top-level entries are moved at the end. Refused: `../`, absolute names,
    links, devices, an entry that exists, more than `limit` bytes (really written, whatever the headers claim).
    """
    archive, folder = there(archive), Path(folder)
    aside, left, count = folder / f".{archive.name}.part", limit, 0
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive) as opened:
            for name, is_folder, open_member in members(opened):
                if outside(name):
                    raise ValueError(f"member {name!r:.60} would be written outside the folder")
                target = aside / PurePosixPath(name.replace("\\", "/"))
                (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
                if is_folder:
                    continue
                with open_member() as source, open(target, "xb") as out:
                    while block := source.read(2**20):
                        left -= len(block)
                        if left < 0:
                            raise ValueError(f"it holds more than {limit:,} bytes")
                        out.write(block)
                count += 1
        entries = sorted(aside.iterdir())
        if taken := [e.name for e in entries if (folder / e.name).exists()]:
            raise FileExistsError(f"{folder / taken[0]} exists already; move it away first")
        for entry in entries:
            os.replace(entry, folder / entry.name)
    except DAMAGED as error:
        raise ValueError(f"{archive} was not unpacked: {reason(error)}; nothing was left behind") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return count
