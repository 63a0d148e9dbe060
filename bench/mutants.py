"One-line faults put into the library: does the chapter's own test notice each of them?"
import argparse, csv, inspect, json, os, shutil, signal, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path
from queue import Queue
from time import perf_counter
from types import FunctionType, ModuleType
from typing import NamedTuple

from sides import about

ROOT = Path(__file__).parent.parent
RESULTS = ROOT/'bench'/'results'/'mutants.csv'  # What each fault came to, when it was last run; a rerun of some chapters updates their rows
LIMIT = 1500  # Seconds for a chapter; a fault that makes it run longer is noticed

class Mutant(NamedTuple):
    room:str   # A notebook
    right:str  # Code that stands in its export cells once
    wrong:str  # What takes its place
    fault:str  # In words

_faults = {
    '10_dicom': [
        ('values*scale.slope + scale.intercept', 'values*scale.slope - scale.intercept', 'sign of the intercept'),
        ('WRAP*(values >= WRAPPED_AIR)', 'WRAP*(values > WRAPPED_AIR)', 'off by one in the repair'),
        ('(hu > window.level - half) & (hu < window.level + half)', '(hu >= window.level - half) & (hu < window.level + half)', "the window's lower end counts"),
        ('return values if within else values << 16-stored >> 16-stored', 'return values', 'unused bits stay'),
        ('data[(frame-1)*size:frame*size]', 'data[:size]', 'always the first frame'),
        ('img_std=(n*s2 - s*s)**.5/n', 'img_std=(n*s2 - s*s)**.5/(n - 1)', 'deviation of a sample')],
    '10b_series': [
        ('return normals*np.where(main < 0, -1, 1)', 'return normals', 'the sign of the axes counts'),
        ('np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)', 'np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1', 'slice numbers off by one'),
        ('pd.factorize(codes[0]*(codes[1].max(initial=0) + 1) + codes[1])[0]', 'codes[1]', 'series of two studies as one'),
        ('thickness[order][1:] > THICKER*thickness[order][:-1]', 'thickness[order][1:] > thickness[order][:-1]', 'any thickness apart'),
        ('if sight.body > 1.5*BODY', 'if sight.body > 150*BODY', 'a pelvis is a head')],
    '10c_gray': [
        ('np.maximum(other, high)', 'np.minimum(other, high)', 'the second window is lost'),
        ('window.level - window.width/2, window.level + window.width/2', 'window.level - window.width, window.level + window.width', 'windows twice as wide'),
        ('(off > 16).mean() > .001', '(off > 16).mean() > .9', 'color images pass')],
    '11_metadata': [
        ('kept = frame.img_pct_window >= MIN_BRAIN', 'kept = frame.img_pct_window >= 0', 'empty slices are kept'),
        ('first &= codes >= 0', 'first &= codes > 0', 'the first image is lost'),
        ('rows, frame = rows[order], frame.iloc[order].reset_index(drop=True)', 'frame = frame.iloc[order].reset_index(drop=True)', 'rows in another order than their keys')],
    '12_labels': [
        ('label[ends], length[ends] = i, len(name) + 1', 'label[ends], length[ends] = (i + 1) % 6, len(name) + 1', 'labels shifted by a column'),
        ('((ones > 0) & (ones < rows))[cell]', '((ones > 1) & (ones < rows))[cell]', 'contradictions pass'),
        ('return people(metadata)[_named_in(metadata.index, labels.index)]', "return metadata['PatientID'][_named_in(metadata.index, labels.index)]", 'a study of two PatientIDs on two sides'),
        ('_draw(profile.to_numpy(), test, seed), valid', '_draw(profile.to_numpy(), test, 0), valid', 'seed ignored'),
        ('valid/(1 - test), seed)', 'valid, seed)', 'too few patients in valid'),
        ('leaks = int((sides > 1).sum())', 'leaks = int((sides > 2).sum())', 'patients on two sides pass'),
        ("rarest_first = np.argsort(types.sum(axis=0), kind='stable')", "rarest_first = np.argsort(-types.sum(axis=0), kind='stable')", 'a slice counts for its most frequent type'),
        ("(types == 0) & (slices == 'all')", "(types == 0)", 'negatives in the bleeding slices')],
    '13_clean': [
        ('row=at%SLICES_A_PART, kept=metadata.img_pct_window >= min_brain', 'row=at%SLICES_A_PART, kept=metadata.img_pct_window >= MIN_BRAIN', 'min_brain ignored'),
        ('return {s: np.rint(part/total)', 'return {s: np.floor(part/total)', 'HU rounded down'),
        ('out = np.full((side, side), -1000, np.int16)', 'out = np.full((side, side), 0, np.int16)', 'water where there is air'),
        ('> .05*WINDOWS', '> .5*WINDOWS', 'a smaller head'),
        ('out[y0-top:y0-top+part.shape[0]', 'out[0:part.shape[0]', 'the crop is moved'),
        ("for row, out in zip(rows, into): out[:] = pictures[row]", "for row, out in zip(sorted(rows), into): out[:] = pictures[row]", 'rows in another order')],
    '14_explore': [
        ("np.divide(both, np.diag(both)[:, None]", "np.divide(both, np.diag(both)[None]", 'share of the column for that of the row'),
        ('patients=by.PatientID.nunique()', 'patients=by.StudyInstanceUID.nunique()', 'studies for patients'),
        ('below.loc[both][labels.loc[both, l]]', 'below.loc[both][labels.loc[both, l].shift(fill_value=False)]', 'labels shifted by a slice'),
        ("by.sort_values(['bleeds', 'slices'], kind='stable').index[-1]", "by.sort_values(['bleeds', 'slices'], kind='stable').index[0]", 'the study with the fewest bleeds'),
        ('(i % columns + .04)*size, (i//columns', '((i + 1) % columns + .04)*size, (i//columns', 'names beside their slice'),
        ('order[max(0, at - n):at + n]', 'order[max(0, at - n + 1):at + n + 1]', 'off by one at the threshold'),
        ('(left - .5, top - .5)', '(top - .5, left - .5)', 'axes exchanged'),
        ("step['max'] > 1.5*step['median']", "step['max'] > 1.5*step['min']", 'gaps against the smallest step')],
    '15_page': [
        ("labels['any'].reindex(images, fill_value=False)", "labels['any'].reindex(images[::-1], fill_value=False).to_numpy()", 'labels in another order'),
        ('[PHANTOM_BANNER]*is_phantom(run)', '[]', 'phantoms without a word'),
        ('images[len(images)//2]', 'images[0]', 'the first slice for the middle one')],
    '16_intake': [
        ('split = split_patients(labels, frame, seed=seed, **dict(shares))', 'split = split_patients(labels, frame, **dict(shares))', 'seed ignored'),
        ('seed=seed, **dict(shares))', 'seed=seed)', 'shares ignored'),
        ('clean_images(frame, run.images, size, min_brain=min_brain, **options)', 'clean_images(frame, run.images, size, **options)', 'min_brain ignored'),
        ('refuse(labels=labels, split=split)', 'None', 'models are voided without a word')],
    '19_loss': [
        ("torch.tensor([2. if", "torch.tensor([1. if", 'any weighs as much as a type'),
        ('targ = targ*(1 - smoothing) + smoothing/2', 'targ = targ*(1 - smoothing) + smoothing', 'smoothed upwards'),
        ('if inp.requires_grad else (0., 0.)', 'if True else (0., 0.)', 'validation is smoothed too'),
        ('[..., -len(recipe.labels):]', '[..., :len(recipe.labels)]', 'the probability of the other class')],
    '20_data': [
        ("split['split'].reindex(index.index).isin(L(side))", "split['split'].reindex(index.index).notna()", 'every side of the split'),
        ('return own[~aside]', 'return own', 'learns from what validates'),
        ("return task_slices(recipe, index, labels, split, 'valid')", "return task_slices(recipe, index, labels, split, 'test')", 'validates on test'),
        ('hist_bins(self.store, self._training(), size=source)', 'hist_bins(self.store, np.arange(len(self.store)), size=source)', 'bins from all slices'),
        ('same = series[1:] == series[:-1]', 'same = series[1:] == series[1:]', 'neighbors of other series'),
        ('(part + 1024).flatten()', '(part + 1023).flatten()', 'look-up off by one HU'),
        ('reindex(self.index.index, fill_value=False)', 'reindex(self.index.index[::-1], fill_value=False)', 'targets in another order'),
        ("random.Random(f'{self.seed} {epoch}')", "random.Random(f'{epoch}')", 'seed ignored'),
        ('self.rotate*pi/180', 'self.rotate*pi/90', 'turned twice as far'),
        ('order, split_idx = -1, 0  # Before', 'order, split_idx = -1, None  # Before', 'validation is augmented'),
        ('targets[side], s, device', 'targets[side[::-1]], s, device', "targets of other slices")],
    '20b_block': [
        ('freqhist_bins(counts)', 'freqhist_bins(counts[::-1])', 'bins of another histogram'),
        ('resized(crop(hu, head_box(hu)), [self.size])', 'resized(hu, [self.size])', 'no crop')],
    '21_metrics': [
        ("WEIGHTS = np.array([2. if", "WEIGHTS = np.array([1. if", 'any weighs as much as a type'),
        ('return _share(called & t, called, weights)', 'return _share(called & t, t, weights)', 'recall for precision'),
        ('below[:, left] + below[:, right]', '2*below[:, left]', 'ties lose'),
        ('return p > threshold, t', 'return p >= threshold, t', 'the threshold itself is called'),
        ('p.clip(1e-15, 1 - 1e-15)', 'p.clip(1e-6, 1 - 1e-6)', 'another clip'),
        ('self.times[start:start + few][:, self.patient[order]]', 'self.times[start:start + few][:, self.patient]', 'weights in another order')],
    '21b_study': [
        ("np.arange(len(p)) - starts[study] < k", "np.arange(len(p)) - starts[study] <= k", 'one slice more'),
        ("better = table[table['over_max'] < -table['se']]", "better = table[table['over_max'] < 0]", 'any luck is better'),
        ("learn_rule(predictions[of_slices != i], labels[of_slices != i], k)", "learn_rule(predictions, labels, k)", 'learned from whom it tells'),
        ("slices = predictions[predictions['kept'].to_numpy(bool)]", "slices = predictions", 'slices without brain count'),
        ("return labels.groupby(studies).any()", "return labels.groupby(studies).all()", 'a study bleeds on every slice')],
    '21c_operating': [
        ('np.argmax(recall - alarms)', 'np.argmax(recall)', 'no false alarm counts'),
        ('np.flatnonzero(1 - alarms >= specificity).max(initial=-1)', 'np.flatnonzero(1 - alarms >= specificity).min(initial=99)', 'the least sensitivity'),
        ('(scores[i] + lower)/2', 'scores[i]', 'the threshold itself is not called'),
        ('expit(slope*log_odds(p.astype(np.float64)) + intercept)', 'expit(slope*log_odds(p.astype(np.float64)) - intercept)', 'sign of the intercept'),
        ('now/(1 - now)*(1 - before)/before', 'before/(1 - before)*(1 - now)/now', 'the other way round'),
        ('(1 - specificity)*(1 - prevalence)', '(1 - specificity)*prevalence', 'alarms among the bleeding')],
    '22_models': [
        ('head[-1].__class__ = Float32Linear', 'head[-1].__class__ = nn.Linear', 'logits in half precision'),
        ('nn.Flatten(), nn.Dropout(p), nn.Linear(nf, n_out))', 'nn.Flatten(), nn.Dropout(0.), nn.Linear(nf, n_out))', 'dropout ignored'),
        ('layers[:pools[2]]', 'layers[:pools[1]]', 'a block fewer is frozen'),
        ('lambda maps: maps.mean((2, 3))', 'lambda maps: maps.amax((2, 3))', 'maximum for mean')],
    '22b_learner': [
        ('lr=recipe.lr or 1e-3, wd=recipe.wd', 'lr=recipe.lr or 1e-3, wd=.01', 'weight decay ignored'),
        ('sqr_mom=recipe.sqr_mom, eps=recipe.eps', 'sqr_mom=recipe.sqr_mom, eps=1e-5', 'eps ignored'),
        ('mom=recipe.mom, sqr_mom', 'mom=.9, sqr_mom', 'momentum ignored'),
        ('rho=0.95', 'rho=0.9', "torch's rho"),
        ('(said(*xs) + said(*(x.flip(-1) for x in xs)))/2', '(said(*xs) + said(*(x.flip(-2) for x in xs)))/2', 'upside down for left to right'),
        ("at = list(labels).index('any')", 'at = 0', 'epidural for any'),
        ('dls = _loaders(run, recipe, size, bs, seed)\n    set_seed(seed)', 'dls = _loaders(run, recipe, size, bs, seed)\n    set_seed(0)', 'seed of the weights ignored'),
        ('return true.T.astype(int) @ called.astype(int)', 'return called.T.astype(int) @ true.astype(int)', 'rows and columns exchanged')],
    '22c_checkpoints': [
        ("_set_random_state(state['random'])", 'None', 'chances are not resumed'),
        ('if loss < self.best:', 'if loss > self.best:', 'the worst epoch is kept'),
        ('split=_hashed(split))', 'split=_hashed(labels))', 'another split passes'),
        ('(s, e) < at', '(s, e) <= at', 'a log line too many')],
    '23_train': [
        ('np.geomspace(stage.lr*stage.body_lr, stage.lr,', 'np.geomspace(stage.lr, stage.lr,', "the body's rate ignored"),
        ('self.rates*self.decay**self.epoch', 'self.rates', 'no decay'),
        ('1 - min(self.decay, (1 + self.steps)/(10 + self.steps))', '1 - max(self.decay, (1 + self.steps)/(10 + self.steps))', 'a slower average'),
        ('self.since >= self.patience', 'self.since > self.patience', 'an epoch more of patience'),
        ('stage.bs, seed, stage.number)\n        set_seed', 'stage.bs, seed, 0)\n        set_seed', 'the same order in each stage')],
    '24_baselines': [
        ('RandomForestClassifier(200, min_samples_leaf=5, n_jobs=1, random_state=seed)', 'RandomForestClassifier(200, min_samples_leaf=5, n_jobs=1, random_state=0)', 'seed ignored'),
        ('images[_training(data, recipe, seed)], features', 'images[data.labelled], features', 'learns from test'),
        ("index=index.index).add_prefix('pc')", "index=index.index[::-1]).add_prefix('pc')", 'rows of components shuffled'),
        ('chunks = _chunks(train, bs)', 'chunks = _chunks(np.arange(len(index)), bs)', 'components from all slices'),
        ('hist_bins(data.store, train, size=size)', 'hist_bins(data.store, np.arange(len(index)), size=size)', 'bins from all slices'),
        ('brain >= brain.mean() + above', 'brain >= brain.mean() - above', 'sign'),
        ("c.startswith(_ours) or 'UID' in c", "'UID' in c", 'pixels among the headers')],
    '25_distributed': [
        ('torch.stack(shares, dim=1).flatten(0, 1)[:n]', 'torch.cat(shares)[:n]', 'rows in the order of the processes'),
        ('layer.running_var.lerp_(var*count/(count - 1), layer.momentum)', 'layer.running_var.lerp_(var, layer.momentum)', 'variance of a population'),
        ('(var + layer.eps).rsqrt()', '(var + 1e-3).rsqrt()', 'eps ignored'),
        ('return x*kept[batch.mine]/(1 - layer.p)', 'return x*kept[batch.mine]', 'dropout does not scale')],
    '25_sequence': [
        ('np.flatnonzero(np.diff(codes)) + 1)', 'np.flatnonzero(np.diff(codes)))', 'series off by a slice'),
        ('at = lengths[:, None] - 1 - t', 'at = lengths[:, None] - 2 - t', 'reversed off by one'),
        ('    dls.positions = train\n', '    dls.positions = np.concatenate([train, valid])\n', 'standardized by valid too'),
        ("for side in ('train', 'valid'))", "for side in ('train', 'test'))", 'validates on test'),
        ('src_key_padding_mask=~real', 'src_key_padding_mask=None', 'attention looks at the padding'),
        ('std = np.sqrt((squares/np.maximum(n, 1) - mean**2)', 'std = np.sqrt((squares/np.maximum(n, 1))', 'deviation from zero')],
    '26_bundle': [
        ('return model.eval()', 'return model.train()', 'dropout in prediction'),
        ('for i in range(len(recipe.parts)))', 'for i in reversed(range(len(recipe.parts))))', 'parts in another order'),
        ("self.extra.get('min_brain', MIN_BRAIN)", 'MIN_BRAIN', 'min_brain ignored'),
        ('labels=recipe.labels, size=size', 'labels=recipe.labels, size=recipe.sizes[0]', 'another size')],
    '27_run': [
        ("valid = predictions[predictions['split'] == 'valid']", "valid = predictions[predictions['split'] == 'test']", 'rule and thresholds from test'),
        ("types.mul(binary['any'], axis=0)", 'types', 'no chain rule'),
        ('np.nansum(said, 0)/np.maximum(n, 1)', 'np.nansum(said, 0)/len(members)', 'silent members count'),
        ('model.standardize(features, dls.positions)', 'model.standardize(features, data.labelled)', 'standardized by all slices'),
        ('make_loader(store, recipe, bins, data.labelled, size, recipe.batch_sizes[-1])', 'make_loader(store, recipe, bins, data.labelled[::-1], size, recipe.batch_sizes[-1])', 'predictions in another order'),
        ('headers = header_numbers(data.run.read(\'metadata\')).reindex(index.index)', 'headers = header_numbers(data.run.read(\'metadata\')).reindex(index.index[::-1])', 'headers of other slices')],
    '31_figures': [
        ('np.bincount(t*2 + called, minlength=4)', 'np.bincount(called*2 + t, minlength=4)', 'rows and columns exchanged')],
    '30_intervals': [
        ('drawn = np.random.default_rng(seed)', 'drawn = np.random.default_rng(0)', 'seed ignored'),
        ('(predictions.kept | (not kept))', '(predictions.kept | True)', 'all slices for the kept'),
        ("patient, names = pd.factorize(predictions.PatientID, sort=True)\n    draws, measure", "patient, names = pd.factorize(predictions.index, sort=True)\n    draws, measure", 'resampled by slice'),
        ('*np.sqrt(self.patients/(self.patients - 1))', '', 'no correction for few patients'),
        ('stats.t.ppf(.975, degrees)', 'stats.norm.ppf(.975)', 'normal in place of t'),
        ('rows.sum()**2/(rows**2).sum()', 'len(rows)', 'patients of unequal weight count alike'),
        ('weigh=metric in _ranks', 'weigh=False', 'degrees of freedom of all patients'),
        ('a - b, threshold, _of_differences', 'b - a, threshold, _of_differences', 'sign of the difference')],
    '31c_localization': [
        ('mask if label == \'any\' else mask >> TYPES.index(label) & 1', 'mask', 'masks of all types for one'),
        ('weights = gradients.mean((2, 3), keepdim=True)', 'weights = gradients.abs().mean((2, 3), keepdim=True)', 'what lowers an output counts too'),
        ('(areas > 0, areas == 0)', '(areas > 0, areas != 0)', 'slices whose mask is not known'),
        ('scores[~inside.any(0)]', 'scores[inside.any(0)]', 'right marks as false ones')],
    '33_published': [
        ('share/len(groups)) for group in groups] + ([(~bleeds, 1 - share)]', 'share/len(groups)) for group in groups] + ([(~bleeds, share)]', 'another balance than asked'),
        ("t & (t.sum(1) == 1)[:, None]", 't', 'slices of several types count'),
        ("transform('min' if figure.epoch == 'first' else 'max')", "transform('max')", 'the last epoch for the first'),
        ("side = 'valid' if figure.side == 'valid' else 'test'", "side = 'test'", 'test for valid')],
    '12c_masks': [
        ('has.sum(1, keepdims=True) > 1', 'has.sum(1, keepdims=True) > 2', 'a mask of two types is nobody\'s'),
        ('told.fillna(spacing**2)', 'told.fillna(spacing)', 'mm for mm²')],
    '32_judge': [
        ("valid, valid_studies = _side(models, labels, 'valid', kept=True)", "valid, valid_studies = _side(models, labels, 'test', kept=True)", 'thresholds from test'),
        ('lines = {s: calibration_line(p, valid.labels) for s, p in valid.models.items()}', 'lines = {s: calibration_line(p, test.labels) for s, p in test.models.items()}', 'recalibrated on test'),
        ("'net benefit of all': ['all']", "'net benefit of all': ['estimate']", 'the model for treating all'),
        ('mean = sum(each.values())/len(each)', 'mean = next(iter(each.values()))', 'one seed for the mean of all'),
        ('axis=0, ddof=1)', 'axis=0, ddof=0)', 'spread of too few seeds'),
        ("_studies(models, labels, 'test', rules), valid_studies", "_studies(models, labels, 'test', dict.fromkeys(models, StudyRule())), valid_studies", "the model's rule for studies ignored"),
        ('low=1 - rows.high, high=1 - rows.low', 'low=1 - rows.low, high=1 - rows.high', 'bounds exchanged'),
        ('cuts = chosen_thresholds(valid.models[seed], valid.labels)', 'cuts = chosen_thresholds(p, test.labels)', 'operating points from test'),
        ('chosen = subset(labels, recipe.slices, recipe.min_types)', "chosen = subset(labels, 'all', recipe.min_types)", 'slices of another kind'),
        ('cuts=recipe.threshold)]', 'cuts=.5)]', "the recipe's threshold ignored")],
    '32b_board': [
        ('np.arange(len(order), 0, -1)', 'np.full(len(order), len(order))', 'Bonferroni for Holm'),
        ('np.maximum.accumulate(raised)', 'raised', 'adjusted p falls'),
        ('(draws[a] - draws[b])', '(draws[b] - draws[a])', 'sign of the difference'),
        ('again = draws.iloc[1:].dropna()\n    best', 'again = draws.dropna()\n    best', 'the estimate among the resamples'),
        ('draws.iloc[0].to_numpy()[winner]', 'draws.iloc[0].max()', 'luck against the first on all patients'),
        ("transform('max')]", "transform('min')]", 'one seed for the recipe'),
        ("data = 'slices' if slices == 'all' else 'kept slices'", "data = 'slices'", 'all slices for the kept'),
        ("valid_auroc_any=f'valid {data}'", 'valid_auroc_any=data', 'test for valid'),
        ('_score=-score', '_score=score', 'the worst comes first')],
    '34_failures': [
        ('np.where(long.t, 1 - long.p, long.p)', 'np.where(long.t, long.p, 1 - long.p)', 'the best for the worst'),
        (".drop_duplicates('study')[['label', 'p', 'wrong']]", "[['label', 'p', 'wrong']]", 'several slices of a study'),
        ('missed=long.t & ~yes', 'missed=long.t & yes', 'found for missed')],
    '34b_sections': [
        ("(judged['data'] == 'kept slices') & ~judged['group']", "(judged['data'] == 'studies') & ~judged['group']", 'studies for slices'),
        ("judged[judged['data'] == data]", "judged[judged['data'] != data]", 'net benefit of the other level'),
        ('areas[areas > 0].sort_values(ascending=False)', 'areas.sort_values(ascending=False)', 'heatmaps of slices without a bleed')],
    '35_compare': [
        ("predictions.index[predictions['split'] == 'train']", "predictions.index[predictions['split'] == 'test']", 'prevalence of test'),
        ("'labels', 'split', 'index', 'metadata', 'masks'", "'labels', 'split', 'metadata', 'masks'", 'figures stay where other slices count'),
        ('seconds=sum(known', 'seconds=max(known', 'cost of one seed')],
    '36_report': [
        ("sort_values(['valid_auroc_any', 'recipe']", "sort_values(['auroc_any', 'recipe']", 'the best on test'),
        ("self.by_label('kept slices', 'threshold')", "self.by_label('studies', 'threshold')", 'thresholds of studies for slices'),
        ("self.by_label('kept slices', f'line {part}')", "self.by_label('studies', f'line {part}')", 'calibration drawn with the line of studies'),
        ("(known.every['data'] == 'published')]", "(known.every['data'] == 'own slices')]", 'published figures of other rows')],
    '37_cross_compare': [
        ('rows[~rows.index.duplicated()]', "rows[~rows.index.duplicated(keep='last')]", 'the last fold for the first'),
        ("_once(whole, 'test')", "_once(numbered[0], 'test')", 'the test side of one fold')],
    '45_external': [
        ('line = calibration_line(predictions[others], labels[others])', 'line = calibration_line(predictions[here], labels[here])', 'patients calibrated on themselves'),
        ('calibrated(predictions[others], line), labels[others])', 'calibrated(predictions[here], line), labels[here])', 'thresholds from the patients that are called'),
        ("bundle.operating(name, point)['threshold']", "bundle.operating('study', point)['threshold']", 'thresholds of studies for slices')],
    '40_predict': [
        ("kept=metadata['use'] & enough", "kept=metadata['use']", 'slices without brain count for a study'),
        ("return predict(bundle.model, bundle.recipe, series_loader(features, series_of(index", "return predict(bundle.model, bundle.recipe, series_loader(features, series_of(index[::-1]", 'series in another order'),
        ('make_loader(store, bundle.recipe, bundle.bins, np.arange(len(store.index)), bundle.size, bs)', 'make_loader(store, bundle.recipe, bundle.bins, np.arange(len(store.index)), max(store.sizes), bs)', 'another size than in training'),
        ('read_study(src, bundle.extra.get(\'store_size\', bundle.size)', 'read_study(src, bundle.size', 'images made another way than in training')],
}
MUTANTS = [Mutant(room, *fault) for room, faults in _faults.items() for fault in faults]

