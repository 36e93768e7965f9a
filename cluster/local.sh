#!/usr/bin/env bash
# A Ray cluster of one head and N workers on this machine.
#
#   cluster/local.sh up [N]    bring it to exactly N workers (default 1); prints what to export
#   cluster/local.sh status    nodes, and what is in use
#   cluster/local.sh down      end it
#
# The machine's cores and GPUs are dealt out evenly over the workers; the head runs no tasks. `up` may be given again:
# it starts what is missing and ends what is too many. `down` ends the processes of this cluster alone, so other Ray
# clusters on the machine go on (`ray stop` would end them too).
#
# Variables:
#   CXR_PORT=6390            where drivers connect; one cluster a port
#   CXR_DASHBOARD_PORT=8270  where `ray job submit` and a browser connect; the next port is taken too
#   CXR_DIR                  logs and sockets, 40 characters at most; /tmp/cxrscale-UID-PORT
#   CXR_WORKER_CPUS, CXR_WORKER_GPUS   of each worker, in place of an even share
#   CXR_OBJECT_STORE_MB=512  shared memory of each node's object store
#   CXR_WAIT=120             seconds that a node may take to start
#   CXR_AUTH=token           who may run code: whoever can read the cluster's token, a file of yours; `disabled` means
#                            everybody who reaches this machine, since Ray listens on every interface
set -euo pipefail

port=${CXR_PORT:-6390}
dashboard=${CXR_DASHBOARD_PORT:-8270}
address=127.0.0.1:$port
dir=${CXR_DIR:-/tmp/cxrscale-$(id -u)-$port}
# Every process of this cluster has it in its environment, and no other one on the machine.
mark=CXRSCALE_LOCAL_CLUSTER=$dir

# A running cluster keeps the mode it was started with.
RAY_AUTH_MODE=$(cat "$dir/auth" 2>/dev/null || printf '%s' "${CXR_AUTH:-token}")
RAY_AUTH_TOKEN_PATH=$dir/token
export RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH
unset RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
# Without bytecode every worker recompiles torch: 11 s an import instead of 5. `ray start --head` refuses an address.
unset PYTHONDONTWRITEBYTECODE RAY_ADDRESS RAY_API_SERVER_ADDRESS

fail() {
    printf 'local.sh: %s\n' "$1" >&2
    exit 2
}

# Nodes run in the checkout: a job without a working directory of its own finds jobs/ there.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_ray() {
    # The active environment first: drivers have to run the same Python as the nodes.
    ray=${VIRTUAL_ENV:-$here/.venv}/bin/ray
    [[ -x $ray ]] || ray=$here/.venv/bin/ray
    [[ -x $ray ]] || ray=$(command -v ray) || fail "no ray in $here/.venv or on PATH; run make setup"
    # A job that says `python` means the one with cxrscale.
    PATH=$(dirname "$ray"):$PATH
}

# The process ids of this cluster. Ray's Python workers overwrite their environment with their title, so whoever shares
# a session with a marked process counts too; every node was started in a session of its own.
members() {
    local marked
    marked=$(grep -lszxF -- "$mark" /proc/[0-9]*/environ | cut -d/ -f3) || true
    [[ -n $marked ]] || return 0
    cat /proc/[0-9]*/stat 2>/dev/null | awk -v marked="$marked" '
        BEGIN { count = split(marked, list, "\n"); for (i = 1; i <= count; i++) ours[list[i]] = 1 }
        { pid = $1; sub(/^.*\) /, ""); session[pid] = $4; if (pid in ours) sessions[$4] = 1 }
        END { for (pid in session) if (pid in ours || session[pid] in sessions) print pid }' || true
}

# A node is its `ray start --block`; after a reboot its number may be another process's, hence the mark.
alive() {
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) && grep -qszxF -- "$mark" "/proc/$pid/environ"
}

workers() {
    local file
    for file in "$dir"/worker-*.pid; do
        [[ -e $file ]] || continue
        file=${file##*/worker-}
        if alive "worker-${file%.pid}"; then printf '%s\n' "${file%.pid}"; fi
    done | sort -n
}

end_node() {
    local pid tries
    if alive "$1"; then
        pid=$(cat "$dir/$1.pid")
        kill -TERM "$pid" 2>/dev/null || true
        for ((tries = 0; tries < 100; tries++)); do
            alive "$1" || break
            sleep 0.1
        done
        # Its own session, so nothing but this node's processes.
        pkill -KILL -s "$pid" 2>/dev/null || true
    fi
    rm -f "$dir/$1.pid"
}

# start_node NAME FOLDER ARGUMENT...: returns when Ray says that the node has joined. Each node has a folder of its own:
# in a common one they would unpack a job's files over each other.
start_node() {
    local name=$1 folder=$dir/$2 log=$dir/$1.log tries
    shift 2
    started+=("$name")
    env -C "$here" "$mark" setsid "$ray" start --block --log-style=record --node-ip-address=127.0.0.1 --disable-usage-stats \
        --temp-dir="$folder" --dashboard-agent-listen-port=0 \
        --object-store-memory=$((${CXR_OBJECT_STORE_MB:-512} * 1024 * 1024)) "$@" </dev/null >"$log" 2>&1 9>&- &
    printf '%s\n' "$!" >"$dir/$name.pid"
    for ((tries = 0; tries < ${CXR_WAIT:-120} * 5; tries++)); do
        if grep -qs 'Ray runtime started' "$log"; then return 0; fi
        # Not `alive`: the mark is there only once env has replaced itself.
        kill -0 "$!" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 1 "$log" >&2
    end_started
    fail "$name did not start (it may take CXR_WAIT=${CXR_WAIT:-120} s); $log says why"
}

# What this call started is ended again, the last first; without its head a cluster is nothing.
end_started() {
    local i
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do
        end_node "${started[i]}"
    done
    started=()
}

# share TOTAL N I: the I-th of N even shares, the first ones taking what is left over.
share() {
    printf '%s\n' "$(($1 / $2 + ($3 <= $1 % $2 ? 1 : 0)))"
}

list_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -v '^$' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true
    fi
}

