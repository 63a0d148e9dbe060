"""The guards between a folder of unknown files and pydicom: a file ends as a dataset or as a `Refused`.

Some files are broken, and some are made to break things: a few kilobytes that swell to gigabytes, a header of a
million elements, a pipe that would be waited on for ever, a zip archive that lies about what is in it. So:

- A file's first 132 bytes decide whether it is read on, and its size whether it is held.
- What a header declares is never allocated, only what is there.
- pydicom parses from memory, through a gate that counts its reads and lets none be without a limit.
- A member of a zip archive is unpacked to the size that the archive gives for it, and no further.
- A refusal has a kind, for counting, and a line for people. The line quotes nothing from the file that could name
  a patient or take over a terminal.

Nearly all files are small, uncompressed and little-endian. Of these only the elements are parsed, and the pixels
stay where they are. Compressed pixels have guards of their own, in `_decoder`.
Taught and tested in nbs/proofs/hostile_files.ipynb
"""
import io, os, re, stat, struct, warnings, zipfile, zlib
from contextlib import contextmanager
from functools import lru_cache

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset

# The most that a file may hold, unpack to or declare, in MiB; reading takes up to three times that
MAX_MB = 1024  # A thin-slice enhanced CT of 2,000 frames has 1,000
MAX_ELEMENTS = 1_000_000  # An enhanced CT of 2,000 frames has some 100,000
MAX_DIRECTORY = 256 << 20  # Bytes of a zip archive's list of members, of which some 100 tell of one file
SMALL = 4 << 20  # Bytes: a file of so many cannot hold a million elements
LONG = 1 << 16  # Bytes: a value of so many is not copied

class Refused(ValueError):
    "A file that gives no slice: `kind` in a word for counting, and a line that says why"
    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind

@contextmanager
def refusals():
    "Whatever goes wrong with a file's bytes ends as a refusal, without quoting them"
    try: yield
    except Refused: raise
    except OSError as e: raise Refused('Unreadable', e.strerror or 'cannot be read') from e
    except Exception as e: raise Refused('Unreadable', f'damaged or of an unknown form ({type(e).__name__})') from e

# How a file begins, and how large it is

_early_tags = b'\2\0', b'\x08\0', b'\0\2', b'\0\x08'  # Groups 2 and 8, in either byte order
_gzip, _zip = b'\x1f\x8b', b'PK\3\4'
_png, _jpeg = b'\x89PNG', b'\xff\xd8\xff'

def _check_beginning(
    head, # The first 132 bytes
    inside=False, # Of a member of a zip archive?
):
    "Refuse what has neither a preamble, nor a first tag of group 2 or 8"
    if head[128:132] == b'DICM' or head[:2] in _early_tags: return
    if head.startswith(_gzip): raise Refused('NotDicom', 'packed with gzip: unpack it first')
    if inside and head.startswith(_zip): raise Refused('NotDicom', 'a zip archive in a zip archive: unpack it first')
    if head.startswith((_png, _jpeg)): raise Refused('NotDicom', 'a PNG or JPEG image: say which window it was, as in `--window brain`')
    raise Refused('NotDicom', 'not a DICOM file')

def _check_size(size, max_bytes):
    if size <= max_bytes: return
    message = f'{size >> 20:,} MB, the cap is {max_bytes >> 20:,} MB: raise `--max-mb` if that is right'
    raise Refused('TooLarge', message)

# Bytes to a dataset

class _Deflated(Exception): pass

class _Gate(io.BytesIO):
    "A file's bytes for pydicom: so many reads, and none without a limit"
    left = 2*MAX_ELEMENTS  # A read for its tag and length, another for its value

    def read(self, n=-1):
        self.left -= 1
        if n is None or n < 0: raise _Deflated  # Only pydicom's way with deflated data asks for all
        if self.left < 0: raise Refused('Unreadable', f'a header of more than {MAX_ELEMENTS:,} elements')
        return super().read(n)

_deflated_syntax = b'1.2.840.10008.1.2.1.99'
_inflated_syntax = b'1.2.840.10008.1.2.1'.ljust(len(_deflated_syntax), b'\0')

