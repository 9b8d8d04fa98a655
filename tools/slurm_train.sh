#!/usr/bin/env bash
# Train on a Slurm cluster: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments]
# Inside a batch job (sbatch --requeue --signal=USR1@120) a training that was signalled, and so has
# saved, is put back into the queue: give --resume.
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS come from the environment.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]" >&2
  exit 2
fi
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
status=0
# SRUN_ARGS is a list of words on purpose.
# shellcheck disable=SC2086
srun -p "$1" --job-name="$2" \
  --gres="gpu:$gpus_per_node" --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" \
  --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  python -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}" || status=$?
# 128 + SIGUSR1: the training saved after its step, see protune_mm/resume.py. After SIGTERM Slurm
# itself puts a preempted job back; a cancelled one is to stay so.
if [ "$status" -eq 138 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  echo "job $SLURM_JOB_ID: saved, back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
