"Training, side by side with plain fastai: the loader, the step, the whole recipe; a study's prediction; memory"
import argparse, json, os, shutil, signal, subprocess, sys, tempfile, time, warnings
os.environ['ICH_QUIET'] = '1'  # No progress bars
warnings.filterwarnings('ignore')
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from ich_fastai._threads import own_cores
from ich_fastai.clean import Store, export_images
from ich_fastai.core import TYPES, Run, keep_freed_memory
from ich_fastai.data import hist_bins, make_loader, task_slices
from ich_fastai.intake import phantom_run
from ich_fastai.labels import split_patients
from ich_fastai.models import Net, create_model, precision_on
from ich_fastai.recipes import Recipe, get_recipe
from ich_fastai.loss import LabelLoss
from ich_fastai.train import make_learner
from sides import Table, about, rounds_of, wall, write_page

CORES = os.cpu_count()

def in_child(fn, *args, **kw): # A process of its own: settings of memory last as long as the process
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(fn, *args, **kw).result()

def cpu(fn): # Seconds of CPU of all threads
    start = time.process_time()
    fn()
    return time.process_time() - start

# The loader

def fastai_loader(store, jpeg, positions, size, augmented, bs=64): # ImageDataLoaders over JPEG of 256 px, three windows as colors
    from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms
    frame = pd.DataFrame(dict(name=[f'{i}.jpg' for i in store.index.index[positions]], label=['a', 'b']*(len(positions)//2)))
    turned = aug_transforms(do_flip=True, max_rotate=15, p_affine=1., max_zoom=1., max_lighting=0., max_warp=0.) if augmented else None
    return ImageDataLoaders.from_df(frame, path=jpeg, valid_pct=0.01, seed=0, item_tfms=Resize(size), batch_tfms=turned, bs=bs, num_workers=0, device='cpu').train

def passed(dl): # CPU milliseconds a slice, over a whole pass
    n = 0
    def run():
        nonlocal n
        for x, _ in dl: n += len(x)
    return cpu(run)*1e3/n

def loader_costs(path, jpeg, view, augmented, size, n, rounds): # [rounds, 2], in a fresh process, as a training is one
    torch.set_num_threads(1)
    store = Store(Run(path).images)
    positions = np.arange(min(n, len(store)))
    bins = hist_bins(store, np.arange(len(store)))
    ours = make_loader(store, Recipe('loader', view=view), bins, positions, size, 64, seed=0 if augmented else None, device='cpu')
    theirs = fastai_loader(store, jpeg, positions, size, augmented)
    return rounds_of(rounds, lambda: passed(ours), lambda: passed(theirs))

def measure_loader(table, job):
    for view, wanted in ('hist', None), ('windows', (8, 4, 2.5)):
        for augmented in (False, True) if view == 'hist' and not job.quick else (view == 'windows',):
            for size, at_least in zip((64,) if job.quick else (64, 128, 256), wanted or ((10, 5, 4) if augmented else (10, 10, 10))):
                costs = in_child(loader_costs, job.run.path, job.jpeg, view, augmented, size, 256 if job.quick else 1024, 2 if job.quick else 7)
                what = {'hist': 'one view', 'windows': 'three windows'}[view]
                table.faster(f'loader_{view}_{size}{"_augmented" if augmented else ""}', f'loader, {size} px, {what}{", flipped and rotated" if augmented else ""}', costs, 'ms', at_least)

# The step

def stepper(learn, batches): # A function that takes k steps, and gives seconds
    def step(k):
        start = time.perf_counter()
        for x, y in islice(batches, k):
            learn.loss_func(learn.model(x), y).backward()
            learn.opt.step()
            learn.opt.zero_grad()
        if x.is_cuda: torch.cuda.synchronize()
        return time.perf_counter() - start
    return step

def forever(dl):
    while True: yield from dl

def real_and_held(job, arch, size, bs, seconds, n=None): # Two functions: a round of steps on real batches, and on one that is held
    recipe = Recipe(f'step_{arch}_{size}', arch=arch, pretrained=False, sizes=(size,), batch_sizes=(bs,))
    learn = make_learner(job.run, recipe)
    learn.create_opt()
    learn.model.train()
    batches = forever(learn.dls.train)
    held = next(batches)
    real, one = stepper(learn, batches), stepper(learn, iter(lambda: held, None))
    one(2)
    k = max(2, round(seconds/one(2)*2))
    return lambda: real(k)*1e3/k, lambda: one(k)*1e3/k

def measure_step(table, job):
    for arch, sizes in dict(resnet18={64: 64, 128: 32, 256: 16}, resnet50={64: 32, 128: 16, 256: 8}).items():
        for size, bs in sizes.items():
            if job.quick and (arch, size) != ('resnet18', 64): continue
            costs = rounds_of(3 if job.quick else 7, *real_and_held(job, arch, size, bs, 1.5))
            table.within(f'step_{arch}_{size}', f'step on real batches against one held: {arch}, {size} px, {bs} a step', costs, 'ms', 1.05)

# A busy machine

def hog(own_session): # A process that never rests unless it is stopped
    return subprocess.Popen([sys.executable, '-c', 'while True: pass'], start_new_session=own_session)

def as_before(): # OpenMP's default, said by the user: then we leave threads alone
    return patch.dict('os.environ', OMP_DYNAMIC='false')

def busy_costs(path, size, n): # Seconds of an epoch by side; in turns, as a virtual machine is not equally fast for long
    learn = make_learner(path, Recipe(f'busy_{size}', arch='resnet18', pretrained=False, view='windows', sizes=(size,), batch_sizes=(32,)))
    same, other = hogs = hog(False), hog(True)
    def epoch(threads, busy):
        for h in hogs: h.send_signal(signal.SIGCONT if h is busy else signal.SIGSTOP)
        with threads(): return wall(lambda: learn.fit(1, 1e-3))
    sides = (nullcontext, other), (nullcontext, same), (nullcontext, None), (as_before, None), (partial(own_cores, 0), other), (as_before, same)
    try:
        with learn.no_bar(), learn.no_logging(): return rounds_of(n, *(partial(epoch, *side) for side in sides))
    finally:
        for h in hogs: h.kill()

def measure_busy(table, job):
    for size in (64,) if job.quick else (64, 128):
        costs = in_child(busy_costs, job.run.path, size, 2 if job.quick else 7)
        net = f'resnet18, {size} px'
        table.within(f'busy_{size}', f'epoch beside a busy process of another session, against without: {net}', costs[:, [0, 2]], 's', 2.2)
        table.within(f'busy_same_{size}', f'epoch beside a busy process of the same session, against without: {net}', costs[:, [1, 2]], 's', 2.2)
        table.within(f'bound_{size}', f'epoch on an idle machine, our threads against OpenMP\'s: {net}', costs[:, [2, 3]], 's', 1.1)
        table.faster(f'busy_late_{size}', f'epoch beside a busy process of another session, one that is seen against one that came after the fit began: {net}', costs[:, [0, 4]], 's')
        table.faster(f'busy_bound_{size}', f'epoch beside a busy process of the same session, our threads against OpenMP\'s: {net}', costs[:, [1, 5]], 's')

# What helps on this device

def rate(arch, size, bs, precision='auto', channels_last=True, kept=True, compiled=False, seconds=5.): # Milliseconds a slice in training
    if kept: keep_freed_memory()
    torch.manual_seed(0)
    model = create_model(Recipe('switch', arch=arch, pretrained=False, precision=precision)).train()
    if not channels_last:
        model = model.to(memory_format=torch.contiguous_format)
        def forward(x):
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=precision_on('cpu', precision) == 'bf16'): return torch.nn.Sequential.forward(model, x).float()
        model.forward = forward
    run = torch.compile(model) if compiled else model
    x, y, loss, opt = torch.randn(bs, 1, size, size), torch.rand(bs, 6).round(), LabelLoss(Recipe('switch')), torch.optim.AdamW(model.parameters(), foreach=True)
    def step():
        loss(run(x), y).backward()
        opt.step()
        opt.zero_grad()
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()
    start, n = time.perf_counter(), 0
    while n < 2 or time.perf_counter() - start < seconds: step(); n += 1
    return (time.perf_counter() - start)*1e3/n/bs, first

SWITCHES = dict(channels_last=('channels last', dict(channels_last=False)), bf16=(f"'auto', here {precision_on('cpu')}, against fp32", dict(precision='fp32')),
                fp16=(f"'auto', here {precision_on('cpu')}, against fp16", dict(precision='fp16')), kept=('freed memory kept', dict(kept=False)))

def measure_switches(table, job):
    for arch, size, bs in (('resnet18', 128, 32), ('resnet50', 128, 16)) if not job.quick else (('resnet18', 64, 32),):
        for name, (what, off) in SWITCHES.items():
            if name != 'bf16' and job.quick or name == 'fp16' and arch == 'resnet50': continue
            seconds = 1. if job.quick else 5.
            costs = rounds_of(1, lambda: in_child(rate, arch, size, bs, seconds=seconds)[0], lambda: in_child(rate, arch, size, bs, seconds=seconds, **off)[0], warm=False)
            table.faster(f'switch_{name}_{arch}', f'{what}, on against off: {arch}, {size} px', costs, 'ms')
        if job.quick or arch == 'resnet50': continue
        (with_it, first), (without, _) = (in_child(rate, arch, size, bs, compiled=c) for c in (True, False))
        table.faster(f'switch_compile_{arch}', f'torch.compile, on against off: {arch}, {size} px', np.array([[with_it, without]]), 'ms')
        table.note(f'torch.compile: the first step of {arch} took {first:.0f} s')

# The whole recipe

def small(recipe): # Of Khandelwal et al., cut to what phantoms and two cores allow: batches and rates an eighth, random weights, no blur (fastai has none)
    return replace(recipe, pretrained=False, blur=0., batch_sizes=tuple(b//8 for b in recipe.batch_sizes), lr=recipe.lr/8, lr_unfrozen=recipe.lr_unfrozen)

def plain_fastai(path, jpeg, recipe): # (seconds of the epochs, probabilities of the test slices [n, 5])
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy_multi, aug_transforms, models, set_seed, vision_learner
    run, store = Run(path), Store(Run(path).images)
    labels, split, names = run.read('labels'), run.read('split'), store.index.index
    sides = {side: names[task_slices(recipe, store.index, labels, split, side)] for side in ('train', 'valid', 'test')}
    frame = pd.concat([pd.DataFrame(dict(name=[f'{i}.jpg' for i in sides[s]], is_valid=s == 'valid', labels=labels.loc[sides[s], list(TYPES)].apply(lambda r: ';'.join(r.index[r]), axis=1).values))
                       for s in ('train', 'valid')])
    def loaders(size, bs):
        turned = aug_transforms(do_flip=True, max_rotate=15, p_affine=1., max_zoom=1., max_lighting=0., max_warp=0.)
        return ImageDataLoaders.from_df(frame, path=jpeg, label_col='labels', label_delim=';', valid_col='is_valid', item_tfms=Resize(size), batch_tfms=turned, bs=bs, num_workers=0, device='cpu')
    set_seed(0)
    first, *rest = zip(recipe.sizes, recipe.batch_sizes, recipe.epochs)
    learn = vision_learner(loaders(*first[:2]), getattr(models, recipe.arch), pretrained=False, metrics=accuracy_multi, wd=recipe.wd)
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.freeze()
        learn.fit_one_cycle(recipe.frozen_epochs, recipe.lr)
        learn.unfreeze()
        learn.fit_one_cycle(first[2], recipe.lr_unfrozen)
        for size, bs, epochs in rest:
            learn.dls = loaders(size, bs)
            learn.fit_one_cycle(epochs, recipe.lr_unfrozen)
        seconds = time.perf_counter() - start
        dl = learn.dls.test_dl([Path(jpeg)/f'{i}.jpg' for i in sides['test']])
        probabilities = learn.get_preds(dl=dl)[0].numpy()
    order = [list(learn.dls.vocab).index(t) if t in learn.dls.vocab else None for t in TYPES]
    return seconds, np.stack([probabilities[:, i] if i is not None else np.zeros(len(probabilities)) for i in order], 1), list(sides['test'])

def our_recipe(path, recipe):
    from ich_fastai.run import run_recipe
    shutil.rmtree(Run(path).model(recipe.name), ignore_errors=True)
    predictions = run_recipe(path, recipe)
    return pd.read_csv(Run(path).model(recipe.name)/'history.csv')['seconds'].sum(), predictions

def interval(ours, theirs, truth, patients, n=2000): # 95 % interval of our accuracy_multi minus theirs, patients drawn with replacement
    gain = (((ours > 0.5) == truth).mean(1) - ((theirs > 0.5) == truth).mean(1))
    sums = pd.DataFrame(dict(gain=gain, n=1)).groupby(np.asarray(patients)).sum().to_numpy()
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(n, len(sums)))].sum(1)
    return np.quantile(drawn[:, 0]/drawn[:, 1], [0.025, 0.975])

def measure_recipe(table, job):
    recipe = small(get_recipe('khandelwal_resnet50_progressive'))
    if job.quick: recipe = replace(recipe, arch='resnet18', sizes=(64,), batch_sizes=(16,), epochs=(1,), frozen_epochs=1)
    theirs, p, images = in_child(plain_fastai, job.run.path, job.hist_jpeg, recipe)
    truth, patients = job.run.read('labels').loc[images, list(TYPES)].to_numpy(), job.store.index.loc[images, 'PatientID']
    table.note(f'progressive recipe of Khandelwal et al. on phantoms: {len(images)} test slices with a bleed, of {patients.nunique()} patients; batches and rates an eighth of the published, random weights')
    for precision in 'fp32', 'auto':
        seconds, predictions = in_child(our_recipe, job.run.path, replace(recipe, name=f'progressive_{precision}', precision=precision))
        ours = predictions.loc[images, list(TYPES)].to_numpy()
        said = precision if precision == 'fp32' else f'{precision} ({precision_on("cpu")})'
        table.faster(f'recipe_{precision}', f'progressive recipe of Khandelwal et al., {said}, against plain fastai, fp32', np.array([[seconds, theirs]]), 's')
        if patients.nunique() < 8: continue  # Too few for an interval
        low, high = interval(ours, p, truth, patients)
        accuracy = [((q > 0.5) == truth).mean() for q in (ours, p)]
        table.note(f'accuracy_multi, {said}: {accuracy[0]:.3f}, plain fastai {accuracy[1]:.3f}; difference {accuracy[0] - accuracy[1]:+.3f}, 95 % interval by patients {low:+.3f} to {high:+.3f}: '
                   + ('no worse' if high >= 0 else 'WORSE'))
        table.figures |= {f'recipe_{precision}_low': round(float(low), 4), f'recipe_{precision}_high': round(float(high), 4)}

# A study's prediction

def measure_study(table, job):
    from ich_fastai.bundle import Bundle
    from ich_fastai.phantom import plan_studies, write_study
    from ich_fastai.predict import predict_study
    study = replace(plan_studies(4, seed=0)[0], odd_size=False, truncated=0, no_suffix=0)
    write_study(study, job.folder/'study')
    files = sorted((job.folder/'study'/'stage_2_train').iterdir())
    files = (files*2)[:36] if len(files) < 36 else files[:36]
    copies = [job.folder/'study'/f'{i}.dcm' for i in range(len(files))]
    import pydicom
    for i, (f, copy) in enumerate(zip(files, copies)): # A study may have fewer slices: then some stand in it twice, with their own identifiers
        ds = pydicom.dcmread(f)
        ds.SOPInstanceUID = f'ID_{i:09d}'
        ds.save_as(copy)
    recipe = Recipe('study', pretrained=False)
    for precision in 'auto', 'fp32':
        model, spent = create_model(replace(recipe, precision=precision)).eval(), []
        forward = Net.forward
        def timed(x):
            start = time.perf_counter()
            out = forward(model, x)
            spent.append(time.perf_counter() - start)
            return out
        model.forward = timed
        bundle = Bundle(model, recipe, job.bins, 256, dict(store_size=256))
        shares = []
        for _ in range(2 if job.quick else 7):
            spent.clear()
            start = time.perf_counter()
            slices, _ = predict_study(bundle, copies)
            seconds = time.perf_counter() - start
            shares.append((len(slices)/seconds, sum(spent)/seconds))
        per_second, share = np.median(shares[1:], axis=0)
        said = precision_on('cpu', precision)
        table._add(f'study_{precision}', (f'study of {len(slices)} DICOM files (512 px) to probabilities, resnet18, 256 px, {said}: slices a second', f'{per_second:.1f}', '', '', ''), None, ours=per_second)
        table._add(f'study_share_{precision}', (f'of that time in the model, {said}', f'{share:.1%}', '', '', '>= 80 %'), share >= 0.8, ours=share)

# Memory

def times_as_large(source, dest, n): # A run folder of n times as many slices: hard links to the pictures, names of their own
    store, run, big = Store(source.images), Run(source), Run(dest, create=True)
    parts = store.index['part'].max() + 1
    for size in store.sizes:
        (big.images/str(size)).mkdir(parents=True)
        for path in (source.images/str(size)).glob('part-*.npy'):
            for k in range(n): os.link(path, big.images/str(size)/f'part-{int(path.stem[5:]) + k*parts:05d}.npy')
    def again(frame, k):
        frame = frame.set_axis([f'{i}-{k}' for i in frame.index]).rename_axis(frame.index.name)
        for c in {'PatientID', 'StudyInstanceUID', 'SeriesInstanceUID'} & set(frame): frame[c] = [f'{v}-{k}' for v in frame[c]]
        return frame.assign(part=frame['part'] + k*parts) if 'part' in frame else frame
    for name in 'index', 'labels', 'split':
        frame = run.read(name)
        larger = pd.concat([again(frame, k) for k in range(n)])
        larger.attrs = frame.attrs
        big.write(name, larger)
    return big

def resident(path): # MiB of anonymous memory after an epoch, slices in it, the most resident at all
    import resource
    recipe = Recipe('memory', arch='alexnet', pretrained=False, sizes=(64,), batch_sizes=(64,), epochs=(1,))
    learn = make_learner(path, recipe)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    anonymous = next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('RssAnon'))/1024
    return anonymous, len(learn.dls.train_ds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def measure_memory(table, job):
    base = times_as_large(job.run, job.folder/'base', 2 if job.quick else 8)
    large = times_as_large(base, job.folder/'large', 10)
    (one, n, peak), (ten, n10, peak10) = in_child(resident, base.path), in_child(resident, large.path)
    table.within('memory', f'memory after an epoch, mapped pages aside: {n10:,} training slices against {n:,}', np.array([[ten, one]]), 'MiB', 1.1)
    table.note(f'memory with mapped pages, at most: {peak10:,.0f} MiB and {peak:,.0f} MiB')

# A GPU

def measure_gpu(table, job):
    if not torch.cuda.is_available(): return table.note('not measured on a GPU')
    bs = 256
    positions = np.tile(np.arange(len(job.store)), -(-100_000//len(job.store)))[:100_000]
    recipe = Recipe('gpu', arch='resnet50', pretrained=False, precision='bf16')
    loader = make_loader(job.store, recipe, job.bins, positions, 256, bs, seed=0)
    start = time.perf_counter()
    for i, _ in enumerate(loader):
        if i == 100: break
    torch.cuda.synchronize()
    table.note(f'GPU: loader alone, 256 px: {bs*100/(time.perf_counter() - start):,.0f} slices/s')
    torch.cuda.reset_peak_memory_stats()
    costs = rounds_of(5, *real_and_held(job, 'resnet50', 256, bs, 5.))
    table.within('gpu_step', f'GPU: step on real batches against a held one: resnet50, 256 px, {bs} a step', costs, 'ms', 1/0.9)
    table.note(f'GPU: {bs*1e3/np.median(costs[:, 0]):,.0f} slices/s in training, peak memory {torch.cuda.max_memory_allocated()/2**30:.1f} GiB')
    for size, n in (64, 512), (128, 256), (256, 256):
        learn = make_learner(job.run, replace(recipe, name=f'gpu_{size}', sizes=(size,), batch_sizes=(n,)))
        learn.create_opt()
        learn.model.train()
        batches = forever(make_loader(job.store, recipe, job.bins, positions, size, n, np.zeros((len(positions), 6)), seed=0))
        step = stepper(learn, batches)
        step(5)
        table.note(f'GPU: an epoch over 100,000 slices at {size} px: {step(100_000//n):.1f} s')

# All of it

SECTIONS = dict(loader=measure_loader, step=measure_step, busy=measure_busy, study=measure_study, memory=measure_memory, switches=measure_switches, recipe=measure_recipe, gpu=measure_gpu)
PACKAGES = 'fastai', 'torch', 'torchvision', 'numpy', 'pillow'
NOTE = ('Medians over rounds in which the sides take turns, ratio by round; switches, recipe and memory: one round, each side in a process of its own. The loader: one core, CPU time a slice, fastai over the same slices as JPEG of 256 px. All else: by the clock, on all cores. '
        'Networks start from random weights; the slices are phantoms.')

def prepare(args, folder): # What the sections share
    run = phantom_run(folder/'run', n_studies=8 if args.quick else 36, size=256)
    if not args.quick: run.write('split', split_patients(run.read('labels'), run.read('metadata'), test=0.4))  # More patients to compare recipes on
    store = Store(run.images)
    bins = hist_bins(store, np.arange(len(store)))
    jpeg, hist_jpeg = export_images(store, folder/'jpeg'), export_images(store, folder/'jpeg', bins=bins)
    return SimpleNamespace(folder=folder, run=run, store=store, bins=bins, jpeg=jpeg, hist_jpeg=hist_jpeg, quick=args.quick)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='a few sizes and rounds; under two minutes')
    p.add_argument('--only', choices=SECTIONS, help='one section')
    p.add_argument('--write', action='store_true', help='write bench/results/training.md, as a full run always does')
    p.add_argument('--json', action='store_true', help='one JSON object on the last line')
    args = p.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory(prefix='training-') as folder:
        job = prepare(args, Path(folder))
        for name in [args.only] if args.only else SECTIONS: SECTIONS[name](table, job)
    lines = about('training', PACKAGES, NOTE)
    print('', *lines, '', table.text(), sep='\n')
    if args.write or not (args.quick or args.only): write_page('training', 'Training, measured', lines, table)
    if args.json: print(json.dumps(table.figures))
