"Reading and cleaning, side by side with fastai's own functions: time, memory, worker processes"
import argparse, json, os, subprocess, sys, tempfile, time, warnings
os.environ.update(OMP_NUM_THREADS='1', ICH_QUIET='1')  # One core each, and no progress bars
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pydicom
from PIL import Image
from ich_fastai.clean import clean_images, crop, gray_levels, head_box, resize
from ich_fastai.core import LABELS, TYPES, WINDOWS, Run
from ich_fastai.dicom import HU_MAX, HU_MIN, freqhist_bins, hist_lut, hu, slice_rows, window_lut
from ich_fastai.labels import read_labels
from ich_fastai.metadata import read_metadata
from ich_fastai.phantom import HEADERS, plan_studies, write_study
from sides import Table, about, cpu_ms, rounds_of, wall, write_page

SIZE, QUALITY, CHANNELS = 256, 90, ('brain', 'subdural', 'brain_bone')  # Of the JPEG files, on both sides

def equal(ok, what):
    if not ok: sys.exit(f'MISMATCH: {what}')

# The files

def phantom_files(folder): # Paths: one study of 512 px in each header group
    study = replace(plan_studies(4, seed=0)[0], odd_size=False, truncated=0, no_suffix=0)
    for i, name in enumerate(HEADERS): write_study(replace(study, seed=(0, 100+i), uid=f'{study.uid}{i}', header=name), folder)
    return sorted(Path(folder, 'stage_2_train').iterdir())

def readable(files): # (paths, a row each), leaving out what fastai cannot read or crop
    found = {}
    for f in files:
        try: rows = slice_rows(f)
        except ValueError: continue
        if len(rows) == 1 and rows[0]['Rows'] == rows[0]['Columns']: found[f] = rows[0]
    if not found: sys.exit('no square CT slices in these files')
    return found

def group(row): # Its header group, in words
    kind, defect = 'signed' if row['PixelRepresentation'] else 'unsigned', ', wrapped' if row['hu_repair'] == 'wrapped' else ''
    return f"{row['BitsStored']} bits {kind}, intercept {row['RescaleIntercept']:g}{defect}"

def pick(found, n): # `n` paths spread over each header group
    groups = pd.Series(found.keys()).groupby([group(row) for row in found.values()])
    return [f for _, files in groups for f in files.iloc[np.unique(np.linspace(0, len(files)-1, n).astype(int))]]

def links(folder, files, n): # `n` symbolic links to `files` in turn
    folder.mkdir()
    out = [folder/f'link-{i:06d}.dcm' for i in range(n)]
    for i, link in enumerate(out): link.symlink_to(files[i % len(files)])
    return out

def many_slices(frame, paths): # Metadata of `paths`, links to the files of `frame` in turn, each with its own identifiers
    copy, rows = np.divmod(np.arange(len(paths)), len(frame))
    copies = frame.iloc[rows].assign(fname=[str(p) for p in paths])
    for key in ('StudyInstanceUID', 'SeriesInstanceUID'): copies[key] = copies[key] + [f'-{c}' for c in copy]
    copies.index = pd.Index([f'{image}-{c}' for image, c in zip(copies.index, copy)], name='image')
    return copies.sort_values(['StudyInstanceUID', 'SeriesInstanceUID', 'slice_no'])

# fastai, with what stops it mended here and only here

def import_fastai(found):
    "`fastai.medical.imaging`, on one core"
    try: import kornia  # Imported by fastai, but not among what it requires
    except ImportError: sys.modules['kornia'] = SimpleNamespace(filters=SimpleNamespace(gaussian_blur2d=gaussian_blur2d))
    import torch
    from fastai.medical import imaging
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')  # torch's, and pydicom's, one for each identifier that is not a UID; printing them would only slow fastai
    sequences = any(elem.VR == 'SQ' for f in found for elem in pydicom.dcmread(f))
    if sequences:  # as_dict calls `Sequence.__base__(x)`, which is abstract in pydicom 3; RSNA files and phantoms have none
        cast = imaging._cast_dicom_special
        imaging._cast_dicom_special = lambda x: x if type(x) is pydicom.Sequence else cast(x)
    return imaging

