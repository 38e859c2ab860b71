#!/usr/bin/env bash
# Runs this checkout on a Cloud TPU: on one VM, or on all workers of a pod slice, alike.
#
#   docs/launch_tpu.sh create  NAME TYPE [--spot]     asks for a TPU, as v5litepod-16 or v6e-16
#   docs/launch_tpu.sh install NAME                   copies this checkout to all workers
#   docs/launch_tpu.sh run     NAME --config=... ...  starts opensora_jax.main on all workers
#   docs/launch_tpu.sh watch   NAME                   follows the log of the first worker
#   docs/launch_tpu.sh status  NAME                   of the TPU, and of the run on each worker
#   docs/launch_tpu.sh stop    NAME                   ends the run; it can be resumed
#   docs/launch_tpu.sh keep    NAME TYPE --config=... ...
#                      all of it on a spot TPU: creates it, and again after each preemption, runs
#                      and resumes, until the run is done or has failed
#   docs/launch_tpu.sh delete  NAME
#
# ZONE (and PROJECT, if not gcloud's default) come from the environment. Needs the gcloud command.
set -euo pipefail

action=${1:?expected create, install, run, watch, status, stop, keep or delete}
name=${2:?expected the name of a TPU}
shift 2
: "${ZONE:?expected the zone of the TPU, as in ZONE=us-east5-a}"
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Runs a command on all workers, or on those that the second argument says.
remote() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="${2:-all}" --command="$1"
}

software() { # of a type of TPU
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) echo "error: $1: expected a type such as v6e-16, v5p-128 or v5litepod-16" >&2 && exit 2 ;;
  esac
}

create() {
  local type=${1:?expected the type of a TPU, such as v6e-16} version
  version=$(software "$type")
  shift
  gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "$type" --runtime-version "$version" "$@"
}

state() { # NONE where there is no such TPU, UNKNOWN where gcloud cannot say now
  local describe error
  describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    --format 'value(state.state)')
  if ! "${describe[@]}" 2>/dev/null; then
    error=$("${describe[@]}" 2>&1 >/dev/null || true)
    case $error in
      *NOT_FOUND*) echo NONE ;;
      *) echo "$error" >&2 && echo UNKNOWN ;;
    esac
  fi
}

delete() {
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

install() {
  local folder
  folder=$(mktemp -d)
  git -C "$root" archive --format tar.gz --output "$folder/opensora_jax.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "$folder/opensora_jax.tar.gz" "$name:opensora_jax.tar.gz" \
    "${where[@]}" --worker=all
  rm -r "$folder"
  remote 'set -e
    mkdir -p opensora_jax && tar -xzf opensora_jax.tar.gz -C opensora_jax
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    export PATH=$HOME/.local/bin:$PATH
    [ -x venv/bin/python ] || uv venv --quiet --python 3.12 venv
    uv pip install --quiet --python venv/bin/python -e "opensora_jax[tpu]"'
}

# The run leaves its exit status in run.status when it ends, on each worker.
run() {
  local arguments
  arguments=$(printf '%q ' "$@")
  stop
  remote "cd opensora_jax && rm -f ../run.status
    nohup setsid bash -c '../venv/bin/python -m opensora_jax.main \"\$@\"; echo \$? > ../run.status' \
      run $arguments > ../run.log 2>&1 < /dev/null &
    echo \$! > ../run.pid"
}

# Returns when the run has saved its state and let go of the TPU, or was given five minutes to.
stop() {
  remote '[ -f run.pid ] || exit 0
    kill -TERM -- -$(cat run.pid) 2>/dev/null
    for second in $(seq 300); do kill -0 -- -$(cat run.pid) 2>/dev/null || break; sleep 1; done
    kill -KILL -- -$(cat run.pid) 2>/dev/null
    rm -f run.pid'
}

# Of the run on each worker: done, running, stopped (before its end), not running, or failed.
progress() {
  remote 'if [ -f run.status ]; then
      status=$(cat run.status)
      # 75 and 134: another process died; 137 and 143: this one was killed.
      case $status in
        0) if grep -q "all stages done" run.log; then echo done; else echo stopped; fi ;;
        75 | 134 | 137 | 143) echo "stopped with $status" ;;
        *) echo "failed with $status, see run.log" ;;
      esac
    elif [ -f run.pid ] && kill -0 $(cat run.pid) 2>/dev/null; then echo running
    else echo "not running"; fi'
}

keep() {
  local type=$1 now
  shift
  software "$type" >/dev/null
  while true; do
    case $(state) in
      NONE) bash "$0" create "$name" "$type" --spot || true ;; # none to be had now, say
      ACTIVE)
        now=$(progress || true)
        case $now in
          *"failed with"*) echo "$now" && exit 1 ;;
          *done*) echo "$now" && return ;;
          # On its own, so that it ends at the first error: the TPU may be taken away meanwhile.
          *stopped* | *"not running"*)
            bash "$0" install "$name" && bash "$0" run "$name" "$@" || true ;;
        esac
        ;;
      FAILED | SUSPENDED) delete || true ;;
    esac
    sleep "${POLL_SECONDS:-60}"
  done
}

case $action in
  create) create "$@" ;;
  install) install ;;
  run) run "$@" ;;
  watch) remote 'tail -n 100 -F run.log' 0 ;;
  status) state && progress ;;
  stop) stop ;;
  keep) keep "$@" ;;
  delete) delete ;;
  *) echo "error: $action: see the first lines of $0" >&2 && exit 2 ;;
esac
