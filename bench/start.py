"What the shipped model is worth as a start: few studies to learn from, with its weights and with random ones; phantoms of another seed and prevalence"
import argparse, json, os, tempfile, warnings
os.environ['ICH_QUIET'] = '1'  # No progress bars
warnings.filterwarnings('ignore')
from dataclasses import replace
from pathlib import Path

import pandas as pd
from ich_fastai.data import Data, make_loader
from ich_fastai.intake import phantom_run
from ich_fastai.intervals import difference, intervals, of_split
from ich_fastai.labels import split_patients
from ich_fastai.learner import make_learner, predict
from ich_fastai.masks import keep_masks
from ich_fastai.recipes import get_recipe
from ablation import markdown
from sides import about

def heads(path, n): # A run folder, of whose patients half test
    run = phantom_run(path, n_studies=n, size=128, seed=99)
    keep_masks(run, run.path/'phantoms'/'truth')
    run.write('split', split_patients(run.read('labels'), run.read('metadata'), valid=.08, test=.5))
    return run

def with_few(run, n): # Its data with only `n` of the training patients
    data = Data(run)
    trains = data.split['split'] == 'train'
    chosen = data.split.loc[trains, 'PatientID'].drop_duplicates().iloc[:n]
    data.split = data.split[~trains | data.split['PatientID'].isin(chosen)]
    return data

def tested(data, recipe): # (predictions, labels) of the test slices
    learn = make_learner(data, recipe)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(recipe)
    told = predict(learn.model, recipe, make_loader(data.store, recipe, learn.dls.bins, data.labelled, recipe.sizes[-1]))
    return of_split(data.predictions(recipe, told), data.labels, kept=True)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='8 heads in all, one epoch; under two minutes')
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--json', action='store_true', help='one JSON object on the last line')
    args = p.parse_args()
    counts, epochs = ((3,), 1) if args.quick else ((6, 12, 24), args.epochs)
    base = replace(get_recipe('phantom'), epochs=(epochs,), ema=0.)  # An average of so few steps is that of the start
    table, figures = {}, {}
    with tempfile.TemporaryDirectory(prefix='start-') as folder:
        run = heads(Path(folder)/'run', 8 if args.quick else 60)
        for n in counts:
            (fresh, truth), (begun, _) = (tested(with_few(run, n), replace(base, name=name, pretrained=start)) for name, start in (('random', False), ('shipped', 'phantom')))
            ours, theirs, gain = (frame.loc['any'] for frame in (intervals(begun, truth), intervals(fresh, truth), difference(begun, fresh, truth)))
            table[str(n)] = dict(random=f'{theirs.estimate:.3f} ({theirs.low:.3f} to {theirs.high:.3f})', shipped=f'{ours.estimate:.3f} ({ours.low:.3f} to {ours.high:.3f})', gain=f'{gain.estimate:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})')
            figures |= {f'random_{n}': theirs.estimate, f'shipped_{n}': ours.estimate}
            print(n, table[str(n)], flush=True)
    print(*about('start', ('torch',), 'AUROC of any by slice on the test phantoms, 95 % intervals by patient'), markdown(pd.DataFrame(table).T.rename_axis('training patients')), sep='\n\n')
    if args.json: print(json.dumps(figures))
