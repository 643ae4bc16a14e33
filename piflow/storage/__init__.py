"""Files on disks, in object stores, on the Hugging Face hub and in packages, named by one URI.

`foreign.py` checks names, texts and JSON from outside, `places.py` which places a foreign file may
name, `picture.py` opens pictures, `uri.py` takes URIs apart, `files.py` reads and writes what they
name, `s3.py`, `gcs.py`, `azure.py` and `hub.py` know their services, `answers.py` limits how
long a server may take, `conditional.py` writes objects only if nobody else did, `fingerprint.py`
hashes model folders and `whole.py` all bytes of weights. Callers say `storage.join(...)`,
`storage.read_bytes(...)` and so on.

Imports nothing else of piflow.
"""

from piflow.storage.files import (
    at_commit,
    commit_of,
    copy_file,
    delete_file,
    delete_folder,
    delete_left_over,
    exists,
    expand,
    explained,
    file_sizes,
    file_stamps,
    filesystem,
    for_ranges,
    list_files,
    local_folder,
    read_bytes,
    sha256,
    upload_folder,
    without_links,
    write_bytes,
)
from piflow.storage.foreign import redacted
from piflow.storage.uri import (
    absolute,
    base_name,
    join,
    member,
    object_place,
    on_objects,
    require_plain,
    require_valid,
    scheme,
    sibling,
    suffix,
)

__all__ = [
    "absolute",
    "at_commit",
    "base_name",
    "commit_of",
    "copy_file",
    "delete_file",
    "delete_folder",
    "delete_left_over",
    "exists",
    "expand",
    "explained",
    "file_sizes",
    "file_stamps",
    "filesystem",
    "for_ranges",
    "join",
    "list_files",
    "local_folder",
    "member",
    "object_place",
    "on_objects",
    "read_bytes",
    "redacted",
    "require_plain",
    "require_valid",
    "scheme",
    "sha256",
    "sibling",
    "suffix",
    "upload_folder",
    "without_links",
    "write_bytes",
]