def _inflated(
    data, # Bytes of a file
    start, # Where its deflated dataset begins
    max_bytes, # The most that this may inflate to
):
    "The same file as if it had never been deflated"
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    dataset = unpack.decompress(data[start:], max_bytes)
    if unpack.unconsumed_tail:
        message = f'inflates to more than {max_bytes >> 20:,} MB: raise `--max-mb` if that is right'
        raise Refused('TooLarge', message)
    return data[:start].replace(_deflated_syntax, _inflated_syntax) + dataset

def parse(
    data, # Bytes of a file
    max_bytes, # The most that they may inflate to
):
    "The dataset in a file's bytes, by pydicom through the gate"
    _check_beginning(data[:132])
    gate = _Gate(data)
    try: ds = pydicom.dcmread(gate, force=True)
    except _Deflated: return parse(_inflated(data, gate.tell(), max_bytes), max_bytes)
    if data[128:132] != b'DICM' and 'Modality' not in ds: raise Refused('NotDicom', 'not a DICOM file')
    if len(ds) == 0:  # pydicom gives none at all where one does not end
        raise Refused('CutShort', 'no elements, or one that does not end: the file is cut short')
    return ds

_plain_syntaxes = {  # Little-endian, uncompressed: is the value representation implicit?
    b'1.2.840.10008.1.2': True,
    b'1.2.840.10008.1.2.1': False}

def _behind_meta(tag, vr, length): return tag >> 16 != 2

def _read_syntax(f):
    "The transfer syntax in a file's group 2, as bytes; `f` then stands where the dataset begins"
    element = read_dataset(f, False, True, stop_when=_behind_meta).get_item('TransferSyntaxUID')
    value = getattr(element, 'value', None) or b''
    return value.rstrip(b'\0 ')

def _view_long_values(ds, data):
    "Put views on `data` where `ds` has values that were too long to be copied"
    raws = [element for element in ds.values() if isinstance(element, RawDataElement)]
    for raw in raws:
        if raw.value is not None or not raw.length: continue
        end = raw.value_tell + raw.length
        ds[raw.tag] = raw._replace(value=memoryview(data)[raw.value_tell:end])

def _parse_plain(data):
    "The dataset, with long values as views on `data`, of a small plain file; None where it is another"
    if data[128:132] != b'DICM' or len(data) > SMALL: return None
    f = io.BytesIO(data)
    f.seek(132)
    implicit = _plain_syntaxes.get(_read_syntax(f))
    if implicit is None: return None
    ds = read_dataset(f, implicit, True, defer_size=LONG)
    _view_long_values(ds, data)
    return ds

# Zip archives

_behind_mark = (  # Where the end of an archive gives the size of its list: mark, bytes from there, how it is written
    (b'PK\5\6', 12, '<I'),
    (b'PK\6\6', 40, '<Q'))  # Of zip64
_elsewhere = 0xffffffff  # Stands in place of a size that zip64 gives

def _size_behind(tail, mark, offset, kind):
    "A size in the last bytes of an archive; 0 where it is not there"
    at = tail.rfind(mark)
    if at < 0 or len(tail) < at + offset + 8: return 0
    size, = struct.unpack_from(kind, tail, at + offset)
    return 0 if size == _elsewhere else size

def _directory_size(f):
    "What the end of a zip archive says of its list of members, in bytes"
    f.seek(max(0, f.seek(0, 2) - 70_000))
    tail = f.read()
    return max(_size_behind(tail, *where) for where in _behind_mark)

def open_zip(
    path, # Of a zip archive
)->zipfile.ZipFile:
    "The archive; a `Refused` where its list of members is too long to be true"
    with open(path, 'rb') as f:
        if _directory_size(f) > MAX_DIRECTORY:
            raise Refused('TooLarge', 'a zip archive with too long a list of members')
    return zipfile.ZipFile(path)

@lru_cache(maxsize=4)
def _kept_open(path, modified):
    "An archive, open for its next members; `modified` tells it from a later one of the same name"
    return open_zip(path)