def cells_of(notebook): return [cell for cell in notebook['cells'] if ''.join(cell['source']).startswith('#| export')]

def module_of(notebook):
    "The file that the notebook is exported to"
    first = next(''.join(cell['source']) for cell in notebook['cells'] if ''.join(cell['source']).startswith('#| default_exp'))
    return f"ich_fastai/{first.split()[-1]}.py"

def planted(text, mutant):
    "The text with the fault in it; it must fit exactly once"
    if text.count(mutant.right) != 1: raise SystemExit(f'{mutant.room}: {mutant.right!r} stands there {text.count(mutant.right)} times: mend the list of mutants')
    return text.replace(mutant.right, mutant.wrong)

def plant(tree, mutant):
    "Put a fault into the notebook and its module; gives the files as they were"
    path = tree/'nbs'/f'{mutant.room}.ipynb'
    was = path.read_text()
    notebook = json.loads(was)
    module = tree/module_of(notebook)
    code = '\n###\n'.join(''.join(cell['source']) for cell in cells_of(notebook))
    for cell, source in zip(cells_of(notebook), planted(code, mutant).split('\n###\n')): cell['source'] = source.splitlines(keepends=True)
    before = {path: was, module: module.read_text()}
    module.write_text(planted(before[module], mutant))
    path.write_text(json.dumps(notebook))
    return before

