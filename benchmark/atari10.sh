#!/usr/bin/env bash
# Prints the study as a list of jobs, one complete command per line, for bash, GNU parallel or a Slurm array to run.
set -feuo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'TEXT'
usage: benchmark/atari10.sh [options] [-- flags for every command] > jobs.txt

  --figure N         the runs behind one figure of the paper, instead of --scripts and --variants:
                     1, 2, 3, 5 (PQN), 6 (PQN-L), 7 (PQN-XL), 4 (longest rollout 32, 64, 128 for all three), gns, ppo
  --scripts "..."    of pqn l xl ppo gns                                                        (default: pqn)
  --variants "..."   of adaptive, fixed (at the base length 32), longest and shortest (fixed at the ends of the range),
                     max-32 max-64 max-128 (adaptive, up to so many steps), time (the open-loop control), scale-epochs,
                     literal (no averaging of the divergence); gns has adaptive and max-... of its own, and what it
                     has besides is pqn's                                     (default: adaptive fixed longest)
  --games "..."      atari10, atari57, or names such as "Pong Breakout"                     (default: atari10)
  --seeds "..."                                                                               (default: 1 2 3)
  --budget STEPS     agent steps of each run; measurements of the policy become as much more frequent as a run is
                     shorter (every 50 iterations at 20 million steps)                     (default: 20000000)

Lines are ordered by seed, so that an unfinished study has every game. Each carries --auto-resume: a command that is run
again goes on where it stopped, and ends at once where it had finished.
TEXT
}
fail() {
    echo "error: $1" >&2
    exit 2
}
distinct() { # the words of $1, each once; $2 is the option they come from
    local words
    words=$(tr -s ' \t\n' '\n' <<<"$1" | awk 'NF && !seen[$0]++' | paste -sd' ' -)
    [ -n "$words" ] || fail "$2 needs a value; see --help"
    echo "$words"
}
one_of() { # value, what it is, allowed values
    [[ " $3 " == *" $1 "* ]] || fail "unknown $2 '$1'; use one of: $3"
}
set_flags() { # variant, the script's longest rollout: sets $flags
    case $1 in
    adaptive) flags="" ;;
    fixed) flags="--no-adapt-rollout --num-steps 32" ;;
    longest) flags="--no-adapt-rollout --num-steps $2" ;;
    shortest) flags="--no-adapt-rollout --num-steps 16" ;;
    max-*) flags="--rollout-length-max ${1#max-}" ;;
    time) flags="--adapt-signal time" ;;
    scale-epochs) flags="--scale-epochs" ;;
    literal) flags="--divergence-window 1 --divergence-warmup 0" ;;
    esac
}

scripts="pqn" variants="adaptive fixed longest" games="atari10" seeds="1 2 3" budget=20000000 figure="" given=""
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    case "$1" in
    -h | --help) usage && exit ;;
    --figure | --scripts | --variants | --games | --seeds | --budget)
        [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; see --help"
        printf -v "${1#--}" "%s" "$2"
        given+=" $1 "
        shift 2
        ;;
    *) fail "unknown option '$1'; see --help (flags for the training commands follow after --)" ;;
    esac
done
[ $# -gt 0 ] && shift
extra=$(printf ' %q' "$@")
[ $# -gt 0 ] || extra=""
for flag in "$@"; do
    flag=${flag%%=*}
    case "${flag//_/-}" in
    --env-id | --seed | --total-timesteps) fail "${flag} is set by --games, --seeds and --budget; not after --" ;;
    --resume | --eval-only | --model) fail "${flag} is not for a list of training runs" ;;
    esac
done

if [ -n "$figure" ] && [[ "$given" == *" --scripts "* || "$given" == *" --variants "* ]]; then
    fail "--figure sets scripts and variants; leave out --scripts and --variants, or --figure"
fi
case "$figure" in
"" | 1 | 2 | 3 | 5) ;;
4) scripts="pqn l xl" variants="fixed max-32 max-64 max-128" ;;
6) scripts="l" ;;
7) scripts="xl" ;;
gns) scripts="pqn gns" variants="adaptive fixed" ;;
ppo) scripts="ppo" variants="adaptive fixed" ;;
*) fail "unknown figure '$figure'; use 1 to 7, gns or ppo" ;;
esac

table=benchmark/atari57_scores.csv
all=$(awk -F, 'NR > 1 {sub("-v5", "", $1); print $1}' $table | xargs)
games=${games//atari10/$(awk -F, 'NR > 1 && $4 {sub("-v5", "", $1); print $1}' $table | xargs)}
games=${games//atari57/$all}
scripts=$(distinct "$scripts" --scripts)
variants=$(distinct "$variants" --variants)
games=$(distinct "${games//-v5/}" --games)
seeds=$(distinct "$seeds" --seeds)
for game in $games; do one_of "$game" game "$all"; done
for script in $scripts; do one_of "$script" script "pqn l xl ppo gns"; done
known="adaptive fixed longest shortest max-32 max-64 max-128 time scale-epochs literal"
for variant in $variants; do one_of "$variant" variant "$known"; done
for flag in "$@"; do # what comes last wins: such a flag would make one run of two variants
    [[ $flag == --* ]] || continue
    flag=${flag%%=*}
    name=${flag//_/-}
    for variant in $variants; do
        set_flags "$variant" 64
        case $variant in # fixed at the ends of the scripts' own range
        longest) flags+=" --rollout-length-max" ;;
        shortest) flags+=" --rollout-length-min" ;;
        esac
        if [[ " ${flags//--no-/--} " == *" ${name/#--no-/--} "* ]]; then
            fail "$flag is set by the variant '$variant'; leave that out of --variants, or the flag"
        fi
    done
done
whole='^(0|[1-9][0-9]{0,14})$'
for seed in $seeds; do
    { [[ $seed =~ $whole ]] && ((seed < 2 ** 32)); } || fail "a seed is a whole number from 0 to 4294967295, not '$seed'"
done
{ [[ $budget =~ $whole ]] && ((budget > 0)); } || fail "--budget is a number of agent steps such as 20000000, not '$budget'"

if [[ " $scripts " == *" gns "* && " $scripts " != *" pqn "* ]]; then
    for variant in $variants; do
        [[ $variant == adaptive || $variant == max-* ]] || fail "gns has no variant '$variant': that is pqn's, add it to --scripts"
    done
fi

interval=$(((50 * budget + 10000000) / 20000000))
common="--total-timesteps $budget --adapt-interval $((interval > 0 ? interval : 1)) --auto-resume$extra"
for seed in $seeds; do
    for game in $games; do
        for script in $scripts; do
            case $script in
            pqn) file=pqn_abs_atari.py longest=64 ;;
            l | xl) file=pqn_${script}_abs_atari.py longest=128 ;;
            ppo) file=ppo_abs_atari.py longest=64 ;;
            gns) file=gns_batch_atari.py longest=64 ;;
            esac
            for variant in $variants; do
                set_flags "$variant" $longest
                if [[ $variant == max-$longest && " $variants " == *" adaptive "* ]]; then
                    continue # the script's own default, which adaptive is already
                fi
                if [ $script = gns ]; then # with a fixed batch it is PQN; the other variants are the divergence's
                    case $variant in adaptive | max-*) ;; *) continue ;; esac
                fi
                echo "python $file --env-id $game-v5 --seed $seed ${flags:+$flags }$common"
            done
        done
    done
done