def gaussian_blur2d(x, kernel_size, sigma, border_type): # x [1, 1, rows, columns]
    "In place of kornia's, and as fast as that of 0.9, which adds up shifted images too: two convolutions take twice as long"
    import torch
    n, s = kernel_size[0], sigma[0]
    g = torch.exp(-(torch.arange(n) - n//2)**2/(2*s**2))
    for dim, margin in ((3, (n//2, n//2, 0, 0)), (2, (0, 0, n//2, n//2))):
        wide, size = torch.nn.functional.pad(x, margin, mode=border_type), x.shape[dim]
        x = torch.zeros_like(x)
        for i, weight in enumerate((g/g.sum()).tolist()): x.add_(wide.narrow(dim, i, size), alpha=weight)
    return x

def fastai_boxes(imaging, px): return imaging.mask2bbox(px.mask_from_blur(imaging.dicom_windows.brain)[None])

def jpeg(picture, dest): Image.fromarray(picture).save(dest, 'JPEG', quality=QUALITY) # fastai's `save_jpg` does the same, for three and four channels

def fastai_hist(imaging, bins, px): # Tensor of HU
    "Mask, box, histogram scaling, crop and resize, JPEG"
    x = imaging.crop_resize(px.hist_scaled(bins)[None], fastai_boxes(imaging, px), SIZE)[0, 0]
    jpeg((x*255).byte().numpy(), BytesIO())

def fastai_windows(imaging, px):
    "The same with three windows as channels"
    channels = px.to_nchan([getattr(imaging.dicom_windows, w) for w in CHANNELS], bins=0)
    x = imaging.crop_resize(channels, fastai_boxes(imaging, px).repeat(1, 1, len(channels)), SIZE)[:, 0].clamp(0, 1)
    jpeg((x*255).byte().permute(1, 2, 0).contiguous().numpy(), BytesIO())

def resized_first(imaging, path): # Tensor of HU [256, 256]
    "The order of fastai's published RSNA notebook: HU are cropped and resized first, on a quarter of the pixels the rest is cheap"
    px = path.dcmread().scaled_px
    return imaging.crop_resize(px[None], fastai_boxes(imaging, px), SIZE)[0, 0]

def fastai_hist_file(imaging, bins, dest, path):
    jpeg((resized_first(imaging, path).to_nchan([], bins)[0]*255).byte().numpy(), dest/f'{path.stem}.jpg')

def fastai_windows_file(imaging, dest, path):
    windows = [getattr(imaging.dicom_windows, w) for w in CHANNELS]
    resized_first(imaging, path).save_jpg(dest/path.name, windows, bins=0, quality=QUALITY)

# 1. Header and statistics

def floor(pixels, path): # `pixels`: how many each file has
    "The least that there is to do: read the file, find its elements, count its values once"
    data = path.read_bytes()
    pydicom.dcmread(BytesIO(data))
    return np.bincount(np.frombuffer(data, np.uint16, pixels[path], len(data) - 2*pixels[path]), minlength=65536)

def check_statistics(found, imaging, files):
    for f in files:
        theirs, row = f.dcmread().as_dict(window=imaging.dicom_windows.brain), found[f]
        keys = ['img_min', 'img_max', 'img_mean', 'img_std'] + ['img_pct_window']*(row['hu_repair'] == '')
        equal(np.allclose([row[k] for k in keys], [theirs[k] for k in keys], rtol=1e-6, atol=1e-6), f'statistics of {f}')

def measure_header(table, job):
    imaging = import_fastai(job.found)
    check_statistics(job.found, imaging, job.files)
    pixels = {f: job.found[f]['Rows']*job.found[f]['Columns'] for f in job.files}
    fastai_row = lambda f: f.dcmread().as_dict(px_summ=True, window=imaging.dicom_windows.brain)
    costs = rounds_of(job.rounds, *(partial(cpu_ms, fn, job.files) for fn in (slice_rows, fastai_row, partial(floor, pixels))))
    table.faster('header', 'header + statistics, against fastai', costs[:, [0, 1]], 'ms', at_least=3)
    table.within('header_floor', 'header + statistics, against the floor', costs[:, [0, 2]], 'ms', at_most=1.3)

# 2. From the DICOM file to the JPEG file

def our_picture(lut, image): # uint8 [256, 256], or [256, 256, 3] where the table has three columns
    return gray_levels(np.rint(resize(crop(image, head_box(image)), SIZE)).astype(np.int16), lut)

def our_jpeg(lut, image): jpeg(our_picture(lut, image), BytesIO())

def our_file(lut, dest, path): jpeg(our_picture(lut, hu(path)), dest/f'{path.stem}.jpg')

def reference(path): # float64 HU [256, 256]
    "The same steps, each new pixel the mean over the exact area it covers; whole numbers until the division, so that halves are halves"
    image = hu(path)
    square = crop(image, head_box(image)).astype(np.float64)
    if len(square) < SIZE: return resize(square, SIZE)  # Nothing to average
    old, new = np.arange(len(square)), np.arange(SIZE)[:, None]
    share = np.minimum((new+1)*len(square), (old+1)*SIZE) - np.maximum(new*len(square), old*SIZE)
    share = np.maximum(share, 0).astype(np.float64)
    return share @ square @ share.T/len(square)**2

def check_pictures(table, bins, luts, files):
    hist = lambda px: np.interp(px, bins, np.linspace(0, 1, len(bins)))
    windows = lambda px: np.stack([np.clip((px - w.level)/w.width + .5, 0, 1) for w in map(WINDOWS.get, CHANNELS)], -1)
    apart = lambda view, lut, px, f: np.abs(our_picture(lut, hu(f)) - 255*view(px)).max()
    px = {f: reference(f) for f in files}
    off, unrounded = (max(apart(view, lut, whole(px[f]), f) for f in files for view, lut in zip((hist, windows), luts))
                      for whole in (np.rint, np.asarray))
    equal(off <= 1, f'a picture is {off:.2f} gray levels from the float64 reference')
    table.note(f'pictures: at most {off:.2f} gray levels from the same steps in float64 (HU in whole numbers after the resizing, as in the store; '
               f'{unrounded:.2f} where they stay fractions)')

def training_bins(files): # Of one file of each header group, as the notebook takes them from a few images
    counts = sum(np.bincount(np.clip(hu(f), HU_MIN, HU_MAX).ravel() - HU_MIN, minlength=HU_MAX-HU_MIN+1) for f in files)
    return freqhist_bins(counts)

def measure_clean(table, job):
    import torch
    imaging, dest = import_fastai(job.found), job.folder/'jpeg'
    dest.mkdir()
    bins = training_bins(job.files[::len(job.files)//5 or 1])
    luts = hist_lut(bins), np.stack([window_lut(WINDOWS[w]) for w in CHANNELS], -1)
    check_pictures(table, bins, luts, job.files)
    brks, rounds = torch.tensor(bins, dtype=torch.float32), max(3, job.rounds//3)
    images, tensors = [hu(f) for f in job.files], [f.dcmread().scaled_px for f in job.files]
    steps = dict(hist=('histogram scaling', 15, partial(our_jpeg, luts[0]), partial(fastai_hist, imaging, brks)),
                 windows=('three windows', 8, partial(our_jpeg, luts[1]), partial(fastai_windows, imaging)))
    for name, (what, at_least, ours, theirs) in steps.items():
        costs = rounds_of(rounds, partial(cpu_ms, ours, images), partial(cpu_ms, theirs, tensors))
        table.faster(f'clean_{name}', f'HU to JPEG: mask, box, crop, {what}, resize', costs, 'ms', at_least)
    files = dict(hist=('histogram scaling', partial(our_file, luts[0], dest), partial(fastai_hist_file, imaging, brks, dest)),
                 windows=('three windows', partial(our_file, luts[1], dest), partial(fastai_windows_file, imaging, dest)))
    for name, (what, *sides) in files.items():
        costs = rounds_of(rounds, *(partial(cpu_ms, fn, job.files) for fn in sides))
        table.faster(f'file_{name}', f'DICOM file to JPEG file, fastai resizing first: {what}', costs, 'ms')

# 3. The label file

def write_label_file(path, n_images):
    "Six rows an image and 24 rows twice, as in RSNA"
    rng = np.random.default_rng(0)
    images = [f'ID_{i:09x}' for i in rng.choice(16**9, n_images, replace=False)]
    types = rng.random((n_images, len(TYPES))) < .04
    labels = np.column_stack([types, types.any(1)]).astype(int).tolist()
    rows = [f'{image}_{name},{value}\n' for image, values in zip(images, labels) for name, value in zip(LABELS, values)]
    path.write_text('ID,Label\n' + ''.join(rows + rows[:48:2]))

def pandas_labels(path):
    "Plain pandas; without `drop_duplicates` its pivot refuses RSNA's file"
    rows = pd.read_csv(path).drop_duplicates()
    rows[['image', 'label']] = rows.ID.str.rsplit('_', n=1, expand=True)
    return rows.pivot(index='image', columns='label', values='Label')

def label_cost(side, path): # In a process of its own: CPU seconds, GiB at its peak, a hash of the frame
    start = time.process_time()
    frame = side(path)
    seconds, gib = time.process_time() - start, high_water('self')
    return seconds, gib, int(pd.util.hash_pandas_object(frame[list(LABELS)].astype(bool).sort_index()).sum())

def fresh(side, path): # label_cost, in a fresh process
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(label_cost, side, path).result()

def measure_labels(table, job):
    path = job.folder/'labels.csv'
    write_label_file(path, 75_280 if job.quick else 752_803)
    costs = rounds_of(3, partial(fresh, read_labels, path), partial(fresh, pandas_labels, path), warm=False)
    equal(len(np.unique(costs[:, :, 2])) == 1, 'read_labels and pandas give different labels')
    table.faster('labels', 'label file, against pandas', costs[:, :, 0], 's', at_least=8)
    table.limit('labels_seconds', 'label file, CPU seconds', np.median(costs[:, 0, 0]), 's', at_most=2)
    ours, theirs = np.median(costs[:, :, 1], 0)
    table.limit('labels_memory', f'label file, peak memory (pandas: {theirs:.2f} GiB)', ours, 'GiB', at_most=1)

# 4. Memory, as files become many

def high_water(pid): # GiB that a process has held at most, 0 where it has ended
    try: lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError): return 0
    return max((int(l.split()[1])/2**20 for l in lines if l.startswith('VmHWM')), default=0)

def below(pid): # Process ids of all descendants
    try: children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except (FileNotFoundError, ProcessLookupError): return []
    return [p for c in children for p in (int(c), *below(c))]

def peaks(*command): # GiB of the command's own process, and of the largest below it
    process = subprocess.Popen([str(Path(sys.executable).with_name(command[0])), *map(str, command[1:])])
    high = {}
    while process.poll() is None:
        for pid in (process.pid, *below(process.pid)): high[pid] = max(high.get(pid, 0), high_water(pid))
        time.sleep(.05)
    if process.returncode: sys.exit(f'{command[0]} ended with exit code {process.returncode}')
    return high.pop(process.pid), max(high.values())

def metadata_peaks(job, n):
    folder = job.folder/f'links-{n}'
    links(folder, list(job.found), n)
    return peaks('ich-metadata', folder, job.folder/f'metadata-{n}')

def clean_peaks(job, n):
    frame, _ = read_metadata(list(job.found), 0)
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:  # Gone at once: 50,000 slices are 9 GB
        run = Run(Path(folder)/'run', create=True)
        run.write('metadata', many_slices(frame, links(Path(folder)/'links', list(frame.fname), n)))
        return peaks('ich-clean', run.path)

def measure_memory(table, job):
    few, many = (500, 5_000) if job.quick else (5_000, 50_000)
    for name, cost in (('metadata', metadata_peaks), ('clean', clean_peaks)):
        small, large = cost(job, few), cost(job, many)
        for i, who in enumerate(('parent', 'worker')):
            what = f'ich-{name}, peak of the {who}: {many:,} files against {few:,}'
            table.within(f'memory_{name}_{who}', what, np.array([[large[i], small[i]]]), 'GiB', at_most=1.2)

# 5. and 6. Two worker processes, and the same two on a Dask cluster

def workload(job): # (files for `read_metadata`, a frame for `clean_images`)
    n_files, n_slices = (2_048, 1_024) if job.quick else (8_192, 6_144)  # Whole lots and parts, an even number of them
    frame, _ = read_metadata(list(job.found), 0)
    paths = links(Path(tempfile.mkdtemp(dir=job.folder))/'links', list(frame.fname), n_files)
    return paths, many_slices(frame, paths[:n_slices])

def clean_into(folder, frame, **how):
    with tempfile.TemporaryDirectory(dir=folder) as dest: return wall(lambda: clean_images(frame, dest, **how))

def tasks(job): # Name to a function that takes n_workers or executor and gives seconds
    paths, frame = workload(job)
    return dict(metadata=lambda **how: wall(lambda: read_metadata(paths, **how)), clean=partial(clean_into, job.folder, frame))

def arithmetic(_): sum(i*i for i in range(4_000_000))

def machine_gain(): # How much two processes gain here where they share nothing at all
    def seconds(n):
        with ProcessPoolExecutor(n) as pool: return wall(lambda: list(pool.map(arithmetic, range(4))))
    return seconds(1)/seconds(2)

def measure_workers(table, job):
    table.note(f'two processes of nothing but arithmetic are {machine_gain():.2f} x as fast as one on this machine, as busy as it is now')
    for name, cost in tasks(job).items():
        costs = rounds_of(2 if job.quick else 5, partial(cost, n_workers=2), partial(cost, n_workers=1), warm=False)
        table.faster(f'workers_{name}', f'{name}: two worker processes against one', costs, 's', at_least=1.7)

def measure_dask(table, job):
    try: from distributed import Client, LocalCluster
    except ImportError: return table.note('dask: skipped, `distributed` is not installed')
    work = tasks(job)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(abs, range(8)))  # Its processes start before the cluster's threads do
        with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster, Client(cluster) as client:
            for name, cost in work.items():
                costs = rounds_of(1 if job.quick else 9, partial(cost, executor=client.get_executor()), partial(cost, executor=pool))
                table.within(f'dask_{name}', f'{name}: Dask cluster of two against a pool of two', costs, 's', at_most=1.15)

# All of it

SECTIONS = dict(header=measure_header, clean=measure_clean, labels=measure_labels, memory=measure_memory, workers=measure_workers, dask=measure_dask)

def prepare(args, folder): # What the sections share
    found = readable(sorted(p for p in Path(args.files).rglob('*') if p.is_file()) if args.files else phantom_files(folder/'phantoms'))
    files = pick(found, 6 if args.quick else 12)
    return SimpleNamespace(found=found, files=files, folder=folder, quick=args.quick, rounds=7 if args.quick else 21)

def measure(args):
    table = Table()
    with tempfile.TemporaryDirectory(prefix='intake-') as folder:
        job = prepare(args, Path(folder))
        groups = pd.Series([group(job.found[f]) for f in job.files]).value_counts(sort=False)
        table.note(f"files: {'; '.join(f'{n} of {g}' for g, n in groups.items())}; of {len(job.found)} in {args.files or 'phantoms of 512 px'}")
        for name in [args.only] if args.only else SECTIONS: SECTIONS[name](table, job)
    return table

PACKAGES = 'fastai', 'torch', 'pydicom', 'numpy', 'pandas', 'pyarrow', 'pillow', 'kornia', 'distributed'
NOTE = 'Medians over rounds in which the sides take turns, ratio by round. One core each, CPU time, but for worker processes and Dask: by the clock.'

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='fewer files; under two minutes')
    p.add_argument('--only', choices=SECTIONS, help='one section')
    p.add_argument('--files', help='a folder of DICOM files to use in place of phantoms')
    p.add_argument('--write', action='store_true', help='write bench/results/intake.md, as a full run on phantoms always does')
    p.add_argument('--json', action='store_true', help='one JSON object on the last line')
    args = p.parse_args()
    table = measure(args)
    lines = about('intake', PACKAGES, NOTE)
    print('', *lines, '', table.text(), sep='\n')
    if args.write or not (args.quick or args.only or args.files): write_page('intake', 'Intake, measured', lines, table)
    if args.json: print(json.dumps(table.figures))
