"""The file system that a path is on, as the kernel's table of mounts says. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
# File systems that several hosts can share, or whose locks need not reach all writers: SQLite is not safe there with
# several writers (https://www.sqlite.org/faq.html#q5).
NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "orangefs", "pvfs2"),
    *("panfs", "wekafs", "afs", "ncpfs", "ocfs2", "gfs2", "9p", "virtiofs", "vboxsf", "fuse"),
}


def network_file_system(path: Path, *, mounts: Path | None = None) -> str:
    """Return the type of the network file system that ``path`` is on, such as ``nfs4``; empty if it is a local one.

    Args:
        path: an absolute path without symbolic links; it need not exist.
        mounts: the table of mounts, see proc_pid_mountinfo(5); None: of this process. Without one every path counts
            as local.
    """
    kind = file_system(path, mounts=mounts)
    return kind if kind in NETWORK or kind.startswith("fuse.") else ""


def file_system(path: Path, *, mounts: Path | None = None) -> str:
    """Return the type of the file system that ``path`` is on; empty if it is unknown."""
    try:
        lines = (mounts or MOUNTS).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    kind, longest = "", -1
    for line in lines:
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = Path(_unescaped(fields[4]))
        # of two mounts at one point the later one covers the other
        if path.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = after.split(" ")[0], len(point.parts)
    return kind


def _unescaped(text: str) -> str:
    r"""Return a field of the table with its blanks, which the kernel writes as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
