#!/bin/bash
# All that only a GPU can tell about the operations, within eight minutes, into a folder; from the root of the repository:
#     benchmarks/gpu_check.sh FOLDER
# Needs torch, numpy and pytest; patchreg itself need not be installed.
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
export PYTHONPATH="$PWD:$PWD/tests" PATCHREG_CACHE=$(mktemp -d) OMP_WAIT_POLICY=PASSIVE
{
    nvidia-smi
    python -m pip list 2>/dev/null | grep -iE "^(torch|triton|numpy|pytest|cuda|nvidia)"
    python -c "import torch; print(torch.__version__, torch.cuda.get_device_properties(0))
from patchreg.ops.cuda import launch; print('why not:', launch.why_not(torch.device('cuda', 0)))"
} >"$out/environment.txt" 2>&1
for part in lncc mutual_information warp compose cuda; do  # side by side, as each first compiles its own kernels
    timeout 150 python -m pytest -o addopts=--import-mode=importlib -p no:cacheprovider -ra -q -m gpu \
        tests/ops/test_"$part"*.py >"$out/tests_$part.log" 2>&1 &
done
wait
cat >"$PATCHREG_CACHE/small.py" <<'PYTHON'
import torch
from patchreg import ops
def rand(channels): return torch.rand(1, channels, 21, 33, 40, device="cuda", requires_grad=True)
fixed, moving, field = rand(1), rand(1), rand(3)
mask, affine = (rand(1) > 0.3).float(), torch.eye(3, 4, device="cuda", dtype=torch.float64, requires_grad=True)
for run in (
    *(lambda w=w, m=m: ops.lncc(fixed, moving, w, mask=m, backend="native") for w in (3, 9, 13) for m in (None, mask)),
    *(lambda n=n: ops.mutual_information(fixed, moving, n, mask, backend="native") for n in (32, 300)),
    lambda: ops.warp(moving, field, affine, backend="native"), lambda: ops.integrate(field, backend="native"),
): run().sum().backward()
ops.warp(mask, field.detach(), mode="label", backend="native")
torch.cuda.synchronize()
PYTHON
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
for tool in memcheck racecheck; do
    [ -z "$sanitizer" ] || PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 50 "$sanitizer" --tool $tool \
        python "$PATCHREG_CACHE/small.py" >"$out/$tool.log" 2>&1 &
done
wait
timeout 270 python benchmarks/ops.py --device cuda --total-limit 240 --out "$out" >"$out/benchmark.log" 2>&1
tail -n 3 "$out"/*.log
