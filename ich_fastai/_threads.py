"""torch's threads, each on a core of its own.

OpenMP splits each step of a training evenly among its threads, and each waits for the last one, spinning. On an idle machine this is the fastest
there is. Where another process wants a core, the scheduler moves the threads about, often two of them onto one core, where one spins while the
other has work: a training on two cores then takes from three to fifty times as long. Bound to a core each, they share with the other process
no more than that one core, and alone a training is as fast as before (bench/training.py). On two cores it then takes twice as long beside a
process of the same session. Beside one of another session, where the kernel groups them (sched_autogroup), a thread is left a third of the core
it shares, and it takes three times as long. Shorter spinning (GOMP_SPINCOUNT, OMP_WAIT_POLICY) changes that little, as oneDNN spins by itself.
One thread would take 1.7 times as long, but is as slow on an idle machine, and rounds differently: the same seed would give other weights,
depending on who else was at work.

OMP_PROC_BIND binds for the whole life of a process, and all processes that it starts inherit the first thread's core; so we bind while a training
runs, through libgomp's own entry point, which runs a function in each thread of the pool. Tested in nbs/23_train.ipynb
"""
import ctypes, os
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

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

def _may_bind(cores):
    "Are there threads to bind, a core for each, and nobody who chose otherwise?"
    if torch.get_num_threads() != len(cores) or len(cores) < 2 or _openmp() is None: return False
    if any(name in os.environ for name in CHOICES): return False
    try: os.sched_setaffinity(0, cores)
    except OSError: return False  # Some containers do not allow it
    return True

@contextmanager
def own_cores():
    "Bind each of torch's threads to a core of its own"
    cores = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else ()
    if not _may_bind(cores):
        yield
        return
    ordered = sorted(cores)
    in_each_thread(lambda i: os.sched_setaffinity(0, {ordered[i]}))
    _shared.update(cores)
    try: yield
    finally:
        _shared.clear()
        in_each_thread(lambda i: os.sched_setaffinity(0, cores))

def leave_core():
    "In another thread, or a child process, of a bound one: run on any core"
    if _shared: os.sched_setaffinity(0, _shared)

if hasattr(os, 'register_at_fork'): os.register_at_fork(after_in_child=leave_core)