def test(tree, room): # True where it passes
    command = [shutil.which('nbdev-test'), f'nbs/{room}.ipynb', '--n-workers', '0', '--cell-timeout', str(LIMIT)]
    env = os.environ | dict(PYTHONPATH=str(tree), MPLBACKEND='agg', PYTHONWARNINGS='ignore')
    try: return subprocess.run(command, cwd=tree, env=env, capture_output=True, timeout=LIMIT).returncode == 0
    except subprocess.TimeoutExpired: return False

def judged(trees, mutant, report):
    "Whether the chapter's test notices the fault"
    tree, start = trees.get(), perf_counter()
    before = plant(tree, mutant) if isinstance(mutant, Mutant) else {}
    try: passed = test(tree, mutant.room if before else mutant)
    finally:
        for path, text in before.items(): path.write_text(text)
        trees.put(tree)
    report(mutant, passed, perf_counter() - start)
    return passed

def shown(mutant, passed, seconds):
    what = f'{mutant.room}: {mutant.fault}' if isinstance(mutant, Mutant) else f'{mutant} as it is'
    verdict = ('SURVIVES' if passed else 'noticed') if isinstance(mutant, Mutant) else ('passes' if passed else 'FAILS')
    print(f'{verdict:9} {what} ({seconds:.0f} s)', flush=True)

