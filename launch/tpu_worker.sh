#!/usr/bin/env bash
# The actions of one worker of a Cloud TPU VM slice. launch/tpu_vm.py copies this file and source.tar.gz to all workers and calls it there:
#   install [COMMAND]   unpacks and installs the source, then runs COMMAND in its folder, in which the program will run
#   start FLAGS         starts python -m iam_jax.main FLAGS in the background, unless it is running
#   follow              prints the log of the program until it ends
#   code                waits until the program has ended and prints "exit-code N" (stopped: by `stop`; none: no exit code was written)
#   status              prints whether the program is running, and its last line or its exit code
#   stop                sends SIGTERM: the program saves and exits
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pid=$here/run.pid log=$here/run.log code=$here/run.code stopped=$here/run.stopped

running() { # checks the command line too, since after a reboot another process may have the same id
    [[ -e $pid ]] && grep -qs iam_jax.main "/proc/$(<"$pid")/cmdline"
}

install() {
    if running; then
        echo "running: the installation is not changed"
        return
    fi
    rm -rf "$here/source"
    mkdir "$here/source"
    tar -xzf "$here/source.tar.gz" -C "$here/source"
    # The Python of the images is older than this project needs; uv installs a newer one.
    python3 -m pip install -q --user uv
    python3 -m uv venv -q --allow-existing --python 3.12 "$here/venv"
    python3 -m uv pip install -q --python "$here/venv/bin/python" "$here/source[tpu,gcs]"
    if [[ $# -gt 0 ]]; then
        (cd "$here/source" && bash -c "$1")
    fi
}

start() {
    if running; then
        echo "already running"
        return
    fi
    rm -f "$code" "$stopped" "$pid"
    cd "$here/source"
    setsid nohup bash "$here/tpu_worker.sh" supervise "$@" >"$log" 2>&1 </dev/null &
    for _ in {1..100}; do
        [[ -e $pid ]] && return
        sleep 0.1
    done
    echo "not started: see $log" >&2
    return 1
}

supervise() {
    "${PYTHON:-$here/venv/bin/python}" -m iam_jax.main "$@" &
    echo $! >"$pid"
    local result=0
    wait $! || result=$?
    [[ -e $stopped ]] && result=stopped
    echo "$result" >"$code"
}

follow() {
    tail -n +1 -F "$log" --pid="$(<"$pid")" 2>/dev/null
}

code() {
    if [[ -e $pid ]]; then
        tail -f /dev/null --pid="$(<"$pid")"
        for _ in {1..50}; do # until the supervisor has written the exit code
            [[ -e $code ]] && break
            sleep 0.1
        done
    fi
    if [[ -e $code ]]; then
        echo "exit-code $(<"$code")"
    else
        echo "exit-code none"
    fi
}

status() {
    if running; then
        echo "$(hostname): running"
        tail -n 1 "$log"
    else
        echo "$(hostname): $(code)"
    fi
}

stop() {
    touch "$stopped"
    if running; then
        kill -TERM "$(<"$pid")"
    fi
}

main() {
    local action=$1
    shift
    case $action in
        install) install "$@" ;;
        start) start "$@" ;;
        supervise) supervise "$@" ;;
        follow) follow ;;
        code) code ;;
        status) status ;;
        stop) stop ;;
        *) echo "$action: unknown action" >&2 && return 2 ;;
    esac
}

main "$@"; exit # on one line, because bash reads a script while it runs, and a newer copy may replace this file meanwhile
