#!/usr/bin/env bash
# One worker of a Cloud TPU VM slice. launch/tpu_vm.py copies this file there, beside source.tar.gz, and calls it on all of them:
#   install [COMMAND]   unpacks and installs the source, then runs COMMAND
#   start FLAGS         begins python -m iam_jax.main FLAGS in the background, unless it is running
#   follow              prints what it tells until it ends
#   code                waits until it has ended and prints "exit-code N" (stopped: by `stop`; none: it never ended by itself)
#   status              what goes on here
#   stop                SIGTERM: it saves, then ends
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pid=$here/run.pid log=$here/run.log code=$here/run.code stopped=$here/run.stopped

running() { # the number alone could be another process's, after a reboot
    [[ -e $pid ]] && grep -qs iam_jax.main "/proc/$(<"$pid")/cmdline"
}

install() {
    if running; then
        echo "running: what is installed stays"
        return
    fi
    rm -rf "$here/source"
    mkdir "$here/source"
    tar -xzf "$here/source.tar.gz" -C "$here/source"
    # The images' own Python is older than this project's; uv brings one.
    python3 -m pip install -q --user uv
    python3 -m uv venv -q --allow-existing --python 3.12 "$here/venv"
    python3 -m uv pip install -q --python "$here/venv/bin/python" "$here/source[tpu]"
    if [[ $# -gt 0 ]]; then
        (cd "$here" && bash -c "$1")
    fi
}

start() {
    if running; then
        echo "running already"
        return
    fi
    rm -f "$code" "$stopped" "$pid"
    cd "$here/source"
    setsid nohup bash "$here/tpu_worker.sh" supervise "$@" >"$log" 2>&1 </dev/null &
    for _ in {1..100}; do
        [[ -e $pid ]] && return
        sleep 0.1
    done
    echo "not started: $log tells why" >&2
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
        for _ in {1..50}; do # until the supervisor has noted it
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
    local what=$1
    shift
    case $what in
        install) install "$@" ;;
        start) start "$@" ;;
        supervise) supervise "$@" ;;
        follow) follow ;;
        code) code ;;
        status) status ;;
        stop) stop ;;
        *) echo "$what is nothing that a worker does" >&2 && return 2 ;;
    esac
}

main "$@"; exit # one line, as bash reads a script while it runs it: a newer copy may arrive meanwhile
