"What each habit of training gives on phantoms: one field changed at a time, against the same recipe without it"
import argparse, json, os, tempfile, warnings
os.environ['ICH_QUIET'] = '1'  # No progress bars
warnings.filterwarnings('ignore')
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from ich_fastai.core import Run
from ich_fastai.intake import phantom_run
from ich_fastai.intervals import Behind, difference_interval, of_split, resampled
from ich_fastai.labels import split_patients
from ich_fastai.recipes import Recipe
from ich_fastai.run import run_recipe
from sides import about

BASE = Recipe('base', view='windows', arch='resnet18', pretrained=False, sizes=(64,), batch_sizes=(32,), epochs=(4,), lr=3e-3)
METRICS = dict(weighted_log_loss='log loss', auroc='AUROC of any')
FIELDS = dict(cosine=dict(schedule='cosine'), body_lr=dict(body_lr=.1), clip=dict(clip=1.), smoothing=dict(smoothing=.1), focal=dict(focal=2.),
              ema=dict(ema=.99), best_epoch=dict(best_epoch=True), patience=dict(best_epoch=True, patience=2), tta=dict(tta=True))

def heads(path, n): # Of which a fifth of the patients validate and two fifths test; as they are where they are there
    if (path/'images'/'index.parquet').exists(): return Run(path)
    run = phantom_run(path, n_studies=n)
    run.write('split', split_patients(run.read('labels'), run.read('metadata'), valid=.2, test=.4))
    return run

def measured(run, recipe, seeds, metric): # [1001, seeds]: a metric of the test slices and its resamples by patient, the same for every recipe
    labels = run.read('labels')
    def one(seed):
        values = resampled(*of_split(run_recipe(run, recipe, seed=seed), labels), metric)
        return values['any'] if metric == 'auroc' else values.iloc[:, 0]
    return np.column_stack([one(seed) for seed in seeds])

def line_of(ours, base, k): # By metric the mean over seeds, and of its difference to the base with the 95 % interval by patient, `k` of whom bleed
    cells, whom = {}, Behind(k, k - 1.)
    for metric, called in METRICS.items():
        change = (ours[metric] - base[metric]).mean(1)
        low, high = difference_interval(change[0], whom.standard_error(change[1:]), whom)
        cells |= {called: f'{ours[metric][0].mean():.4f}', f'change of {called}': f'{change[0]:+.4f} ({low:+.4f} to {high:+.4f})'}
    return cells

def markdown(rows):
    cells = [[rows.index.name, *rows.columns], ['---']*(1 + len(rows.columns)), *([name, *row] for name, row in zip(rows.index, rows.to_numpy()))]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in cells)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='fewer heads, one seed, two epochs; under two minutes')
    p.add_argument('--write', action='store_true', help='write bench/results/ablation.md, as a full run always does')
    p.add_argument('--folder', help='a folder that keeps what is trained, so that an interrupted run goes on; a temporary one where it is not given')
    p.add_argument('--json', action='store_true', help='one JSON object on the last line')
    args = p.parse_args()
    seeds, base = (range(1), replace(BASE, epochs=(2,))) if args.quick else (range(2), BASE)
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory(prefix='ablation-') as folder:
        run = heads(Path(folder)/'run', 16 if args.quick else 48)
        split = run.read('split')
        values = {}
        for name, fields in dict(base={}, **FIELDS).items():
            recipe = replace(base, name=name, **fields)
            values[name] = {metric: measured(run, recipe, seeds, metric) for metric in METRICS}
            print(name, {metric: round(float(v[0].mean()), 4) for metric, v in values[name].items()}, flush=True)
        labels = run.read('labels').loc[split.index]
    k = split.PatientID[(split['split'] == 'test') & labels['any']].nunique()
    rows = pd.DataFrame({name: line_of(values[name], values['base'], k) for name in values}).T.rename_axis('field')
    note = f'{(split.split == "train").sum():,} training and {(split.split == "test").sum():,} test slices of {split[split.split == "test"].PatientID.nunique()} test patients ({k} with a bleed), all synthetic; {len(seeds)} seeds; {base}'
    lines = about('ablation', ('fastai', 'torch'), note)
    text = '\n\n'.join(['# What each habit of training gives on phantoms', *lines, 'Change: mean over seeds of the difference to `base`, with its 95 % interval by patient.', markdown(rows)])
    print(text)
    if args.write or not args.quick: (Path(__file__).parent/'results'/'ablation.md').write_text(text + '\n')
    if args.json: print(json.dumps({f'{name}_{metric}': float(v[0].mean()) for name, of in values.items() for metric, v in of.items()}))