# Faster: a chapter runs once, and each fault from its cell on, in a fork of the chapter's process
# A fork has no threads of the chapter's: where later cells wait for some (gloo in 25_distributed, workers in 11_metadata from its cell 36 on) a fault that survives so far takes the whole chapter

def run_cell(cell, names):
    "The exception that a cell raises, or None"
    signal.alarm(LIMIT)
    try:
        with open(os.devnull, 'w') as null, redirect_stdout(null), redirect_stderr(null):
            exec(compile(cell.source, f'cell {cell.idx_}', 'exec'), names)
    except BaseException as e: return e
    finally: signal.alarm(0)

def too_long(*_): raise TimeoutError(f'over {LIMIT} s')

def functions_of(module):
    "The functions of a module and the methods of its classes, by their names"
    own = {key: thing for key, thing in vars(module).items() if getattr(thing, '__module__', '') == module.__name__}
    methods = {(key, name): f for key, thing in own.items() if isinstance(thing, type) for name, f in vars(thing).items()}
    plain = {key: inspect.unwrap(getattr(f, 'fget', None) or f) for key, f in (own | methods).items()}
    return {key: f for key, f in plain.items() if isinstance(f, FunctionType)}

def plant_imported(mutant, module):
    "Give the functions of a module that is imported already the fault"
    name = module.removesuffix('.py').replace('/', '.')
    if name not in sys.modules: return
    faulty = ModuleType(name)
    exec(compile(planted((ROOT/module).read_text(), mutant), module, 'exec'), vars(faulty))
    wrong = functions_of(faulty)
    for key, f in functions_of(sys.modules[name]).items():
        if key in wrong and f.__code__.co_freevars == wrong[key].__code__.co_freevars: f.__code__, f.__defaults__ = wrong[key].__code__, wrong[key].__defaults__