start_worker() {
    local i=$1 n=$2 cpus gpus first=0 j devices mine
    mapfile -t devices < <(list_gpus)
    cpus=${CXR_WORKER_CPUS:-$(share "$(nproc)" "$n" "$i")}
    # More workers than cores: each still has to be able to run a task.
    ((cpus > 0)) || cpus=1
    gpus=${CXR_WORKER_GPUS:-$(share "${#devices[@]}" "$n" "$i")}
    for ((j = 1; j < i; j++)); do
        first=$((first + ${CXR_WORKER_GPUS:-$(share "${#devices[@]}" "$n" "$j")}))
    done
    ((first + gpus <= ${#devices[@]})) || fail "$n workers of $gpus GPUs need more than the ${#devices[@]} there are"
    mine=$(IFS=, && printf '%s' "${devices[*]:first:gpus}")
    CUDA_VISIBLE_DEVICES=$mine start_node "worker-$i" "w$i" --address="$address" --num-cpus="$cpus" --num-gpus="$gpus" \
        --include-log-monitor=false
    printf 'worker-%s: %s CPUs, %s GPUs%s\n' "$i" "$cpus" "$gpus" "${mine:+ ($mine)}"
}

up() {
    local n=$1 i
    [[ $n =~ ^[1-9][0-9]*$ ]] || fail "up $n: the number of workers is a whole number from 1"
    # A socket's path may have 107 characters, of which Ray's part takes up to 66.
    ((${#dir} <= 40)) || fail "CXR_DIR=$dir is longer than 40 characters; Ray's sockets need a shorter path"
    find_ray
    started=()
    trap 'end_started; exit 130' INT TERM
    if ! alive head; then
        end_all
        if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            fail "port $port is taken by something else; give another CXR_PORT"
        fi
        if (exec 3<>"/dev/tcp/127.0.0.1/$dashboard") 2>/dev/null; then
            fail "port $dashboard is taken by something else; give another CXR_DASHBOARD_PORT"
        fi
        rm -rf "$dir/ray" "$dir"/w[0-9]* "$dir"/*.log
        RAY_AUTH_MODE=${CXR_AUTH:-token}
        [[ $RAY_AUTH_MODE =~ ^(token|disabled)$ ]] || fail "CXR_AUTH=$RAY_AUTH_MODE is neither token nor disabled"
        make_token
        start_node head ray --head --port="$port" --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1 \
            --dashboard-port="$dashboard" --ray-client-server-port=$((dashboard + 1))
        printf 'head: %s, jobs and dashboard at http://127.0.0.1:%s\n' "$address" "$dashboard"
    fi
    for i in $(workers); do
        if ((i > n)); then end_node "worker-$i"; fi
    done
    for ((i = 1; i <= n; i++)); do
        alive "worker-$i" || start_worker "$i" "$n"
    done
    trap - INT TERM
    printf 'export RAY_AUTH_MODE=%s RAY_AUTH_TOKEN_PATH=%s\n' "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN_PATH"
    printf 'export RAY_ADDRESS=%s RAY_API_SERVER_ADDRESS=http://127.0.0.1:%s\n' "$address" "$dashboard"
}

make_token() {
    printf '%s' "$RAY_AUTH_MODE" >"$dir/auth"
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
}

status() {
    alive head || fail "no cluster at $address; cluster/local.sh up"
    find_ray
    printf 'head at %s, jobs and dashboard at http://127.0.0.1:%s, workers: %s, logs: %s\n' \
        "$address" "$dashboard" "$(workers | paste -sd ' ')" "$dir"
    "$ray" status --address "$address"
}

end_all() {
    local i pid tries
    for i in $(workers); do
        end_node "worker-$i" &
    done
    wait
    end_node head
    # Drivers of jobs run in sessions of their own.
    for pid in $(members); do kill -TERM "$pid" 2>/dev/null || true; done
    for ((tries = 0; tries < 50; tries++)); do
        [[ -n $(members) ]] || break
        sleep 0.1
    done
    for pid in $(members); do kill -KILL "$pid" 2>/dev/null || true; done
    rm -f "$dir"/*.pid "$dir/auth" "$dir/token"
}

case ${1:-} in
up | down)
    (umask 077 && mkdir -p "$dir")
    # Two calls at once would start every node twice. Children must not hold the lock.
    exec 9>"$dir/lock"
    flock 9
    if [[ $1 == up ]]; then up "${2:-1}"; else
        end_all
        printf 'nothing of %s runs any more; its logs are in %s\n' "$address" "$dir"
    fi
    ;;
status) status ;;
*)
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    [[ ${1:-} =~ ^(-h|--help|help)$ ]] || exit 2
    ;;
esac
