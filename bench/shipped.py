"What each part of the shipped model's training is worth: one more a row, on phantoms and on real heads that no row has seen, paired with the row before"
import argparse, json, os, warnings
os.environ['ICH_QUIET'] = '1'  # No progress bars
warnings.filterwarnings('ignore')
from dataclasses import replace
from pathlib import Path

import pandas as pd
from ich_fastai.core import Run
from ich_fastai.external import other_predictions
from ich_fastai.intake import teaching_run
from ich_fastai.intervals import difference, intervals, of_split
from ich_fastai.recipes import get_recipe
from ich_fastai.run import run_recipe
from ablation import markdown
from sides import about

PLAIN = dict(masks=0., brain_hu=0., intensity=0., clipped=0., elastic=0., shift=0., shear=0., zoom=0., tta=False)
MORE = dict(plain={}, randomized=('intensity', 'clipped', 'elastic', 'shift', 'shear', 'zoom'), brightness=('brain_hu',), masks=('masks',), mirrored=('tta',))

def ladder(epochs, phantoms): # By row, the recipe with all that came before it
    whole = get_recipe('phantom')
    values, rows = dict(PLAIN), {}
    for name, fields in MORE.items():
        values |= {field: getattr(whole, field) for field in fields}
        rows[name] = replace(whole, name=f'phantom-{name}-{epochs}ep', epochs=(epochs,), phantoms=phantoms or whole.phantoms, **values)
    return rows

def told(run, recipe, others): # By set of heads: (predictions, labels) of the slices with enough brain
    def kept(predictions, labels): return (p := predictions[predictions['kept']]), labels.loc[p.index]
    found = {'phantoms': of_split(run_recipe(run, recipe), run.read('labels'), kept=True)}
    return found | {Path(other).name: kept(other_predictions(run.model(recipe.name)/'bundle', other), Run(other).read('labels')) for other in others}

def cells(now, before): # AUROC of any on each set, and its difference to the row before
    row = {}
    for name, (p, t) in now.items():
        of_any = intervals(p, t, 'auroc').loc['any']
        row[name] = f'{of_any.estimate:.3f} ({of_any.low:.3f} to {of_any.high:.3f})'
        if not before: continue
        change = difference(p, before[name][0], t, 'auroc').loc['any']
        row[f'{name}, change'] = f'{change.estimate:+.3f} ({change.low:+.3f} to {change.high:+.3f})'
    return row

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('run', help='a run folder for the phantoms, made where it is missing; it keeps what is trained, so that an interrupted run goes on')
    p.add_argument('others', nargs='*', help='run folders of real heads with labels, cleaned at 128 px')
    p.add_argument('--epochs', type=int, default=2)
    p.add_argument('--quick', action='store_true', help='24 studies, one epoch; under two minutes')
    p.add_argument('--json', action='store_true', help='one JSON object on the last line')
    args = p.parse_args()
    rows = ladder(1 if args.quick else args.epochs, 24 if args.quick else 0)
    run = Run(args.run) if Path(args.run, 'images', 'index.parquet').exists() else teaching_run(args.run, rows['plain'])
    table, before = {}, None
    for name, recipe in rows.items():
        now = told(run, recipe, args.others)
        table[name], before = cells(now, before), now
        print(name, table[name], flush=True)
    lines = about('shipped', ('torch',), 'AUROC of any by slice, 95 % intervals by patient; change: to the row before, paired')
    print(*lines, markdown(pd.DataFrame(table).T.fillna('').rename_axis('with')), sep='\n\n')
    if args.json: print(json.dumps(table))