def noticed_by(mutant, cells, module, names):
    "Whether the cells from the fault's on notice it"
    cells[0].source = cells[0].source.replace(mutant.right, mutant.wrong)
    try: plant_imported(mutant, module)
    except Exception: return True
    for cell in cells:
        if error := run_cell(cell, names):
            print(f'          in cell {cell.idx_}, {type(error).__name__}: {" ".join(str(error).split())[:100]}', flush=True)
            return True
    return False

def in_fork(fn, folder):
    "What `fn` says, in a process of its own; what it does to the temporary files is undone"
    subprocess.run(['cp', '-a', folder, f'{folder}-kept'], check=True)  # Also a circle of links and a pipe, as 11_metadata has them
    if (pid := os.fork()) == 0:
        code = 2  # It broke down
        try: code = int(fn())
        finally: os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    shutil.rmtree(folder)
    os.rename(f'{folder}-kept', folder)
    if code not in (0, 1): raise SystemExit(f'a fork ended with {code}')
    return bool(code)

def from_their_cells(room, mutants, report, folder, skip=()):
    "A chapter with its faults, each from its cell on; True where the chapter is sound"
    from nbdev.test import nb_test_cells
    path = ROOT/'nbs'/f'{room}.ipynb'
    cells = [cell for cell in nb_test_cells(path, skip_flags=['slow', 'cuda']) if cell.cell_type == 'code' and cell.idx_ not in skip]
    module, names = module_of(json.loads(path.read_text())), {'__name__': '__main__'}
    for i, cell in enumerate(cells):
        for mutant in mutants:
            if not cell.source.startswith('#| export') or mutant.right not in cell.source: continue
            start = perf_counter()
            noticed = in_fork(lambda: noticed_by(mutant, cells[i:], module, names), folder)
            report(mutant, not noticed, perf_counter() - start)
            keep(mutant, noticed, 'some cells' if skip else 'from its cell')
        if error := run_cell(cell, names):
            print(f'FAILS     {room} as it is, in cell {cell.idx_}: {error!r}', flush=True)
            return False
    return True

