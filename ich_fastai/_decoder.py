"""Compressed pixels, unpacked in a process of their own.

They are unpacked by libraries in C, which a damaged stream can crash, hang or make grow without end. So another
process does it, with a limit on its memory and its time: whatever happens there is one file's refusal, and the
next file gets a fresh process.

It starts with the first compressed slice, serves all later ones, and ends with the process that started it.
Requests and answers go through its standard input and output: two lengths, facts as JSON, bytes. Nothing is
pickled. The process imports numpy, pydicom, this module and `_files`.
Taught and tested in nbs/proofs/hostile_files.ipynb
"""
import atexit, json, os, struct, subprocess, sys, threading, warnings
from contextlib import suppress
from functools import lru_cache

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, pixel_array
from pydicom.pixels.utils import get_j2k_parameters
from pydicom.uid import UID, JPEG2000TransferSyntaxes, JPEGExtended12Bit
from ._files import Refused

DECODE_SECONDS = 60  # A 512 x 512 slice takes some hundredths of a second
DESCRIBED = (  # What a decoder needs of a header
    'Rows', 'Columns', 'BitsAllocated', 'BitsStored', 'HighBit', 'PixelRepresentation', 'SamplesPerPixel',
    'PhotometricInterpretation', 'PlanarConfiguration', 'NumberOfFrames')

# What both sides say to each other

def _send(stream, facts, data):
    head = json.dumps(facts).encode()
    stream.write(struct.pack('<QQ', len(head), len(data)) + head)
    stream.write(data)
    stream.flush()

def _receive(stream):
    "(facts, data), or an `EOFError` where the other side is gone"
    lengths = stream.read(16)
    if len(lengths) < 16: raise EOFError
    n_head, n_data = struct.unpack('<QQ', lengths)
    head, data = stream.read(n_head), stream.read(n_data)
    if len(head) + len(data) < n_head + n_data: raise EOFError
    return json.loads(head), data

# The decoder's side

def _limit_memory(max_mb):
    try: import resource
    except ImportError: return  # Windows has no such limit
    most = (3*max_mb + 1024) << 20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))

def serve(
    requests, answers, # Streams of bytes
    max_mb, # The most that a file may hold; the process may take three times that, and 1 GiB
):
    "The decoder's process: an answer to each request, until there are no more"
    _limit_memory(max_mb)
    warnings.simplefilter('ignore')
    while True:
        try: facts, data = _receive(requests)
        except EOFError: return
        _answer(answers, facts, data)

def _answer(answers, facts, data):
    try:
        frame = _decoded(facts, data)
        _send(answers, dict(shape=frame.shape, dtype=frame.dtype.str), frame.tobytes())
    except Exception as e: _send(answers, dict(error=type(e).__name__), b'')

def _decoded(facts, data):
    "One frame, by pydicom and its plugins"
    ds = _as_dataset(facts, data)
    if facts['syntax'] == JPEGExtended12Bit and facts['BitsStored'] != 8:
        return _by_gdcm(facts, _first_frame(data))
    if facts['syntax'] in JPEG2000TransferSyntaxes:
        stream = get_j2k_parameters(_first_frame(data))
        if stream: ds.PixelRepresentation = int(stream['is_signed'])  # The stream is right, not the header
    return np.ascontiguousarray(pixel_array(ds, index=0))

def _first_frame(data): return get_frame(data, 0, number_of_frames=1)

def _as_dataset(facts, data):
    "What pydicom decodes pixels from"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(facts['syntax'])
    for key in DESCRIBED:
        if facts[key] is not None: setattr(ds, key, facts[key])
    ds.PixelData = data
    return ds

def _by_gdcm(facts, stream):
    "A frame of 12 bits in JPEG Extended, which pydicom's way to GDCM refuses"
    image = _gdcm_image(facts)
    image.SetDataElement(_gdcm_pixels(stream))
    kind = '<i2' if facts['PixelRepresentation'] == 1 else '<u2'
    values = np.frombuffer(image.GetBuffer().encode('utf-8', 'surrogateescape'), kind)
    return values.reshape(facts['Rows'], facts['Columns'])

def _gdcm_pixels(stream):
    import gdcm
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(stream)
    fragments.AddFragment(fragment)
    pixels = gdcm.DataElement(gdcm.Tag(0x7fe0, 0x0010))
    pixels.SetValue(fragments.__ref__())
    return pixels

def _gdcm_image(facts):
    "What the header says of the pixels"
    import gdcm
    stored, signed = facts['BitsStored'], int(facts['PixelRepresentation'] == 1)
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((facts['Columns'], facts['Rows'], 1))
    gray = gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gray))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPixelFormat(gdcm.PixelFormat(1, facts['BitsAllocated'], stored, stored - 1, signed))
    return image

# The side that asks

_decoders = {}  # By process, since a forked worker must not talk to its parent's
_asking = threading.Lock()

@lru_cache(32)
def can_decode(syntax):
    "Does something here decode this transfer syntax?"
    try: return get_decoder(syntax).is_available
    except NotImplementedError: return False

_code = '; '.join([
    'import sys',
    'from ich_fastai._decoder import serve',
    'serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))'])

def _start_decoder(max_mb):
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([ours, *(p for p in sys.path if p)])
    environment = {**os.environ, 'OPENBLAS_NUM_THREADS': '1', 'PYTHONPATH': path}
    atexit.register(stop_decoder)
    command = [sys.executable, '-P', '-c', _code, str(int(max_mb))]  # -P: nothing from the current folder is imported
    return subprocess.Popen(command, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

def decoder_process(
    max_mb, # Where it has to be started: the most that a file may hold
)->subprocess.Popen:
    "This process's decoder"
    running = _decoders.get(os.getpid())
    if running is None: running = _decoders[os.getpid()] = _start_decoder(max_mb)
    return running

def stop_decoder():
    "End this process's decoder, where there is one"
    decoder = _decoders.pop(os.getpid(), None)
    if decoder is None: return
    decoder.kill()
    decoder.wait()
    for stream in (decoder.stdin, decoder.stdout):
        with suppress(OSError): stream.close()  # What was not sent yet has nobody to go to

def _ask(facts, data, max_mb):
    "The decoder's answer, (facts, pixels); one that dies or does not end is stopped"
    with _asking:
        decoder = decoder_process(max_mb)
        late = threading.Timer(DECODE_SECONDS, decoder.kill)
        late.start()
        try:
            _send(decoder.stdin, facts, data)
            return _receive(decoder.stdout)
        except (OSError, EOFError, ValueError) as e:
            stop_decoder()
            message = 'the pixels cannot be decoded: the decoder crashed, grew or took too long'
            raise Refused('Undecodable', message) from e
        finally: late.cancel()

def decoded_outside(
    facts:dict, # What the header says of `DESCRIBED`, or None, and the transfer syntax as `syntax`
    data:bytes, # One frame, encapsulated
    max_mb:int, # The most that a file may hold, in MiB
)->np.ndarray: # [rows, columns]
    "The frame, by the decoder's process"
    answer, pixels = _ask(facts, data, max_mb)
    if 'error' in answer: raise Refused('Undecodable', f"the pixels cannot be decoded ({answer['error']})")
    if tuple(answer['shape']) != (facts['Rows'], facts['Columns']):
        raise Refused('Undecodable', 'the decoded pixels are not of the size that the header gives')
    return np.frombuffer(pixels, answer['dtype']).reshape(answer['shape'])
