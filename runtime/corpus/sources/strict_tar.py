"""Members of tars, read to the blocks that end them; ``tarfile`` takes any damage for the end."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any

__all__ = ["members_of_tar"]


class _StrictTar(tarfile.TarFile):
    """Tar whose end is proven: empty blocks, then nothing, or another tar."""

    n_members = 0
    n_ended = 0
    """Tars that ended before the last member that was read."""

    firstmember: tarfile.TarInfo | None

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member; ``None`` after the empty blocks that end the last tar of a file.

        Raises:
            tarfile.ReadError: the file is cut off, or a header is damaged.
        """
        stream: Any = self.fileobj
        if self.offset != stream.tell():
            stream.seek(self.offset - 1)
            if not stream.read(1):
                raise tarfile.ReadError(f"the file is cut off in its member {self.n_members - 1}")
        n_empty = 0
        while True:
            at = stream.tell()
            try:
                member = self.tarinfo.fromtarfile(self)
            except tarfile.HeaderError as error:
                match type(error).__name__:
                    case "EOFHeaderError":  # a block of zeros
                        n_empty += 1
                        self.offset = at + tarfile.BLOCKSIZE
                        continue
                    case "EmptyHeaderError":  # the end of the file
                        if n_empty:
                            return None
                        raise tarfile.ReadError(
                            "the file ends without the empty blocks that close a tar"
                        ) from None
                raise tarfile.ReadError(
                    f"the header of member {self.n_members}, at byte {at:,}, is damaged: {error}"
                ) from error
            self.n_members += 1
            self.n_ended += n_empty > 0
            return member


def members_of_tar(stream: Any) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile, int]]:
    """Yield the members of an uncompressed tar, and of tars that follow it in the same file.

    Each comes with the open tar, and with the number of its tar in the file, from 0.

    Raises:
        tarfile.TarError: the file is cut off or damaged.
    """
    with _StrictTar.open(fileobj=stream, mode="r|", bufsize=1 << 18) as tar:
        member, tar.firstmember = tar.firstmember, None
        while member is not None:
            yield member, tar, tar.n_ended
            member = tar.next()
