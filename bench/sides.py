"What every benchmark is measured with: a table of ours against another way, costs by round, a page of results"
import sys, time
from datetime import date
from pathlib import Path

import numpy as np
from ich_fastai.core import hardware, versions

class Table:
    "Ours against another way, a row a figure: as text, as Markdown, as named numbers"
    columns = ('what', 'ours', 'against', 'ratio', 'wanted', 'met')
    def __init__(self): self.rows, self.figures, self.notes = [], {}, []

    def _add(self, name, cells, met, **figures):
        self.rows.append((*cells, {True: 'yes', False: 'NO', None: ''}[met if met is None else bool(met)]))
        self.figures |= {f'{name}_{k}': round(float(v), 4) for k, v in figures.items()} | ({} if met is None else {f'{name}_met': bool(met)})
        print(' | '.join(self.rows[-1]), flush=True)

    def faster(self, name, what, costs, unit, at_least=None): # costs [rounds, 2]: ours, theirs
        (ours, theirs), ratio = np.median(costs, 0), np.median(costs[:, 1]/costs[:, 0])
        self._add(name, (what, f'{ours:.3g} {unit}', f'{theirs:.3g} {unit}', f'{ratio:.2f} x faster', f'>= {at_least}' if at_least else ''),
                  ratio >= at_least if at_least else None, ours=ours, against=theirs, ratio=ratio)

    def within(self, name, what, costs, unit, at_most): # costs [rounds, 2]: ours, what it is held against
        (ours, other), ratio = np.median(costs, 0), np.median(costs[:, 0]/costs[:, 1])
        self._add(name, (what, f'{ours:.3g} {unit}', f'{other:.3g} {unit}', f'{ratio:.2f} x', f'<= {at_most}'), ratio <= at_most,
                  ours=ours, against=other, ratio=ratio)

    def limit(self, name, what, value, unit, at_most):
        self._add(name, (what, f'{value:.3g} {unit}', '', '', f'<= {at_most} {unit}'), value <= at_most, ours=value)

    def note(self, line):
        self.notes.append(line)
        print(line, flush=True)

    def text(self):
        widths = [max(len(row[i]) for row in [self.columns, *self.rows]) for i in range(len(self.columns))]
        return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [self.columns, *self.rows])

    def markdown(self):
        rows = [self.columns, ['---']*len(self.columns), *self.rows]
        return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)

def rounds_of(n, *sides, warm=True): # Costs [n, sides]; a side is a function that gives its cost
    "The sides in turn, round by round, so that what else the machine does falls on all of them"
    if warm: [side() for side in sides]
    return np.array([[side() for side in sides] for _ in range(n)])

def cpu_ms(fn, files): # Milliseconds of CPU a file: of all threads, and no matter who else is at work on this machine
    start = time.process_time()
    for f in files: fn(f)
    return (time.process_time() - start)*1e3/len(files)

def wall(fn): # Seconds by the clock
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start

def about(script, packages, note): # The circumstances, a line each
    machine = hardware()
    return [f"{date.today()}, `{' '.join([f'python bench/{script}.py', *sys.argv[1:]])}`",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}",
            ', '.join(f'{k} {v}' for k, v in versions(('ich_fastai', *packages)).items()), note]

def write_page(script, title, lines, table):
    text = '\n\n'.join([f'# {title}', *lines, *table.notes, table.markdown()])
    (Path(__file__).parent/'results'/f'{script}.md').write_text(text + '\n')
