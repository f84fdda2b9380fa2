#!/bin/sh
# Writes what `nft` itself sends for each script here, and what the kernel then tells of the tables: NAME.sent and
# NAME.told, a message in hexadecimal on each line. Needs root, nftables and strace; works in a namespace of its own.
set -eu
cd "$(dirname "$0")"
[ "${1-}" = inside ] || exec unshare --net sh ./remake.sh inside

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# The buffers of `strace -e write=all` (or read=all) as hexadecimal, one datagram on each line.
datagrams() {
    awk -v mark="$1" '
        /^[a-z]+\(/ { if (hex != "") print hex; hex = ""; wanted = index($0, mark) == 1 }
        wanted && /^ \| [0-9a-f]+  / { line = substr($0, 11, 49); gsub(/ /, "", line); hex = hex line }
        END { if (hex != "") print hex }'
}

# A datagram cut into its messages.
messages() {
    awk '
        function number(text,  at, value) {
            for (at = 1; at <= 8; at++) value = value * 16 + index("0123456789abcdef", substr(text, at, 1)) - 1
            return value
        }
        {
            while (length($0) >= 32) {
                size = 2 * number(substr($0, 7, 2) substr($0, 5, 2) substr($0, 3, 2) substr($0, 1, 2))
                print substr($0, 1, size)
                $0 = substr($0, size + 1)
            }
        }'
}

for script in *.nft; do
    name=${script%.nft}
    strace -o "$work/sent" -e trace=sendmsg -e write=all nft -f "$script"
    datagrams 'sendmsg(' <"$work/sent" | messages >"$name.sent"
    strace -o "$work/told" -e trace=recvmsg -e read=all nft list ruleset >/dev/null
    datagrams 'recvmsg(' <"$work/told" | messages >"$name.told"
    nft flush ruleset
done
wc -l ./*.sent ./*.told