# What is kept between runs

WAYS = {'whole chapter': 'were run with the whole chapter by `nbdev-test`', 'from its cell': "were run from the fault's cell on (`--from-cell`)",
        'some cells': "were run so with the slow lesson cells left out that have no part in it (`--skip`)", 'earlier': 'were noticed by the whole chapter in an earlier run that kept no list'}

def kept(): # (chapter, fault, the wrong code) to what it came to
    if not RESULTS.exists(): return {}
    with open(RESULTS, newline='') as f: return {(row['chapter'], row['fault'], row['wrong']): row for row in csv.DictReader(f)}

def keep(mutant, noticed, how):
    rows = kept()
    rows[mutant.room, mutant.fault, mutant.wrong] = dict(chapter=mutant.room, fault=mutant.fault, wrong=mutant.wrong, noticed=['no', 'yes'][noticed], how=how, date=str(date.today()))
    there = [rows[m.room, m.fault, m.wrong] for m in MUTANTS if (m.room, m.fault, m.wrong) in rows]
    with open(RESULTS, 'w', newline='') as f:
        out = csv.DictWriter(f, there[0], lineterminator='\n')
        out.writeheader()
        out.writerows(there)

def listed(mutants): return '; '.join(f'{m.fault}: `{m.wrong.strip().splitlines()[0]}`' for m in mutants).replace('|', r'\|')

