"Slices a second, a core, of `write_phantoms`, files included"
import argparse, json, os, tempfile, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['ICH_QUIET'] = '1'
from pathlib import Path
from ich_fastai.phantom import plan_studies, write_study

WANTED = {128: 30, 256: 20} # Slices a second a core

def measure(size:int, n_studies:int)->dict: # One core, this process
    studies = plan_studies(n_studies, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        write_study(plan_studies(1, seed=2)[0], Path(folder)/'warm', size=64)
        start, cpu = time.perf_counter(), time.process_time()
        for s in studies: write_study(s, folder, size)
        seconds, cpu = time.perf_counter()-start, time.process_time()-cpu
        files = list((Path(folder)/'stage_2_train').iterdir())
        return dict(slices=len(files), seconds=seconds, per_second=len(files)/seconds, per_cpu_second=len(files)/cpu,
                    mb=sum(p.stat().st_size for p in Path(folder).rglob('*') if p.is_file())/1e6)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='fewer studies; under two minutes')
    p.add_argument('--json', action='store_true', help='one JSON object on the last line')
    args = p.parse_args()
    out = {}
    print(f"{'size':>5} {'slices':>7} {'seconds':>8} {'slices/s':>9} {'slices/CPU s':>13} {'MB':>7}  wanted")
    for size in (64, 128, 256, 512):
        r = measure(size, 3 if args.quick else 10)
        print(f"{size:5} {r['slices']:7} {r['seconds']:8.1f} {r['per_second']:9.1f} {r['per_cpu_second']:13.1f} {r['mb']:7.1f}  {WANTED.get(size, '')}")
        out |= {f'slices_per_second_{size}': round(r['per_second'], 1), f'slices_per_cpu_second_{size}': round(r['per_cpu_second'], 1)}
        if size in WANTED: out[f'ratio_to_wanted_{size}'] = round(r['per_second']/WANTED[size], 2)
    if args.json: print(json.dumps(out))
