#!/usr/bin/env bash
# A cluster on this machine, to try things on.
#   scripts/cluster-local.sh up N [--netns] [serve options…]   starts N nodes, prints where clients connect
#   scripts/cluster-local.sh status            who runs, and where
#   scripts/cluster-local.sh add               one node more, which joins and votes (not with --netns)
#   scripts/cluster-local.sh kill N | start N | stop N          SIGKILL, start again, SIGTERM
#   scripts/cluster-local.sh pause N | resume N                 SIGSTOP, SIGCONT
#   scripts/cluster-local.sh cut A B | oneway A B | heal        (with --netns) no packets between A and B; none from A to B; all again
#   scripts/cluster-local.sh slow N KBIT       (with --netns) no more than so many kbit/s to and from N; heal ends it
#   scripts/cluster-local.sh down [--keep]     stops all; removes their data unless told to keep it
# With --netns every node has a network namespace of its own (needs root, iproute2, nftables); else all are on loopback.
# CLUSTER_BIN names the binary (default: a release build of this checkout), CLUSTER_DIR the folder of the nodes,
# CLUSTER_PORT the first port on loopback (default 19092): the nth node has CLUSTER_PORT + n - 1 for clients, and for nodes
# CLUSTER_PORT + 100 n and those behind it, one for each of its shards.
set -euo pipefail
cd "$(dirname "$0")/.."
DIR="${CLUSTER_DIR:-target/cluster-local}"
PORT="${CLUSTER_PORT:-19092}"
BRIDGE=mrbr0 NET=10.254.77

fail() { echo "cluster-local: $*" >&2; exit 1; }
ns() { echo "millrace-$1"; }
nodes() { (cd "$DIR" 2>/dev/null && ls -d [0-9]* 2>/dev/null | sort -n) || true; }
in_netns() { [ -e "$DIR/netns" ]; }
pid_of() { cat "$DIR/$1/pid" 2>/dev/null || true; }
state() { local pid; pid=$(pid_of "$1"); [ -n "$pid" ] && sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$pid/status" 2>/dev/null || true; }
runs() { local s; s=$(state "$1"); [ -n "$s" ] && [ "$s" != Z ]; }
known() { [ -d "$DIR/${1:-none}" ] || fail "node ${1:-?} is not there; nodes: $(nodes | xargs)"; }

kafka_address() { if in_netns; then echo "$NET.$1:9092"; else echo "127.0.0.1:$((PORT + $1 - 1))"; fi; }
cluster_address() { if in_netns; then echo "$NET.$1:9192"; else echo "127.0.0.1:$((PORT + 100 * $1))"; fi; }

binary() {
  if [ -z "${CLUSTER_BIN:-}" ]; then
    cargo build --release --quiet
    CLUSTER_BIN="$PWD/target/release/millrace"
  fi
  echo "$CLUSTER_BIN" > "$DIR/binary"
}

start_node() { # N
  local n=$1 peers="" p run=() extra=()
  runs "$n" && fail "node $n runs already"
  for p in $(nodes); do peers="$peers${peers:+,}$p@$(cluster_address "$p")"; done
  mapfile -t extra < "$DIR/options"
  if in_netns; then
    run=(ip netns exec "$(ns "$n")")
    extra+=(--set "cluster.tls.ca=$DIR/ca/ca.pem" --set "cluster.tls.cert=$DIR/ca/node-$n.pem" --set "cluster.tls.key=$DIR/ca/node-$n.key")
  fi
  # setsid: a signal to this script's terminal is not one to the nodes.
  setsid "${run[@]}" "$(cat "$DIR/binary")" serve --data-dir "$DIR/$n/data" --node-id "$n" \
    --kafka-listen "$(kafka_address "$n")" --cluster-listen "$(cluster_address "$n")" --peers "$peers" \
    --set default.replication.factor=3 --set min.insync.replicas=2 "${extra[@]}" \
    > "$DIR/$n/out" 2>> "$DIR/$n/log" < /dev/null &
  echo $! > "$DIR/$n/pid"
}

wait_ready() { # N…
  local n tries
  for n in "$@"; do
    for tries in $(seq 200); do
      grep -q ready "$DIR/$n/out" 2>/dev/null && break
      runs "$n" || fail "node $n ended: $(tail -n 3 "$DIR/$n/log")"
      sleep 0.1
      [ "$tries" = 200 ] && fail "node $n is not ready after 20 s; its log is $DIR/$n/log"
    done
  done
}

make_netns() { # COUNT
  command -v nft >/dev/null || fail "--netns needs nftables and iproute2 (Debian: apt-get install nftables iproute2)"
  ip link add "$BRIDGE" type bridge
  ip addr add "$NET.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  local n
  for n in $(seq "$1"); do
    ip netns add "$(ns "$n")"
    ip link add "mrv$n" type veth peer name eth0 netns "$(ns "$n")"
    ip link set "mrv$n" master "$BRIDGE" up
    ip -n "$(ns "$n")" addr add "$NET.$n/24" dev eth0
    ip -n "$(ns "$n")" link set eth0 up
    ip -n "$(ns "$n")" link set lo up
    ip netns exec "$(ns "$n")" nft -f - <<< $'add table ip cut\nadd chain ip cut input { type filter hook input priority 0; }'
  done
  local bin; bin=$(cat "$DIR/binary")
  "$bin" cluster init-ca --dir "$DIR/ca" >/dev/null
  for n in $(seq "$1"); do "$bin" cluster issue --dir "$DIR/ca" --node-id "$n" >/dev/null; done
}

remove_netns() {
  local n
  for n in $(nodes); do ip netns del "$(ns "$n")" 2>/dev/null || true; done
  ip link del "$BRIDGE" 2>/dev/null || true
}

drop() { # FROM TO: TO hears nothing from FROM
  ip netns exec "$(ns "$2")" nft add rule ip cut input ip saddr "$NET.$1" drop
}

slow() { # N KBIT
  local shape=(tbf rate "$2kbit" burst 8kb latency 400ms)
  tc -n "$(ns "$1")" qdisc replace dev eth0 root "${shape[@]}"
  tc qdisc replace dev "mrv$1" root "${shape[@]}"
}

heal() {
  local n
  for n in $(nodes); do
    ip netns exec "$(ns "$n")" nft flush chain ip cut input
    tc -n "$(ns "$n")" qdisc del dev eth0 root 2>/dev/null || true
    tc qdisc del dev "mrv$n" root 2>/dev/null || true
  done
}

command="${1:-help}"; shift || true
case "$command" in
up)
  count="${1:-}"; shift || true
  [[ "$count" =~ ^[1-9][0-9]?$ ]] || fail "up takes a number of nodes, for example: up 3"
  [ -z "$(nodes)" ] || fail "there is a cluster already; 'down' removes it"
  mkdir -p "$DIR"; DIR=$(cd "$DIR" && pwd)
  for n in $(seq "$count"); do mkdir -p "$DIR/$n"; done
  binary
  if [ "${1:-}" = --netns ]; then shift; touch "$DIR/netns"; make_netns "$count"; fi
  printf '%s\n' "$@" | sed '/^$/d' > "$DIR/options"
  for n in $(nodes); do start_node "$n"; done
  wait_ready $(nodes)
  echo "bootstrap: $(for n in $(nodes); do kafka_address "$n"; done | paste -sd,)"
  ;;
