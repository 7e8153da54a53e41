#!/usr/bin/env bash
# Prints the branches of runs as a list of jobs, a command per line, for bash, GNU parallel or slurm_array.sh.
set -fuo pipefail
usage="usage: benchmark/branch.sh [options] RUN... > jobs.txt
Branches go on from RUN/checkpoint.pt for equally many steps, each with a fixed rollout length L, in two families: with as many
minibatches at every L (constant: they grow with L, so there are fewer gradient steps), and with L minibatches (proportional:
minibatches and gradient steps per sample stay the same, which leaves the age of the data). They meet at the base.
  --lengths '...'    rollout lengths                                                         (default: 16 32 64 128)
  --base L           the length at which constant and proportional have the same minibatches         (default: 32)
  --seeds '...'      of the branches                                                                (default: 1 2)
  --steps STEPS      of each branch; a multiple of 128 x every length gives all the same number  (default: 425984)
  --script FILE      the script of the runs                                            (default: pqn_abs_atari.py)
  --runs FOLDER      branches lie in FOLDER/<parent>__<family>__<L>__<seed>                 (default: runs/branches)"
fail() {
    echo "error: $1" >&2
    exit 2
}
lengths="16 32 64 128" base=32 seeds="1 2" steps=425984 script=pqn_abs_atari.py runs=runs/branches
while [[ ${1-} == -* ]]; do
    [[ $1 != -h && $1 != --help ]] || { echo "$usage" && exit; }
    [[ $1 =~ ^--(lengths|base|seeds|steps|script|runs)$ ]] || fail "unknown option '$1'; see --help"
    [[ ${2-} =~ [^[:space:]] ]] || fail "$1 needs a value; see --help"
    printf -v "${1#--}" %s "$2" && shift 2
done
[ $# -gt 0 ] || fail "name the runs whose checkpoints are the parents; see --help"
[[ "$lengths $base $seeds $steps " =~ ^([1-9][0-9]*\ +)+$ ]] || fail "lengths, base, seeds and steps are whole numbers"
for length in $lengths; do
    ((steps % (128 * length) == 0)) || fail "--steps $steps is no multiple of 128 x $length"
done
for seed in $seeds; do
    for parent in "$@"; do
        for length in $lengths; do
            for family in constant proportional; do
                [[ $family == constant || $length != "$base" ]] || continue # the same run
                minibatches=$base
                [[ $family == constant ]] || minibatches=$length
                echo "python $script --run-dir $runs/$(basename "$parent")__${family}__${length}__$seed --seed $seed" \
                    "--init-from ${parent%/}/checkpoint.pt --total-timesteps $steps --no-adapt-rollout --num-steps $length" \
                    "--num-minibatches $minibatches --start-e 0.001 --eval-episodes 50 --eval-epsilon 0.01"
            done
        done
    done
done
