#!/bin/bash
# Writes conntrack.told: what the kernel tells of five connections, a datagram in hexadecimal on each line. Needs root,
# nftables, strace, conntrack and iproute2; works in namespaces of its own.
set -euo pipefail
cd "$(dirname "$0")"
[ "${1-}" = inside ] || exec unshare --net bash ./remake-conntrack.sh inside

work=$(mktemp -d)
trap 'kill "$outside" "$guest"; rm -r "$work"' EXIT

# Another machine and a guest, by the processes that hold their namespaces.
unshare --net sh -c 'ip link set lo up; echo >"$0"; exec sleep 60' "$work/outside" &
outside=$!
unshare --net sh -c 'ip link set lo up; echo >"$0"; exec sleep 60' "$work/guest" &
guest=$!
until [ -s "$work/outside" ] && [ -s "$work/guest" ]; do :; done
at() { nsenter --target "$1" --net -- bash -c "$2"; }

ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
link() { # name, place, our addresses, its addresses
    ip link add "$1" type veth peer name eth0 netns "$2"
    ip link set "$1" up
    at "$2" "ip link set eth0 up; ip address add $5 dev eth0; ip address add $6 dev eth0 nodad"
    ip address add "$3" dev "$1"
    ip address add "$4" dev "$1" nodad
}
link up0 "$outside" 192.0.2.1/24 fd00:8::1/64 192.0.2.2/24 fd00:8::2/64
link in0 "$guest" 10.9.0.1/24 fd00:9::1/64 10.9.0.2/24 fd00:9::2/64
at "$guest" 'ip route add default via 10.9.0.1'
# A refusal would end the connection.
at "$guest" 'nft "add table ip t; add chain ip t input { type filter hook input priority 0; policy drop; }"'
nft -f - <<'END'
table inet t {
    chain prerouting {
        type nat hook prerouting priority -100
        iifname up0 ip daddr 192.0.2.1 meta l4proto { tcp, udp } th dport 5300 dnat ip to 10.9.0.2
        iifname up0 ip6 daddr fd00:8::1 udp dport 5300 dnat ip6 to fd00:9::2
    }
    chain postrouting {
        type nat hook postrouting priority 100
        oifname up0 ip saddr 10.9.0.0/24 masquerade
    }
}
END
at "$outside" 'echo x >/dev/udp/192.0.2.1/5300; echo x >/dev/udp/192.0.2.1/5301; echo x >/dev/udp/fd00:8::1/5300'
at "$outside" 'timeout 1 bash -c "echo x >/dev/tcp/192.0.2.1/5300" || true' 2>/dev/null
at "$guest" 'echo x >/dev/udp/192.0.2.2/5300'
for family in ipv4 ipv6; do
    strace -o "$work/told" -e trace=recvfrom,recvmsg -e read=all conntrack -L -f "$family" >&2
    awk '
        /^[a-z]+\(/ { if (hex != "") print hex; hex = "" }
        /^ \| [0-9a-f]+  / { line = substr($0, 11, 49); gsub(/ /, "", line); hex = hex line }
        END { if (hex != "") print hex }' <"$work/told"
done >conntrack.told