def by_room(results):
    rows = []
    for room in _faults:
        own = [(m, results.get((m.room, m.fault, m.wrong), {}).get('noticed')) for m in MUTANTS if m.room == room]
        count = [sum(noticed == what for _, noticed in own) for what in ('yes', 'no')]
        rows.append((room, str(len(own)), *map(str, count), listed(m for m, noticed in own if noticed == 'no'), '; '.join(m.fault for m, noticed in own if noticed is None)))
    return rows

def markdown(rows):
    head = 'chapter', 'faults', 'noticed', 'survive', 'which survive', 'not run'
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---']*len(head), *rows])

def write_results():
    "The page of results, from what was kept; gives its text"
    results = kept()
    known = [row for m in MUTANTS if (row := results.get((m.room, m.fault, m.wrong)))]
    n_noticed = sum(row['noticed'] == 'yes' for row in known)
    note = f'{len(MUTANTS)} faults, {n_noticed} noticed, {len(known) - n_noticed} survive, {len(MUTANTS) - len(known)} not run'
    ways = '; '.join(f'{n} {told}' for how, told in WAYS.items() if (n := sum(row['how'] == how for row in known))) + '. `mutants.csv` has the day and the way of each.'
    text = '\n\n'.join(['# Faults that the tests notice', *about('mutants', ('fastai', 'torch'), note), ways, markdown(by_room(results))])
    RESULTS.with_suffix('.md').write_text(text + '\n')
    return text

