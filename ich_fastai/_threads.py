"""torch's threads, one for each core that is free, each on a core of its own.

OpenMP splits each step of a training evenly among its threads, and each waits for the last one, spinning. On an idle machine this is the fastest
there is. Where another process wants a core, the scheduler moves the threads about, often two of them onto one core, where one spins while the
other has work: a training on two cores then takes from three to fifty times as long. So, while a training runs:

- One thread fewer for each core that others keep busy as it begins. On two cores one thread is left, which takes 1.7 times as long.
- Each thread is bound to a core. Alone that is as fast as before; beside a process that comes later, a step takes twice as long, or three times
  where that process is of another session (sched_autogroup: the kernel shares a core among sessions first).

Shorter spinning (GOMP_SPINCOUNT, OMP_WAIT_POLICY) changes little, as oneDNN spins by itself. All of it is measured by bench/training.py.
Fewer threads round differently, so checkpoints keep the number, and `OMP_NUM_THREADS` fixes it where two trainings must agree to the last bit.

OMP_PROC_BIND binds for the whole life of a process, and all processes that it starts inherit the first thread's core; so we bind while a training
runs, through libgomp's own entry point, which runs a function in each thread of the pool. Tested in nbs/23_train.ipynb
"""
import ctypes, os
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from time import sleep

import torch

CHOICES = 'OMP_NUM_THREADS', 'OMP_PROC_BIND', 'OMP_PLACES', 'OMP_WAIT_POLICY', 'OMP_DYNAMIC', 'GOMP_CPU_AFFINITY', 'GOMP_SPINCOUNT'  # The user's own

_shared = set()  # The cores of the process while its threads are bound

@lru_cache
def _openmp():
    "The libgomp that torch brought along, None where it has another OpenMP"
    home = Path(torch.__file__).parent
    found = [*home.glob('lib/libgomp*'), *home.parent.glob('torch.libs/libgomp*')]
    return ctypes.CDLL(str(found[0])) if len(found) == 1 else None  # Loaded already: this is the same one

def in_each_thread(
    fn, # Of a thread's number
):
    "Run `fn` in each thread of torch's pool"
    openmp = _openmp()
    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def call(_): fn(openmp.omp_get_thread_num())
    openmp.GOMP_parallel(call, None, torch.get_num_threads(), 0)

def may_choose(cores):
    "Are there threads to bind, a core for each, and nobody who chose otherwise?"
    if torch.get_num_threads() != len(cores) or len(cores) < 2 or _openmp() is None: return False
    if any(name in os.environ for name in CHOICES): return False
    try: os.sched_setaffinity(0, cores)
    except OSError: return False  # Some containers do not allow it
    return True

def _worked(cores):
    "Seconds that each core has worked since the machine started"
    stat = Path('/proc/stat')  # Some containers have none
    rows = [line.split() for line in stat.read_text().splitlines()] if stat.exists() else []
    ticks = {name: sum(map(int, counts[:3])) for name, *counts in rows if name.startswith('cpu')}  # user, nice, system
    return {core: ticks.get(f'cpu{core}', 0)/os.sysconf('SC_CLK_TCK') for core in cores}

def _shares(cores, seconds):
    before = _worked(cores)
    sleep(seconds)
    return {core: (now - before[core])/seconds for core, now in _worked(cores).items()}

def work_of_others(
    cores, # Their numbers
)->dict: # The share of each that is taken, 0 to 1
    "How busy other processes keep these cores, seen while this process waits"
    glance = _shares(cores, 0.05)
    return glance if sum(glance.values()) < 0.5 else _shares(cores, 0.3)  # A moment's work is none

@contextmanager
def own_cores(
    spared:int=None, # Cores left to others; those that they keep busy where None
):
    "Bind each of torch's threads to a core of its own, and leave busy cores alone; gives the number of cores left to others"
    cores = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else ()
    if not may_choose(cores):
        yield 0
        return
    taken = work_of_others(cores)
    if spared is None: spared = round(sum(taken.values()))
    own = sorted(cores, key=lambda core: (round(taken[core]), core))[:max(1, len(cores) - spared)]
    torch.set_num_threads(len(own))
    if len(own) > 1:
        in_each_thread(lambda i: os.sched_setaffinity(0, {own[i]}))
        _shared.update(cores)
    try: yield len(cores) - len(own)
    finally:
        _shared.clear()
        in_each_thread(lambda i: os.sched_setaffinity(0, cores))
        torch.set_num_threads(len(cores))

def leave_core():
    "In another thread, or a child process, of a bound one: run on any core"
    if _shared: os.sched_setaffinity(0, _shared)

if hasattr(os, 'register_at_fork'): os.register_at_fork(after_in_child=leave_core)
