#!/usr/bin/env bash
# A GPU's first seven minutes: are the scripts right on it, how fast are they, and do they learn? Ends by itself; what it has
# measured when it is cut short is in OUT, a table in OUT/report.txt.
#
#     benchmark/gpu.sh OUT [PEER]      # PEER: CleanRL's pqn_atari_envpool.py, see cleanrl_pqn.sed
#     MINUTES=15 STEPS=20480 CHECK="--num-envs 8 --total-timesteps 400" COMPILE= benchmark/gpu.sh OUT     # to try it on a CPU
set -uo pipefail
[ $# -gt 0 ] || { echo "error: say where results go: benchmark/gpu.sh OUT [PEER]" >&2; exit 2; }
peer=${2:+--peer $(realpath "$2")} && mkdir -p "$1" && out=$(realpath "$1") && cd "$(dirname "$0")/.." || exit
minutes=${MINUTES-7} steps=${STEPS-300000} compile=${COMPILE-yes}
short="--total-timesteps 100000 --rollout-length-min 4 --rollout-length-max 8 --adapt-signal time --adapt-interval 1"
short+=" --rollout-smoothing 1 --checkpoint-interval 1 --eval-episodes 8 --max-episode-steps 300 ${CHECK-}"
say() { echo "$*" | tee -a "$out/report.txt"; }
left() { # seconds that are left, but for so many
    echo $((60 * minutes - SECONDS - $1 > 1 ? 60 * minutes - SECONDS - $1 : 1))
}
pass() { [ $? = 0 ] && say "pass: $1" || say "FAIL: $1, see $2"; }

check() { # name, command: starts, is stopped after its first checkpoint, goes on to its end; the rollout grows
    local log=$out/$1.log run=$out/runs/$1
    timeout "$(left 0)" ${*:2} --run-dir "$run" $short >"$log" 2>&1 &
    while kill -0 $! 2>/dev/null && [ ! -e "$run/checkpoint.pt" ]; do sleep 0.2; done
    kill -TERM $! 2>/dev/null && wait $!
    timeout "$(left 0)" ${*:2} --run-dir "$run" $short >>"$log" 2>&1 && grep -q "from step [1-9]" "$log" &&
        grep -q "score" "$log" && python -c "import sys, torch; sys.exit(len(torch.load(sys.argv[1])['lengths']) < 2)" "$run/checkpoint.pt"
    pass "$1 starts, adapts, continues, evaluates" "$log"
}
say "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo no GPU), $(nproc) cores, $(date -I)"
for script in pqn_abs pqn_l_abs pqn_xl_abs ppo_abs gns_batch; do check $script python ${script}_atari.py & done
check torchrun_nccl torchrun --nproc_per_node=1 pqn_abs_atari.py &
wait
[ -z "$compile" ] || timeout "$(left 0)" python - >"$out/compile.log" 2>&1 <<'PYTHON'
import torch, pqn_abs_atari, pqn_xl_abs_atari
device = "cuda" if torch.cuda.is_available() else "cpu"
for script in (pqn_abs_atari, pqn_xl_abs_atari):
    for precision, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 3e-2)):
        network = script.QNetwork(6, precision).to(device)
        compiled = torch.compile(network, dynamic=True)
        for n in (37, 64):
            x = torch.randint(256, (n, 4, 84, 84), dtype=torch.uint8, device=device)
            error = (compiled(x) - network(x)).norm() / network(x).norm()
            print(script.__name__, precision, n, error.item())
            assert error < tolerance
PYTHON
[ -z "$compile" ] || pass "compiled equals eager" "$out/compile.log"

measure() { # name, options of throughput.py; a minute is left for the learning curve
    timeout "$(left 60)" python benchmark/throughput.py --steps "$steps" --rounds 1 --out "$out/$1.csv" "${@:2}" >"$out/$1.log" 2>&1
}
measure eager --lengths 32 moving $peer
measure eager_xl --scripts pqn_xl_abs_atari.py --lengths 128
for graphs in ${compile:+0 1}; do
    export TORCHINDUCTOR_CUDAGRAPHS=$graphs # 1 is what mode="reduce-overhead" does
    measure compiled_graphs_$graphs --lengths 32 moving --flags=--compile
    measure compiled_graphs_${graphs}_xl --scripts pqn_xl_abs_atari.py --lengths 128 --flags=--compile
done
timeout "$(left 15)" python pqn_abs_atari.py --run-dir "$out/curve" ${CHECK-} >"$out/curve.log" 2>&1 # stopped, it saves
aligned="import csv, sys; [print(*map(str.ljust, row, (60, 7, 17, 7, 7))) for row in csv.reader(sys.stdin)]"
for csv in "$out"/*.csv; do python -c "$aligned" <"$csv"; done | tee -a "$out/report.txt"
say "learning curve after $SECONDS s: $(tr '\r' '\n' <"$out/curve.log" | grep return= | tail -1)"