def whole_chapters(rooms, mutants, n_workers):
    "Each fault with the whole of its chapter, in copies of the tree; the chapters that fail without one"
    with tempfile.TemporaryDirectory(prefix='mutants-') as folder:
        trees = Queue()
        for i in range(n_workers):
            trees.put(shutil.copytree(ROOT, Path(folder)/str(i), ignore=shutil.ignore_patterns('.git', '_proc', '_docs', '__pycache__')))
        with ThreadPoolExecutor(n_workers) as pool:
            sound = dict(zip(rooms, pool.map(lambda room: judged(trees, room, shown), rooms)))  # Else each fault would be noticed
            mutants = [m for m in mutants if sound[m.room]]
            for mutant, survives in zip(mutants, pool.map(lambda m: judged(trees, m, shown), mutants)): keep(mutant, not survives, 'whole chapter')
    return [room for room in rooms if not sound[room]]

def from_cells(rooms, mutants, skip):
    "The chapters that fail without a fault"
    os.environ |= dict(IN_TEST='1', OMP_NUM_THREADS='1', MPLBACKEND='agg')  # A fork has no threads but its own
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory(prefix='mutants-') as folder, chdir(ROOT/'nbs'):
        os.environ['TMPDIR'] = tempfile.tempdir = f'{folder}/tmp'
        os.mkdir(tempfile.tempdir)
        return [room for room in rooms if not from_their_cells(room, [m for m in mutants if m.room == room], shown, tempfile.tempdir, skip)]

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--only', default='', help='chapters, by commas')
    p.add_argument('--fault', default='', help='faults that have this in their name')
    p.add_argument('--n-workers', type=int, default=2)
    p.add_argument('--from-cell', action='store_true', help='run a chapter once, and each fault from its cell on in a fork: several times as fast')
    p.add_argument('--skip', default='', help='with --from-cell: numbers of lesson cells that no fault needs, by commas, to leave out')
    p.add_argument('--quick', action='store_true', help='the chapters of labels, loss and metrics alone; under two minutes')
    p.add_argument('--write', action='store_true', help='run nothing, write the page of results anew')
    p.add_argument('--json', action='store_true', help='one JSON object on the last line')
    args = p.parse_args()
    rooms = ['19_loss', '21_metrics', '21b_study'] if args.quick else [r for r in args.only.split(',') if r] or list(_faults)
    mutants = [m for m in MUTANTS if m.room in rooms and args.fault in m.fault and not args.write]
    for mutant in MUTANTS: planted((ROOT/module_of(json.loads((ROOT/'nbs'/f'{mutant.room}.ipynb').read_text()))).read_text(), mutant)  # Does each fit?
    broken = [] if not mutants else from_cells(rooms, mutants, [int(i) for i in args.skip.split(',') if i]) if args.from_cell else whole_chapters(rooms, mutants, args.n_workers)
    print(write_results())
    if broken: print(f'not judged, as they fail without a fault: {", ".join(broken)}')
    noticed = sum(kept().get((m.room, m.fault, m.wrong), {}).get('noticed') == 'yes' for m in mutants)
    if args.json: print(json.dumps(dict(faults=len(mutants), noticed=noticed, broken=len(broken))))
    sys.exit(bool(broken))
