#!/usr/bin/env bash
# Prints the grid that benchmark/scaling.py needs as a list of jobs, a command per line, for bash, xargs or slurm_array.sh.
set -feuo pipefail
cd "$(dirname "$0")/.."
usage="usage: benchmark/scaling.sh [options] > jobs.txt
  --games '...'   names such as 'Pong Breakout', or atari10                       (default: Breakout)
  --seeds '...'   each seed's runs come together: if hours run out, seeds miss    (default: 1 2)
  --budget STEPS  agent steps of each run; K shrinks with it as in atari10.sh     (default: 1000000)
  --runs FOLDER   runs lie in FOLDER/m<minibatches>_e<epochs>/<variant>/          (default: runs/scaling)"
games=Breakout seeds="1 2" budget=1000000 runs=runs/scaling
while [ $# -gt 0 ]; do
    [[ $1 != -h && $1 != --help ]] || { echo "$usage" && exit; }
    if [[ ! $1 =~ ^--(games|seeds|budget|runs)$ || ! ${2-} =~ [^[:space:]] ]]; then
        echo "error: '$1' is no option or has no value; see --help" >&2 && exit 2
    fi
    printf -v "${1#--}" %s "$2" && shift 2
done
cells=("adaptive 32 2" "shortest 32 2" "longest 32 2") # variant, minibatches, epochs; the line of ABS, 2 epochs, first
for e in 2 1 4; do for m in 32 8 128; do cells+=("fixed $m $e"); done; done
grid() {
    for seed in $seeds; do
        for cell in "${cells[@]}"; do
            read -r variant m e <<<"$cell"
            benchmark/atari10.sh --variants "$variant" --games "$games" --seeds "$seed" --budget "$budget" \
                --runs "$runs/m${m}_e$e" -- --num-minibatches "$m" --update-epochs "$e" --eval-epsilon 0.01 || exit
        done
    done
}
list=$(grid)
awk '!seen[$0]++' <<<"$list"
