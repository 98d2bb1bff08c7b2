#!/usr/bin/env bash
# Runs every test: unit, property and crash tests, then real clients against a broker of this checkout.
# Installs what it needs by name from the package registries; works on a bare checkout. Ends with the counts.
#   scripts/test.sh           everything
#   scripts/test.sh rust      only what cargo runs
#   scripts/test.sh clients   only real clients; further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
TARGET="${CARGO_TARGET_DIR:-$PWD/target}"
WORK="$TARGET/test-tools"
mkdir -p "$WORK"
what="${1:-all}"
[ $# -gt 0 ] && shift

need_package() { # PACKAGE FILE-IT-BRINGS
  [ -e "$2" ] && return
  echo "installing $1" >&2
  [ -e "$WORK/.apt" ] || { apt-get update -q >/dev/null && touch "$WORK/.apt"; }
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$1" >/dev/null
}

rust() {
  cargo fmt --all --check
  cargo clippy --workspace --all-targets --quiet -- -D warnings
  cargo check --quiet -p millrace-engine -p millrace-net --no-default-features
  cargo test --workspace 2>&1 | tee "$WORK/cargo.log"
}

tools() {
  need_package kcat /usr/bin/kcat
  need_package dict-gcide /usr/share/dictd/gcide.dict.dz
  need_package faketime /usr/bin/faketime
  need_package iproute2 /usr/sbin/ip
  need_package nftables /usr/sbin/nft
  if ! cmp -s tests/compat/requirements.txt "$WORK/requirements.txt"; then
    python3 -m venv "$WORK/venv"
    "$WORK/venv/bin/pip" install -q --disable-pip-version-check -r tests/compat/requirements.txt
    rm -rf "$WORK/suite" && mkdir "$WORK/suite"
    version=$("$WORK/venv/bin/pip" show kafka-python 2>/dev/null | sed -n 's/^Version: //p')
    "$WORK/venv/bin/pip" download -q --disable-pip-version-check --no-deps --no-binary :all: -d "$WORK/suite" \
      "kafka-python==$version"
    tar -xzf "$WORK"/suite/*.tar.gz -C "$WORK/suite" --strip-components=1
    cp tests/compat/requirements.txt "$WORK/requirements.txt"
  fi
  if command -v mvn >/dev/null && ! cmp -s tests/compat/java/pom.xml "$WORK/pom.xml"; then
    mvn -q -B -f tests/compat/java/pom.xml dependency:copy-dependencies -DoutputDirectory="$WORK/java" \
      -DincludeScope=runtime >&2
    cp tests/compat/java/pom.xml "$WORK/pom.xml"
  fi
  if command -v go >/dev/null; then
    (cd tests/compat/go && mkdir -p "$WORK/go" && go build -o "$WORK/go/" ./franz ./sarama)
    (cd tests/compat/go-old-sarama && go build -o "$WORK/go/old-sarama" .)
  fi
  if command -v npm >/dev/null && ! cmp -s tests/compat/js/package.json "$WORK/js/package.json"; then
    rm -rf "$WORK/js" && cp -r tests/compat/js "$WORK/js"
    npm install --prefix "$WORK/js" --silent --no-audit --no-fund >&2
  fi
  cargo build --quiet --manifest-path tests/compat/rust/Cargo.toml --target-dir "$WORK/rust"
}

# The build that a rolling upgrade begins with, where the history holds it.
previous() {
  local rev built; rev=$(cat tests/compat/upgrade-from) built="$WORK/millrace-$rev"
  [ -e "$built" ] && return
  git cat-file -e "$rev^{commit}" 2>/dev/null || { echo "no commit $rev here: rolling upgrades are not tested" >&2; return; }
  rm -rf "$WORK/previous" && mkdir -p "$WORK/previous"
  git archive "$rev" | tar -x -m -C "$WORK/previous"
  # In the folder of this checkout, for the libraries that both use. Its own crates go again: the two builds' would be taken for
  # each other's.
  CARGO_TARGET_DIR="$TARGET" cargo build --quiet --manifest-path "$WORK/previous/Cargo.toml" --bin millrace
  cp "$TARGET/debug/millrace" "$built"
  cargo clean --quiet -p millrace -p millrace-engine -p millrace-net -p millrace-cluster
  rm -rf "$WORK/previous"
}

clients() {
  cargo build --quiet --workspace
  tools
  [ -d "$WORK/java" ] && export MILLRACE_TEST_JAVA_LIB="$WORK/java"
  [ -d "$WORK/go" ] && export MILLRACE_TEST_GO="$WORK/go"
  [ -d "$WORK/js/node_modules" ] && export MILLRACE_TEST_JS="$WORK/js"
  export MILLRACE_TEST_RUST="$WORK/rust/debug/millrace-compat"
  export MILLRACE_TEST_KAFKA_PYTHON="$WORK/suite"
  local previous; previous="$WORK/millrace-$(cat tests/compat/upgrade-from)"
  [ -e "$previous" ] && export MILLRACE_TEST_PREVIOUS="$previous"
  MILLRACE_TEST_BINARY="$TARGET/debug/millrace" "$WORK/venv/bin/python" -m pytest -q \
    -p no:cacheprovider -W ignore --timeout 400 tests/compat "$@" 2>&1 | tee "$WORK/pytest.log"
}

counts() {
  awk '
    /^test result:/ { for (i = 1; i < NF; i++) { if ($(i+1) ~ /^passed/) p += $i; if ($(i+1) ~ /^failed/) f += $i; if ($(i+1) ~ /^ignored/) s += $i } }
    /^[0-9]+ (passed|failed|skipped|error)| (passed|failed|skipped|errors?)[, ].* in [0-9.]+s/ {
      for (i = 1; i < NF; i++) { if ($(i+1) ~ /^passed/) p += $i; if ($(i+1) ~ /^(failed|error)/) f += $i; if ($(i+1) ~ /^skipped/) s += $i } }
    END { printf "%d passed, %d failed, %d skipped\n", p, f, s }' "$@"
}

case "$what" in
  all) previous; rust; clients; counts "$WORK/cargo.log" "$WORK/pytest.log" ;;
  rust) rust; counts "$WORK/cargo.log" ;;
  clients) previous; clients "$@"; counts "$WORK/pytest.log" ;;
  *) echo "usage: scripts/test.sh [all|rust|clients [PYTEST ARGUMENTS]]" >&2; exit 2 ;;
esac