status)
  [ -n "$(nodes)" ] || fail "there is no cluster; 'up 3' starts one"
  for n in $(nodes); do
    is=down
    if runs "$n"; then is=runs; fi
    if [ "$(state "$n")" = T ]; then is=paused; fi
    echo "node $n: $is, Kafka $(kafka_address "$n"), nodes $(cluster_address "$n"), log $DIR/$n/log"
  done
  ;;
add)
  in_netns && fail "add needs a cluster on loopback"
  [ -n "$(nodes)" ] || fail "there is no cluster; 'up 3' starts one"
  DIR=$(cd "$DIR" && pwd)
  n=$(($(nodes | tail -n 1) + 1)); mkdir "$DIR/$n"
  start_node "$n"; wait_ready "$n"
  "$(cat "$DIR/binary")" cluster add-node "$n" --bootstrap "$(for p in $(nodes); do kafka_address "$p"; done | paste -sd,)"
  ;;
kill) known "${1:-}"; kill -9 "$(pid_of "$1")" ;;
stop) known "${1:-}"; kill "$(pid_of "$1")" ;;
pause) known "${1:-}"; kill -STOP "$(pid_of "$1")" ;;
resume) known "${1:-}"; kill -CONT "$(pid_of "$1")" ;;
start) known "${1:-}"; DIR=$(cd "$DIR" && pwd); start_node "$1"; wait_ready "$1" ;;
cut) known "${1:-}"; known "${2:-}"; in_netns || fail "cut needs a cluster made with --netns"; drop "$1" "$2"; drop "$2" "$1" ;;
oneway) known "${1:-}"; known "${2:-}"; in_netns || fail "oneway needs a cluster made with --netns"; drop "$1" "$2" ;;
slow) known "${1:-}"; in_netns || fail "slow needs a cluster made with --netns"; slow "$1" "${2:?say how many kbit/s}" ;;
heal) in_netns || fail "heal needs a cluster made with --netns"; heal ;;
down)
  for n in $(nodes); do if runs "$n"; then kill -CONT "$(pid_of "$n")"; kill "$(pid_of "$n")"; fi; done
  for n in $(nodes); do
    for _ in $(seq 100); do runs "$n" || break; sleep 0.1; done
    if runs "$n"; then kill -9 "$(pid_of "$n")"; fi
  done
  if in_netns; then remove_netns; fi
  if [ "${1:-}" != --keep ]; then rm -rf "$DIR"; fi
  ;;
*) sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//'; [ "$command" = help ] || exit 1 ;;
esac
