#!/usr/bin/env bash
# Runs a list of jobs as a Slurm array, one task per line (a simple command, without cd or &&), each of them requeued until it
# has finished:
#
#     benchmark/atari10.sh > jobs.txt
#     sbatch --gpus=1 --array=1-$(wc -l < jobs.txt)%8 benchmark/slurm_array.sh jobs.txt
#
# Submit from the root of the repository with its virtual environment active. What stands on sbatch's command line goes before
# the lines below. Tasks read their line when they start: leave the list as it is while any of them is queued. Submitting it
# again runs only what has not finished.
#SBATCH --job-name=abs
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

[ -n "$SLURM_ARRAY_TASK_ID" ] || { echo "error: submit this with sbatch --array=1-N, N being the number of jobs" >&2; exit 2; }
[ -r "$1" ] || { echo "error: cannot read the file of jobs '$1'; give it as the argument of this script" >&2; exit 2; }
command=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
[[ $command =~ ^[[:space:]]*[^#[:space:]] ]] || { echo "error: $1 has no command in line $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
echo "$(date): $command"

# USR1 comes two minutes before the time limit: the script is asked to save, and this task queues again. TERM comes from scancel
# and preemption, and may come to this shell alone: a task that was cancelled must not come back, a preempted one Slurm requeues
# (before Slurm 24.05 not if it ends within a GraceTime: submit the list again).
eval "exec env $command" &
trap 'interrupted=yes at_limit=yes; kill -TERM $! 2>/dev/null' USR1
trap 'interrupted=yes; kill -TERM $! 2>/dev/null' TERM
interrupted=yes
while [ -n "$interrupted" ]; do # by a signal, which ends wait early
    interrupted=""
    wait $!
    code=$?
done
if [ -n "$at_limit" ]; then
    case "$code $command" in
    143\ * | 1\ *torchrun*) # torchrun ends with 1 also where all its processes have saved and ended with 143
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" ;; # the bare id may be the whole array's
    esac
fi
exit $code
