# make up      a guest with PostgreSQL, from nothing
# make build   the four binaries, in target/sovereign/
# make down    stops it; data stays
# make test    everything that CI checks
# make bench   speed and size beside peers measured in the same run; docs/benchmarks.md
# make mutants changes the code that decides, bit by bit, and says which change no test saw; takes hours
#
# Debian and Ubuntu packages are installed as root; otherwise the one command is printed.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: up build down test check deny system bench bench-check mutants packages rust
.DEFAULT_GOAL := build

ROOT     := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
TARGET   := $(or $(CARGO_TARGET_DIR),$(ROOT)target)
OUT      := $(ROOT)target/sovereign
GUEST    := x86_64-unknown-linux-gnu
RUST_MIN := 1.95

up: packages build
	@$(OUT)/sovereign init
	@$(OUT)/sovereign up

down:
	@if [ -x $(OUT)/sovereign ]; then $(OUT)/sovereign down; else echo "nothing is built, so nothing runs" >&2; fi

# The guest's programs are static: the image's libraries are none of their business. An explicit --target keeps the
# flags away from build scripts and procedural macros.
build: rust
	@cargo build --release -p sovereign-ctl -p sovereign-host-agent
	@RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile guest --target $(GUEST) -p sovereign-guest-agent
	@mkdir -p $(OUT)
	@for program in $(TARGET)/release/sovereign $(TARGET)/release/sovereign-host \
	    $(TARGET)/$(GUEST)/guest/sovereign-init $(TARGET)/$(GUEST)/guest/sovereign-guest; do \
	    to=$(OUT)/$$(basename $$program); \
	    cmp -s $$program $$to && continue; \
	    cp $$program $$to.new; mv $$to.new $$to; \
	done

# What the tests look at the product with.
test: NEEDS += modprobe:kmod ip:iproute2 nft:nftables iptables:iptables strace:strace mkfs.ext4:e2fsprogs setpriv:util-linux
test: packages check deny system

check: rust
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --locked
	cargo test --workspace --exclude sovereign-tests --locked
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo test --manifest-path fuzz/Cargo.toml --target-dir $(TARGET) --locked

deny: rust
	@command -v cargo-deny >/dev/null || cargo install cargo-deny --locked
	cargo deny check bans licenses sources
	@if cargo deny fetch db >/dev/null 2>&1; then cargo deny --offline check advisories; \
	else echo "SKIPPED: cargo deny check advisories (the advisory database cannot be fetched from here)" >&2; fi

mutants: rust
	@command -v cargo-mutants >/dev/null || cargo install cargo-mutants --locked
	nice cargo mutants --output $(TARGET) --cap-lints true

system: packages build
	SOVEREIGN_BIN=$(OUT) cargo test -p sovereign-tests --locked --no-fail-fast

# benches/ is a workspace of its own: peers such as tonic never enter the product's lock file. PARTS chooses among
# its parts, such as `make bench PARTS="size rpc"`.
BENCH     := $(TARGET)/bench
BENCHES   := --manifest-path $(ROOT)benches/Cargo.toml --target-dir $(BENCH)/build --locked
VHOST     := vhost-device-vsock
bench: NEEDS += nft:nftables iptables:iptables /usr/lib/podman/netavark:netavark /usr/lib/cni/bridge:containernetworking-plugins
bench: packages build
	@cargo build --release $(BENCHES) -p runner
	@RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile guest --target $(GUEST) $(BENCHES) -p empty -p probe
	@[ -x $(BENCH)/peers/bin/$(VHOST) ] || \
	    cargo install $(VHOST) --version =0.3.0 --locked --root $(BENCH)/peers || \
	    echo "the peer $(VHOST) cannot be installed from here" >&2
	@TMPDIR="$$(mktemp -d /tmp/svb.XXXX)"; export TMPDIR; trap 'rm -rf "$$TMPDIR"' EXIT; \
	SOVEREIGN_BIN=$(OUT) $(BENCH)/build/release/runner --product $(OUT) --statics $(BENCH)/build/$(GUEST)/guest \
	    --device $(BENCH)/peers/bin/$(VHOST) --out $(BENCH) $(PARTS)

# What CI would check of benches/; not part of `make test`, because its peers take minutes to build.
bench-check: rust
	cargo fmt --manifest-path $(ROOT)benches/Cargo.toml --all --check
	cargo clippy $(BENCHES) --workspace --all-targets -- -D warnings
	cargo test $(BENCHES) --workspace

# command:package; erofs-utils and debootstrap are needed for images, qemu for guests.
NEEDS := qemu-system-x86_64:qemu-system-x86 mkfs.erofs:erofs-utils debootstrap:debootstrap

packages:
	@export PATH="$$PATH:/usr/sbin:/sbin"; missing=""; \
	for need in $(NEEDS); do \
	    command -v "$${need%%:*}" >/dev/null || missing="$$missing $${need#*:}"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	install="apt-get install -y --no-install-recommends$$missing"; \
	if ! command -v apt-get >/dev/null; then \
	    echo "error: not installed:$$missing; install them with this system's package manager" >&2; exit 1; \
	elif [ "$$(id -u)" != 0 ]; then \
	    echo "error: not installed:$$missing" >&2; echo "next: sudo $$install" >&2; exit 1; \
	fi; \
	echo "installing$$missing" >&2; \
	{ DEBIAN_FRONTEND=noninteractive $$install || { apt-get update && DEBIAN_FRONTEND=noninteractive $$install; }; } >&2

rust:
	@if ! command -v cargo >/dev/null || ! command -v rustc >/dev/null; then \
	    echo "error: no Rust here; $(RUST_MIN) or newer is needed" >&2; \
	    echo "next: install it with rustup (rustup.rs), then run make again" >&2; exit 1; \
	fi; \
	have="$$(rustc --version | cut -d' ' -f2)"; \
	if [ "$$(printf '%s\n' $(RUST_MIN) "$$have" | sort -V | head -n1)" != $(RUST_MIN) ]; then \
	    echo "error: rustc $$have is too old; $(RUST_MIN) or newer is needed" >&2; \
	    echo "next: rustup update stable" >&2; exit 1; \
	fi