def archive_of(
    fname, # As `read_dicom` takes it
):
    "(archive, member) of `archive.zip!member`, or None for a file that stands by itself"
    if '!' not in fname or os.path.lexists(fname): return None
    for bang in re.finditer('!', fname):
        archive, member = fname[:bang.start()], fname[bang.end():]
        if os.path.isfile(archive): return archive, member
    return None

def _check_packing(info):
    "Refuse a member that cannot be unpacked, or not within a limit"
    if info.flag_bits & 1: raise Refused('Unreadable', 'encrypted: unpack the archive first')
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused('Unreadable', 'packed by a method other than deflate: unpack the archive first')

def _member_bytes(archive, member, max_bytes):
    z = _kept_open(archive, os.stat(archive).st_mtime_ns)
    info = z.getinfo(member)
    _check_packing(info)
    with z.open(info) as f:
        head = f.read(132)
        _check_beginning(head, inside=True)
        _check_size(info.file_size, max_bytes)
        return head + f.read(info.file_size - len(head))  # It unpacks no more than this, whatever is there

# A path to a dataset

def _file_bytes(path, max_bytes):
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode): raise Refused('Unreadable', 'not a regular file')
    with open(path, 'rb', buffering=0) as f:
        head = f.read(min(status.st_size, SMALL))
        _check_beginning(head)
        _check_size(status.st_size, max_bytes)
        return head + f.read() if status.st_size > SMALL else head

def read_bytes(
    fname, # As `read_dicom` takes it
    max_bytes, # The most that there may be
):
    "What is in a file, or in a member of an archive"
    inside = archive_of(fname)
    return _member_bytes(*inside, max_bytes) if inside else _file_bytes(fname, max_bytes)

def open_dataset(
    fname, # As `read_dicom` takes it
    max_bytes, # The most that it may hold or unpack to
):
    "The dataset in a file; of a small plain one, long values are views on its bytes"
    data = read_bytes(fname, max_bytes)
    ds = _parse_plain(data)
    return parse(data, max_bytes) if ds is None else ds

def read_dicom(
    fname, # Path of a file, or `archive.zip!member`
    max_mb:int=MAX_MB, # The most that it may hold, unpack to or declare, in MiB
)->pydicom.Dataset:
    "The dataset in a file; a `Refused`, which is a `ValueError`, says why where there is none"
    max_bytes = max_mb << 20
    with refusals(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return parse(read_bytes(str(fname), max_bytes), max_bytes)

# The beginning of a header

HEAD = 1 << 16  # Bytes that tell which study a file is of, in all but a few files

def _first_bytes(fname):
    inside = archive_of(fname)
    if inside is None:
        if not stat.S_ISREG(os.stat(fname).st_mode): raise Refused('Unreadable', 'not a regular file')
        with open(fname, 'rb', buffering=0) as f: return f.read(HEAD)
    z = _kept_open(inside[0], os.stat(inside[0]).st_mtime_ns)
    info = z.getinfo(inside[1])
    _check_packing(info)
    with z.open(info) as f: return f.read(HEAD)

_unlike = b'1.2.840.10008.1.2.2', _deflated_syntax  # Big-endian and deflated; all others are as explicit little-endian up to the pixels

def _parse_head(data, last):
    "The elements up to the tag `last` in the first bytes of a file; None where it takes more to tell"
    if data[128:132] != b'DICM': return None
    f = io.BytesIO(data)
    f.seek(132)
    try:
        syntax = _read_syntax(f)
        if not syntax or syntax in _unlike: return None
        return read_dataset(f, _plain_syntaxes.get(syntax, False), True, stop_when=lambda tag, vr, length: tag > last, defer_size=LONG)
    except Exception: return None  # Opening all of it tells what is wrong

def open_head(
    fname, # As `read_dicom` takes it
    last, # A tag
    max_bytes, # As for `open_dataset`
):
    "The elements of a file up to a tag and perhaps more, without reading its pixels where that is possible"
    data = _first_bytes(fname)
    _check_beginning(data[:132], inside=archive_of(fname) is not None)
    ds = _parse_head(data, last)
    return ds if ds is not None and last in ds else open_dataset(fname, max_bytes)
