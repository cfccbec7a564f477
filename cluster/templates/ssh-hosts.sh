#!/usr/bin/env bash
# A Ray cluster on machines that you reach by ssh. docs/clusters.md
#
#   ssh-hosts.sh start|status|stop HOSTFILE
#
# HOSTFILE has a machine a line, as ssh takes it, the head first; behind it, where a machine has several networks, its
# address on the one that the cluster is to use. The rest of a line behind # is a comment.
#   user@gpu1  10.0.0.1
#   user@gpu2  10.0.0.2
#
# What to edit, or set in the environment: the lines down to `set`.

VENV=${FATHOM_VENV:-'~/fathom/.venv'}     # on every machine, the same path: there fathom is installed
INTERFACE=${FATHOM_INTERFACE:-}           # of the network for gloo and NCCL, say ib0; empty: what they choose
NAME=${FATHOM_CLUSTER:-fathom}            # a second cluster on the same machines needs another name, and other ports
PORT=${FATHOM_PORT:-6379}                 # the head's; the one after it is taken too
DASHBOARD_PORT=${FATHOM_DASHBOARD:-8265}  # the head's, on loopback
TOKEN_FILE=${FATHOM_TOKEN:-~/.ray/auth_token} # made here if it is not there, and copied to the machines
START_S=${FATHOM_START_S:-120}            # for Ray to come up on a machine
STOP_S=${FATHOM_STOP_S:-300}              # for a run that still goes to save, when the cluster is stopped

set -uo pipefail
SSH=(ssh -T -o BatchMode=yes -o ConnectTimeout=10) # BatchMode: keys, never a password
RUNS_ALREADY=3
HOSTS=() ADDRESSES=() STARTED=() STATUS=() FAILED=() WORK=''

usage() { echo "usage: ssh-hosts.sh start|status|stop HOSTFILE" >&2; exit 2; }
wrong() { echo "error: $*" >&2; exit 2; }

# -- what runs on a machine: its text goes there through ssh's stdin, so that nothing stands on a command line

