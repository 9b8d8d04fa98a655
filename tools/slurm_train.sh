#!/usr/bin/env bash
# Train on a Slurm cluster: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments]
# Inside a batch job (sbatch --requeue --signal=USR1@120) a training that was signalled, and so has
# saved, is put back into the queue: give --resume.
# GPUS (8), GPUS_PER_NODE (8, or GPUS where that is less), CPUS_PER_TASK (5), PORT (follows from the
# number of the job) and SRUN_ARGS come from the environment.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]" >&2
  exit 2
fi
train=$(dirname "$0")/train.py
if [ ! -f "$train" ]; then
  echo "error: $train is not there: sbatch runs a copy of the script that it is given. Submit one" \
    "that calls tools/slurm_train.sh: docs/clusters.md has it" >&2
  exit 2
fi
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
export MASTER_PORT=${PORT:-${MASTER_PORT:-}}
# Outside a batch job srun makes the job, so that its number is known to the processes alone.
# shellcheck disable=SC2016
start='export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}; exec "$@"'
status=0
# SRUN_ARGS is a list of words on purpose.
# shellcheck disable=SC2086
srun -p "$1" --job-name="$2" \
  --gres="gpu:$gpus_per_node" --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  bash -c "$start" bash \
  python -u "$train" "$3" --work-dir "$4" --launcher slurm "${@:5}" || status=$?
# 128 + SIGUSR1: the training saved after its step, see protune_mm/resume.py. After SIGTERM Slurm
# itself puts a preempted job back; a cancelled one is to stay so.
if [ "$status" -eq 138 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  echo "job $SLURM_JOB_ID: saved, back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
