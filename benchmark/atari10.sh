#!/usr/bin/env bash
# Prints a study as a list of jobs, a command per line, for bash, GNU parallel or slurm_array.sh. A list can be run again.
set -fuo pipefail
cd "$(dirname "$0")/.." || exit
usage="usage: benchmark/atari10.sh [options] [-- flags for every command] > jobs.txt
  --figure N         instead of scripts and variants, a figure's runs: 1, 2, 3, 5 (PQN), 6 (L), 7 (XL), 4 (all), gns, ppo
  --scripts '...'    of pqn l xl ppo gns; gns has adaptive, max-... and yoked, the others are pqn's     (default: pqn)
  --variants '...'   of adaptive; fixed (at 32), longest, shortest (at the ends of the range); max-32 max-64 max-128;
                     time (growth with time); scale-epochs; literal (no averaging); public public-fixed public-longest
                     (as the author's code); yoked (the lengths of adaptive's next seed, blind to its own policy: these
                     lines come last and need adaptive's checkpoints)               (default: adaptive fixed longest)
  --games '...'      atari10, atari57, or names such as 'Pong Breakout'                             (default: atari10)
  --seeds '...'                                                                                       (default: 1 2 3)
  --budget STEPS     agent steps of each run; K, 50 at 20 million, shrinks with it                 (default: 20000000)
  --runs FOLDER      runs lie in FOLDER/<variant>/<game>__<script>__<seed>                             (default: runs)"
fail() {
    echo "error: $1" >&2
    exit 2
}
check() { # option, its words, allowed words
    for word in $2; do [[ " $3 " == *" $word "* ]] || fail "unknown $1 '$word'; use: $3"; done
}
scripts=pqn variants="adaptive fixed longest" games=atari10 seeds="1 2 3" budget=20000000 runs=runs figure=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [[ $1 != -h && $1 != --help ]] || { echo "$usage" && exit; }
    [[ $1 =~ ^--(figure|scripts|variants|games|seeds|budget|runs)$ ]] || fail "unknown option '$1'; see --help"
    [[ ${2-} =~ [^[:space:]] ]] || fail "$1 needs a value; see --help"
    printf -v "${1#--}" %s "$2" && shift 2
done
printf -v runs %q "$runs"
flags="" && [ $# -lt 2 ] || flags=$(printf ' %q' "${@:2}")
[[ ! "${flags//_/-} " =~ \ (--(env-id|seed|total-timesteps|run-dir))[\ =] ]] || fail "${BASH_REMATCH[1]} is set by the list"
case $figure in
[1235] | "") ;;
4) scripts="pqn l xl" variants="fixed max-32 max-64 max-128" ;;
6) scripts=l ;;
7) scripts=xl ;;
gns) scripts="pqn gns" variants="adaptive fixed" ;;
ppo) scripts=ppo variants="adaptive fixed" ;;
*) fail "unknown figure '$figure'; use 1 to 7, gns or ppo" ;;
esac
all=$(awk -F, 'NR > 1 {sub("-v5", "", $1); print $1}' benchmark/atari57_scores.csv | xargs)
ten=$(awk -F, 'NR > 1 && $4 {sub("-v5", "", $1); print $1}' benchmark/atari57_scores.csv | xargs)
games=${games//atari10/$ten} && games=${games//atari57/$all} && games=${games//-v5/}
check scripts "$scripts" "pqn l xl ppo gns"
check games "$games" "$all"
lengths="adaptive fixed longest shortest max-32 max-64 max-128 time yoked"
check variants "$variants" "$lengths scale-epochs literal public public-fixed public-longest"
[[ "$seeds " =~ ^(\ *(0|[1-9][0-9]{0,9})\ )+$ ]] || fail "--seeds are whole numbers, not '$seeds'"
seeds=$(tr ' ' '\n' <<<"$seeds" | awk 'NF && !seen[$0]++' | xargs)
[[ $budget =~ ^[1-9][0-9]{0,14}$ ]] || fail "--budget is a number of agent steps such as 20000000, not '$budget'"
[[ " $variants " != *" yoked "* || $seeds == *[0-9]\ *[0-9]* ]] || fail "yoked needs two --seeds or more, not '$seeds'"
interval=$(((50 * budget + 10000000) / 20000000))
previous=${seeds##* } next=()
for seed in $seeds; do next[previous]=$seed previous=$seed; done
for seed in $seeds; do
    for game in $games; do
        for script in $scripts; do
            for variant in $variants; do
                file=${script}_abs_atari longest=64 own=""
                case $script in l | xl) file=pqn_${script}_abs_atari longest=128 ;; gns) file=gns_batch_atari ;; esac
                [[ $script != gns || $variant =~ ^(adaptive|max-.*|yoked)$ ]] || continue
                [[ $variant != "max-$longest" || " $variants " != *" adaptive "* ]] || continue # which adaptive is already
                case $variant in
                *fixed) own=" --no-adapt-rollout --num-steps 32" ;;
                *longest) own=" --rollout-length-min $longest --rollout-length-max $longest" ;; # so --scale-epochs counts from 32
                shortest) own=" --no-adapt-rollout --num-steps 16" ;;
                max-*) own=" --rollout-length-max ${variant#max-}" ;;
                time) own=" --adapt-signal time" ;;
                scale-epochs) own=" --scale-epochs" ;;
                literal) own=" --divergence-window 1 --divergence-warmup 0" ;;
                yoked) own=" --adapt-signal replay --replay $runs/adaptive/${game}__${file}__${next[seed]}/checkpoint.pt" ;;
                esac
                [[ $variant != public* ]] || own+=" --scale-epochs --episodic-life"
                echo "python $file.py --run-dir $runs/$variant/${game}__${file}__$seed --env-id $game-v5 --seed $seed" \
                    "--total-timesteps $budget --adapt-interval $((interval > 0 ? interval : 1))$flags$own"
            done
        done
    done
done | awk '!seen[$0]++ {if (/ replay /) last = last $0 "\n"; else print} END {printf "%s", last}'