locate() { # the home folder may be shared by all machines, /tmp is each one's own
    HERE=$HOME/.fathom/clusters/$NAME/$(hostname)
    SESSION=${FATHOM_SCRATCH:-/tmp}/fathom-$NAME-$(id -u)
    VENV=${VENV/#\~/$HOME}
}

alive() { # sets `pid`. Whoever else has the number by now has not our folder on its command line.
    pid=$(cat "$HERE/pid" 2>/dev/null) && [ -n "$pid" ] &&
        tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -qxF -- "--temp-dir=$SESSION"
}

begin() { # OPTIONS of `ray start`; prints the cluster's address
    locate
    if alive; then echo "runs already (process $pid); stop it first" >&2; return "$RUNS_ALREADY"; fi
    rm -rf "$HERE" "$SESSION"
    mkdir -p "${HERE%/*}" && mkdir -m 700 "$HERE" "$SESSION" || return 1
    (umask 077; printf %s "$TOKEN" >"$HERE/token")
    PATH=$VENV/bin:$PATH
    unset RAY_ADDRESS RAY_AUTH_TOKEN
    export PATH RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HERE/token" RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="$STOP_S"
    [ -z "$INTERFACE" ] || export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
    ulimit -n 65536 2>/dev/null || true
    setsid ray start --block --temp-dir="$SESSION" --object-store-memory=2147483648 --min-worker-port=0 \
        --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats "$@" \
        >"$HERE/log" 2>&1 </dev/null &
    pid=$!
    echo "$pid" >"$HERE/pid"
    local ends=$((SECONDS + START_S)) reason=''
    until [ -s "$SESSION/ray_current_cluster" ]; do # Ray writes it when it is up
        kill -0 "$pid" 2>/dev/null || { reason=$(grep -v '^ *$' "$HERE/log" | tail -n 3); break; }
        [ "$SECONDS" -lt "$ends" ] || { reason="not up after $START_S s"; break; }
        sleep 0.1
    done
    if [ -n "$reason" ] || ! kill -0 "$pid" 2>/dev/null; then
        finish >/dev/null
        echo "${reason:-Ray has ended, and said nothing}" >&2
        return 1
    fi
    cat "$SESSION/ray_current_cluster"
}

busy() { # whether a job or a rank is left. Ray itself waits for an actor that Ray Train leaves behind on the head, too.
    local own=' ray::(IDLE|DashboardAgent|RuntimeEnvAgent|_AutoscalingCoordinatorActor)' # sets `raylet`
    raylet=$(pgrep -P "$pid" raylet) || return 0 # that we cannot tell is no reason to kill
    pgrep -a -P "$raylet" | grep ' ray::' | grep -qvE "$own"
}

finish() { # SIGTERM drains the machine: ranks on it save and end. Never `ray stop`: it would end others' Ray, too.
    local ends=$((SECONDS + STOP_S + 30)) said="did not run" idle=0
    locate
    if alive; then
        said=stopped
        kill -TERM "$pid"
        while alive && [ "$SECONDS" -lt "$ends" ]; do
            if busy; then idle=0; else idle=$((idle + 1)); fi
            [ "$idle" != 30 ] || kill -TERM "$raylet" # 3 s: without it, `ray start` ends the rest
            sleep 0.1
        done
        if alive; then said="killed after $((STOP_S + 30)) s"; kill -KILL "$pid"; fi # its children end with it
    fi
    rm -rf "$HERE" "$SESSION"
    rmdir "${HERE%/*}" 2>/dev/null # the last machine of a shared home folder
    echo "$said"
}

show() {
    locate
    if alive; then echo "runs (process $pid)"; else echo "does not run"; return 1; fi
}

# -- what runs here

read_hosts() { # FILE
    local host address rest
    [ -r "$1" ] || wrong "$1: cannot be read"
    while read -r host address rest || [ -n "$host" ]; do
        [ -n "$host" ] || continue
        [[ "$host" =~ ^[A-Za-z0-9_.@:%+-]+$ && "$host" != -* ]] || wrong "$1: '$host' is no machine's name"
        [[ "$address" =~ ^[0-9A-Fa-f.:]*$ && -z "$rest" ]] || wrong "$1: $host: '$address $rest' is no address"
        HOSTS+=("$host") ADDRESSES+=("$address")
    done < <(sed 's/#.*//' "$1")
    [ "${#HOSTS[@]}" -gt 0 ] || wrong "$1: names no machine"
}

read_token() {
    if [ ! -s "$TOKEN_FILE" ]; then
        mkdir -p "$(dirname "$TOKEN_FILE")" || exit 1
        (umask 077; od -An -vtx1 -N32 /dev/urandom | tr -d ' \n' >"$TOKEN_FILE")
    fi
    chmod 600 "$TOKEN_FILE"
    TOKEN=$(<"$TOKEN_FILE")
}

on_machine() { # NUMBER FUNCTION WORDS...: what it says lies in $WORK/NUMBER.out and .err
    local number=$1 name
    shift
    {
        for name in VENV INTERFACE NAME START_S STOP_S RUNS_ALREADY TOKEN; do printf '%s=%q\n' "$name" "${!name-}"; done
        declare -f locate alive busy begin finish show
        printf '%q ' "$@"
    } | "${SSH[@]}" "${HOSTS[number]}" bash -s >"$WORK/$number.out" 2>"$WORK/$number.err"
}

on_machines() { # FUNCTION NUMBERS...: on all at once. FAILED are those where it failed, with their statuses in STATUS
    local task=$1 number
    local pids=()
    shift
    FAILED=()
    for number in "$@"; do
        "$task" "$number" &
        pids[number]=$!
    done
    for number in "$@"; do
        wait "${pids[number]}"
        STATUS[number]=$?
        [ "${STATUS[number]}" = 0 ] || FAILED+=("$number")
    done
}

tell() { # NUMBERS...: what each has said
    local number said
    for number in "$@"; do
        said=$(cat "$WORK/$number.out")
        [ -n "$said" ] || said="error: $(tr '\n' ' ' <"$WORK/$number.err" | cut -c 1-300)"
        printf '%-24s %s\n' "${HOSTS[number]}" "$said"
    done
}

name_failed() {
    local number
    for number in "${FAILED[@]}"; do
        printf 'error: %s: %s\n' "${HOSTS[number]}" "$(tr '\n' ' ' <"$WORK/$number.err" | cut -c 1-500)" >&2
    done
}

start_one() { # NUMBER
    local options=(--address="$CLUSTER")
    [ "$1" != 0 ] ||
        options=(--head --port="$PORT" --ray-client-server-port="$((PORT + 1))" --include-dashboard=true
            --dashboard-port="$DASHBOARD_PORT")
    [ -z "${ADDRESSES[$1]}" ] || options+=(--node-ip-address="${ADDRESSES[$1]}")
    on_machine "$1" begin "${options[@]}"
}
stop_one() { on_machine "$1" finish; }
show_one() { on_machine "$1" show; }

undo() { # what this call has started, and nothing that ran before
    local number touched=()
    trap '' INT TERM
    for number in "${STARTED[@]}"; do
        [ "${STATUS[number]:-}" = "$RUNS_ALREADY" ] || touched+=("$number")
    done
    [ "${#touched[@]}" != 0 ] || return 0
    on_machines stop_one "${touched[@]}"
    if [ -n "$(jobs -rp)" ]; then wait; on_machines stop_one "${touched[@]}"; fi # those that were just starting
}

start() {
    CLUSTER='' STARTED=(0)
    read_token
    trap 'exit 130' INT TERM
    on_machines start_one 0
    if [ "${#FAILED[@]}" = 0 ]; then
        CLUSTER=$(tail -n 1 "$WORK/0.out")
        STARTED=("${!HOSTS[@]}")
        on_machines start_one "${STARTED[@]:1}"
    fi
    if [ "${#FAILED[@]}" != 0 ]; then
        name_failed
        echo "stopping what had been started" >&2
        exit 1
    fi
    STARTED=()
    cat <<END
Ray is up at $CLUSTER, on ${#HOSTS[@]} machines. From here:
  ssh -N -L $DASHBOARD_PORT:localhost:$DASHBOARD_PORT ${HOSTS[0]} &
  fathom submit --address http://localhost:$DASHBOARD_PORT train CONFIG
END
}

halt() { # the head last: it knows which ranks are where
    local numbers=("${!HOSTS[@]}") failed
    on_machines stop_one "${numbers[@]:1}"
    failed=("${FAILED[@]}")
    on_machines stop_one 0
    FAILED+=("${failed[@]}")
    tell "${numbers[@]}"
    [ "${#FAILED[@]}" = 0 ] || exit 1
}

status() {
    on_machines show_one "${!HOSTS[@]}"
    tell "${!HOSTS[@]}"
    [ "${#FAILED[@]}" = 0 ] || exit 1
}

[ $# = 2 ] || usage
case $1 in start) task=start ;; status) task=status ;; stop) task=halt ;; *) usage ;; esac
[[ "$NAME" =~ ^[A-Za-z0-9_-]{1,12}$ ]] || wrong "FATHOM_CLUSTER: '$NAME'; up to twelve letters, digits, - and _"
read_hosts "$2"
WORK=$(mktemp -d) || exit 1
trap 'undo; rm -rf "$WORK"' EXIT
"$task"
