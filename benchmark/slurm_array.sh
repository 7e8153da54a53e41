#!/usr/bin/env bash
# Runs a list of jobs as a Slurm array, one task per line (a simple command, without cd or &&):
#
#     benchmark/atari10.sh > jobs.txt
#     sbatch --gpus=1 --array=1-$(wc -l < jobs.txt)%8 benchmark/slurm_array.sh jobs.txt
#
# Submit from the root of the repository with its virtual environment active; sbatch's options go before the lines below. A
# line with --run-dir is queued again at the time limit until it has finished; another one would begin anew. Leave the list as
# it is while tasks are queued. Submitting it again runs only what has not finished.
#SBATCH --job-name=abs
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

[ -n "$SLURM_ARRAY_TASK_ID" ] || { echo "error: submit this with sbatch --array=1-N, N being the number of jobs" >&2; exit 2; }
[ -r "$1" ] || { echo "error: cannot read the file of jobs '$1'; give it as the argument of this script" >&2; exit 2; }
command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1" | tr -d '\r') # lists from Windows
[[ $command =~ ^[[:space:]]*[^#[:space:]] ]] || { echo "error: $1 has no command in line $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
echo "$(date): $command"

# USR1 comes two minutes before the time limit: the script is asked to save. TERM comes from scancel and preemption, maybe to
# this shell alone: a cancelled task must not come back, a preempted one Slurm queues again by itself.
eval "exec env $command" &
trap 'interrupted=yes at_limit=yes; kill -TERM $! 2>/dev/null' USR1
trap 'interrupted=yes; kill -TERM $! 2>/dev/null' TERM
interrupted=yes
while [ -n "$interrupted" ]; do # by a signal, which ends wait early
    interrupted=""
    wait $!
    code=$?
done
case "$at_limit $code $command" in
"yes 143 "*--run[-_]dir* | "yes 1 "*torchrun*--run[-_]dir*) # torchrun ends with 1 where its processes have saved and ended
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" ;; # the bare id may be the whole array's
yes*) echo "not queued again, as it ended with $code or its line has no --run-dir" ;;
esac
exit $code
